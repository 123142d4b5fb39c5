"""Scripts ask for what the settings say, and hand over to the aftermath whatever happens."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.cluster import Cluster, load_cluster
from slurm.script import sbatch_parameters, sbatch_script, teardown_lines

EXAMPLES = Path(__file__).resolve().parents[2] / "slurm" / "clusters"


def script(cluster: Cluster, tasks: int = 1, after: str = "") -> str:
    folder = Path("/runs/a/slurm")
    parameters = sbatch_parameters(cluster, "stage1", folder, after, tasks)
    return sbatch_script(folder, cluster, parameters, tasks)


def srun_of(text: str) -> list[str]:
    return shlex.split(next(line for line in text.splitlines() if line.startswith("srun ")))


def test_sbatch_script__plain_example():
    text = script(load_cluster(EXAMPLES / "plain.yaml"))
    for line in (
        "partition=gpu", "account=my_project", "nodes=4", "ntasks-per-node=8", "gpus-per-node=8",
        "cpus-per-task=12", "mem=900GB", "time=1440", "signal=USR2@300", "requeue", "exclusive",
    ):  # fmt: skip
        assert f"#SBATCH --{line}\n" in text
    assert "\nexport NCCL_DEBUG=WARN\nmodule load cuda\n" in text
    assert {"--cpus-per-task=12", "--kill-on-bad-exit=1"} <= set(srun_of(text))
    assert "dependency" not in text


def test_sbatch_script__preemptible_example():
    text = script(load_cluster(EXAMPLES / "preemptible.yaml"))
    for line in ("ntasks-per-node=1", "cpus-per-task=96", "qos=low", "open-mode=append"):
        assert f"#SBATCH --{line}\n" in text
    assert "--cpus-per-task=96" in srun_of(text)


def test_sbatch_script__containers_example():
    text = script(load_cluster(EXAMPLES / "containers.yaml"))
    arguments = srun_of(text)
    assert "--container-image=/shared/images/radio_distill.sqsh" in arguments
    mounts = "/shared/data:/shared/data:ro,/shared/runs:/shared/runs"
    assert f"--container-mounts={mounts}" in arguments
    assert "--container-workdir=/shared/runs" in arguments
    assert arguments.index("--no-container-mount-home") < arguments.index("/opt/venv/bin/python")
    assert f"{shlex.quote(sys.executable)} " in text.splitlines()[-2]  # outside the container
    assert "\nexport HF_HUB_OFFLINE=1\n" in text


def test_sbatch_script__waits_for_the_job_before():
    text = script(Cluster(), after="41")
    assert "#SBATCH --dependency=afterok:41\n" in text
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in text


def test_sbatch_script__an_array_runs_so_many_at_a_time():
    assert "#SBATCH --array=0-4%2\n" in script(Cluster(max_running=2), tasks=5)
    assert "--array" not in script(Cluster(max_running=2))


def test_sbatch_script__processes_end_before_the_job_where_there_is_room():
    assert "--time=1437:30" in srun_of(script(Cluster()))
    short = script(Cluster(time_minutes=10, signal_delay_s=60))
    assert not any(argument.startswith("--time") for argument in srun_of(short))


@pytest.mark.parametrize(
    ("srun", "expected"),
    [("exit 0", "0"), ("exit 7", "7"), ("kill -TERM $PPID", "0 --ending")],
)
def test_sbatch_script__runs_the_aftermath(tmp_path, monkeypatch, srun, expected):
    """With a stand-in for srun, which here also sends what Slurm sends to the batch shell."""
    (tmp_path / "srun").write_text(f"#!/bin/sh\n{srun}\n")
    (tmp_path / "srun").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    cluster = Cluster(setup=("set -e",), environment={"A": "b c; d"})
    text = script(cluster)
    (last,) = [line for line in text.splitlines() if "aftermath.py" in line]
    call = f"{sys.executable} {Path(__file__).resolve().parents[2]}/slurm/aftermath.py"
    assert last == f"{call} /runs/a/slurm stage1 $STATUS $ENDING"
    text = text.replace(call, 'sleep 0.1; kill -TERM $$; echo "$A:"')
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
    assert done.stdout == f"b c; d: /runs/a/slurm stage1 {expected}\n"
    assert done.returncode == 0


def test_teardown_lines__the_script_ends_as_the_aftermath_did():
    lines = "\n".join(["false", *teardown_lines(Path("/a b"), "x")])
    lines = lines.replace(shlex.join([sys.executable]), "false #")
    assert subprocess.run(["bash", "-c", lines]).returncode == 1
