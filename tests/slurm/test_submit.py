"""A chain runs in order, stops at a failure, and its scripts ask for what the settings say."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from submitit.helpers import DelayedSubmission

from radio_distill.errors import ConfigError, RadioDistillError
from slurm.chain import Chain, Job, Request, Task, jobs_of, read_chain
from slurm.cluster import Cluster, load_cluster
from slurm.job import Call
from slurm.submit import run_here, sbatch_parameters, sbatch_script, scripts, submit

STAGES = ["stage1", "stage2", "stage3"]


def recording(folder, *functions, **settings):
    jobs = tuple(
        Job(
            name=stage,
            target=f"recording_stage:{function}",
            tasks=(Task(arguments=(str(folder), stage)),),
        )
        for stage, function in zip(STAGES, functions, strict=True)
    )
    return Chain(jobs=jobs, cluster=Cluster(**{"gpus_per_node": 0, **settings}))


@pytest.fixture
def chain(recipe):
    _, jobs = jobs_of(Request(recipe=recipe))
    cluster = Cluster(nodes=2, gpus_per_node=8, setup=("module load cuda",), sbatch={"wckey": "a"})
    return Chain(jobs=jobs, cluster=cluster)


def test_run_here__stages_run_one_after_another(tmp_path, recorded, capsys):
    ids = run_here(tmp_path / "jobs", recording(tmp_path, "main", "main", "main"), "debug")
    calls = recorded()
    assert [call["arguments"][0] for call in calls] == STAGES
    assert [call["RANK"] for call in calls] == ["0"] * 3
    assert len(set(ids)) == 3
    assert capsys.readouterr().out.count("debug executor: waiting for") == 3


def test_run_here__nothing_starts_after_a_failure(tmp_path, recorded):
    chain = recording(tmp_path, "main", "failing", "main")
    with pytest.raises(RadioDistillError, match=r"stage2 \(job .*_log\.err") as caught:
        run_here(tmp_path / "jobs", chain, "local")
    assert "\n" not in str(caught.value)
    assert [call["arguments"][0] for call in recorded()] == ["stage1", "stage2"]


def test_run_here__two_nodes_are_too_many_for_one_machine(tmp_path):
    chain = recording(tmp_path, *["main"] * 3, nodes=2)
    with pytest.raises(ConfigError, match=r"stage1 .*nodes=1"):
        run_here(tmp_path / "jobs", chain, "local")


def test_submit__jobs_depend_on_each_other(tmp_path, chain, login_node):
    folder = tmp_path / "jobs"
    submitted = submit(folder, chain)
    assert [job.job_ids for job in submitted.jobs] == [["41"], ["42"], ["43"], ["44"], ["45"]]
    assert read_chain(folder) == submitted
    texts = [(login_node / f"{number}.sh").read_text() for number in range(41, 46)]
    assert "--dependency" not in texts[0]
    for number, text in enumerate(texts[1:], 41):
        assert f"#SBATCH --dependency=afterok:{number}\n" in text
    pickled = DelayedSubmission.load(folder / "42_submitted.pkl").function
    arguments = chain.jobs[1].tasks[0].arguments
    assert pickled == Call(
        target="stages.cli:main",
        arguments=arguments,
        name="stage2",
        folder=str(folder),
        processes_per_node=8,
    )
    assert DelayedSubmission.load(folder / "44_submitted.pkl").function.resumes is False


def test_submit__its_scripts_are_those_of_the_dry_run(tmp_path, chain, login_node):
    planned = scripts(tmp_path / "jobs", chain)
    submit(tmp_path / "jobs", chain)
    for number, text in zip(range(41, 46), planned, strict=True):
        script = text.split("\n", 1)[1]
        for index, name in enumerate(["STAGE1", "STAGE2", "STAGE3", "EXPORT"], 41):
            script = script.replace(f"{name}_JOB_ID", str(index))
        assert (login_node / f"{number}.sh").read_text() == script


def test_submit__a_sweep_is_one_array(tmp_path, recipe, login_node):
    _, jobs = jobs_of(Request(recipe=recipe, stages=("stage3",), sweep="seed=1,2,3"))
    chain = Chain(jobs=jobs, cluster=Cluster(max_running=2))
    (job,) = submit(tmp_path / "jobs", chain).jobs
    assert [task.job_id for task in job.tasks] == ["41_0", "41_1", "41_2"]
    text = (login_node / "41.sh").read_text()
    assert "#SBATCH --array=0-2%2\n" in text
    (planned,) = scripts(tmp_path / "jobs", chain)
    assert planned.endswith(text)
    assert [line.split(":")[0] for line in planned.splitlines()[:3]] == [
        "# ---- stage3 seed-1",
        "# ---- stage3 seed-2",
        "# ---- stage3 seed-3",
    ]
    pickled = DelayedSubmission.load(tmp_path / "jobs" / "41_2_submitted.pkl").function
    assert "--seed=3" in pickled.arguments


def test_submit__only_what_has_no_id(tmp_path, chain, login_node):
    first, *others = chain.jobs
    known = replace(first, tasks=(replace(first.tasks[0], job_id="7"),))
    submitted = submit(tmp_path / "jobs", replace(chain, jobs=(known, *others)))
    assert [job.job_ids for job in submitted.jobs] == [["7"], ["41"], ["42"], ["43"], ["44"]]
    assert "--dependency" not in (login_node / "41.sh").read_text()


def test_submit__a_refusal_names_what_was_submitted(tmp_path, chain, login_node):
    (login_node / "full").touch()
    with pytest.raises(ConfigError) as caught:
        submit(tmp_path / "jobs", chain)
    assert "stage2" in str(caught.value)
    assert "queue is full" in str(caught.value)
    assert str(caught.value).endswith("already submitted: 41")
    assert "\n" not in str(caught.value)
    assert read_chain(tmp_path / "jobs").jobs[0].job_ids == ["41"]


def test_submit__without_sbatch_is_one_line(tmp_path, chain, monkeypatch):
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(ConfigError, match="sbatch"):
        submit(tmp_path / "jobs", chain)
    assert not (tmp_path / "jobs").exists()


EXAMPLES = Path(__file__).resolve().parents[2] / "slurm" / "clusters"


def script(cluster, tasks=1, after=""):
    folder = Path("/runs/a/slurm")
    parameters = sbatch_parameters(cluster, "stage1", folder, after, tasks)
    return sbatch_script(folder, cluster, parameters, tasks)


def srun_of(text):
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
def test_sbatch_script__hands_over(tmp_path, monkeypatch, srun, expected):
    """With a stand-in for srun, which here also sends what Slurm sends to the batch shell."""
    (tmp_path / "srun").write_text(f"#!/bin/sh\n{srun}\n")
    (tmp_path / "srun").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    cluster = Cluster(setup=("set -e",), environment={"A": "b c; d"})
    text = script(cluster)
    (last,) = [line for line in text.splitlines() if "requeue.py" in line]
    call = f"{sys.executable} {Path(__file__).resolve().parents[2]}/slurm/requeue.py"
    assert last == f"{call} /runs/a/slurm stage1 $STATUS $ENDING"
    text = text.replace(call, 'sleep 0.1; kill -TERM $$; echo "$A:"')
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
    assert done.stdout == f"b c; d: /runs/a/slurm stage1 {expected}\n"
    assert done.returncode == 0


def test_sbatch_parameters__the_script_ends_as_the_requeue_did():
    teardown = sbatch_parameters(Cluster(), "x", Path("/a b"))["teardown"]
    lines = "\n".join(["false", *teardown]).replace(shlex.join([sys.executable]), "false #")
    assert subprocess.run(["bash", "-c", lines]).returncode == 1
