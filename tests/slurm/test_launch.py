"""A chain runs in order, stops at a failure, and is what ``--dry-run`` said."""

import os
import shlex
import stat
import sys
from pathlib import Path

import pytest
from submitit.helpers import DelayedSubmission

from radio_distill.errors import ConfigError, RadioDistillError
from slurm.cluster import Cluster
from slurm.job import Job
from slurm.launch import dry_run, main, submit_chain, submit_jobs

STAGES = ["stage1", "stage2", "stage3"]


def recording(folder: Path, *functions: str) -> dict[str, Job]:
    return {
        stage: Job(f"recording_stage:{function}", (str(folder), stage))
        for stage, function in zip(STAGES, functions, strict=True)
    }


@pytest.fixture
def login_node(tmp_path, monkeypatch) -> Path:
    """A folder first on the path, with an sbatch that counts from 41 and keeps the scripts."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(
        f"""#!/bin/sh
        [ -e {folder}/full ] && [ -e {folder}/41.sh ] && echo "error: queue is full" >&2 && exit 1
        number=$((41 + $(ls {folder} | grep -c sh$)))
        cp "$1" {folder}/$number.sh
        echo Submitted batch job $number
        """
    )
    for name in ("sbatch", "srun"):
        (folder / name).touch()
        (folder / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.mark.parametrize("executor", ["local", "debug"])
def test_submit_jobs__stages_run_one_after_another(tmp_path, recorded, capsys, executor):
    jobs = recording(tmp_path, "main", "main", "main")
    ids = submit_jobs(jobs, Cluster(gpus_per_node=0), executor, tmp_path / "jobs")
    calls = recorded()
    assert [call["arguments"][0] for call in calls] == STAGES
    assert [call["RANK"] for call in calls] == ["0"] * 3
    assert len(set(ids)) == 3
    assert capsys.readouterr().out.count(f"{executor} executor: waiting for") == 3
    assert "RANK" not in os.environ


def test_submit_jobs__nothing_starts_after_a_failure(tmp_path, recorded):
    jobs = recording(tmp_path, "main", "failing", "main")
    with pytest.raises(RadioDistillError, match=r"stage2 \(job .*_log\.err") as caught:
        submit_jobs(jobs, Cluster(), "local", tmp_path / "jobs")
    assert "\n" not in str(caught.value)
    assert [call["arguments"][0] for call in recorded()] == ["stage1", "stage2"]


def test_submit_jobs__two_nodes_are_too_many_for_one_machine(tmp_path):
    with pytest.raises(ConfigError, match=r"stage1 could not be submitted: .*nodes=1"):
        submit_jobs(
            recording(tmp_path, *["main"] * 3), Cluster(nodes=2), "local", tmp_path / "jobs"
        )


def test_submit_chain__slurm_jobs_depend_on_each_other(tmp_path, recipe, login_node):
    cluster = Cluster(partition="gpu", nodes=2, gpus_per_node=8)
    ids = submit_chain(recipe, (), cluster, ["seed=3"])
    assert ids == ["41", "42", "43"]
    scripts = [(login_node / f"{number}.sh").read_text() for number in ids]
    assert "--dependency" not in scripts[0]
    assert "#SBATCH --dependency=afterok:41\n" in scripts[1]
    assert "#SBATCH --dependency=afterok:42\n" in scripts[2]
    folder = tmp_path / "runs" / "tiny" / "slurm"
    pickled = DelayedSubmission.load(folder / "42_submitted.pkl")
    assert pickled.function == Job("stages.stage2:main", ("--recipe", str(recipe), "--seed=3"))


def test_submit_chain__its_scripts_are_those_of_the_dry_run(recipe, login_node):
    cluster = Cluster(nodes=2, gpus_per_node=8, setup=("module load cuda",), sbatch={"wckey": "a"})
    planned = dry_run(recipe, (), cluster)
    submit_chain(recipe, (), cluster)
    for number, text in zip((41, 42, 43), planned, strict=True):
        script = text.split("\n", 1)[1]
        for stage, known in (("STAGE1", "41"), ("STAGE2", "42")):
            script = script.replace(f"{stage}_JOB_ID", known)
        assert (login_node / f"{number}.sh").read_text() == script


def test_submit_chain__job_files_are_private(tmp_path, recipe, login_node):
    submit_chain(recipe, ["stage1"], Cluster(), folder=tmp_path / "jobs")
    assert stat.S_IMODE((tmp_path / "jobs").stat().st_mode) == 0o700
    (tmp_path / "jobs").chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        submit_chain(recipe, ["stage1"], Cluster(), folder=tmp_path / "jobs")


def test_submit_chain__refusal_names_what_was_submitted(recipe, login_node):
    (login_node / "full").touch()
    with pytest.raises(ConfigError) as caught:
        submit_chain(recipe, (), Cluster())
    assert "stage2 could not be submitted" in str(caught.value)
    assert "queue is full" in str(caught.value)
    assert str(caught.value).endswith("already submitted: 41")
    assert "\n" not in str(caught.value)


def test_submit_chain__without_sbatch_is_one_line(tmp_path, recipe, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is not on the path"):
        submit_chain(recipe, (), Cluster())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("stages", "overrides", "message"),
    [
        (["stage4"], [], "has no stage4"),
        ([], ["sead=3"], "unknown field 'sead' (did you mean 'seed'?)"),
        (["stage1"], ["stage.stepz=3"], "did you mean 'steps'?"),
    ],
)
def test_submit_chain__bad_input_before_anything_is_submitted(
    recipe, login_node, stages, overrides, message
):
    with pytest.raises(ConfigError) as caught:
        submit_chain(recipe, stages, Cluster(), overrides)
    assert message in str(caught.value)
    assert not list(login_node.glob("*.sh"))


def test_submit_chain__unknown_executor(recipe):
    with pytest.raises(ConfigError, match="did you mean 'local'"):
        submit_chain(recipe, (), Cluster(), executor="locl")


def test_dry_run__scripts_say_all_without_a_cluster(tmp_path, recipe, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    cluster = Cluster(partition="gpu", gpus_per_node=8, cpus_per_task=6, memory_gb=200)
    first, second, third = dry_run(recipe, (), cluster, ["stages.stage2.steps=7"], resume=True)
    assert f"stage1: stages.stage1:main --recipe {recipe} --stages.stage2.steps=7 --resume" in first
    for line in ("partition=gpu", "gpus-per-node=8", "ntasks-per-node=8", "mem=200GB", "requeue"):
        assert f"#SBATCH --{line}\n" in first
    assert "#SBATCH --signal=USR2@300\n" in first
    assert "dependency" not in first
    assert "#SBATCH --dependency=afterok:STAGE1_JOB_ID\n" in second
    assert "#SBATCH --dependency=afterok:STAGE2_JOB_ID\n" in third
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in third
    command = next(line for line in first.splitlines() if line.startswith("srun"))
    assert "--cpus-per-task=6" in command
    assert f"{shlex.quote(sys.executable)} -u -m submitit.core._submit" in command
    assert not (tmp_path / "runs").exists()


def test_main__dry_run_takes_flags_file_and_overrides(tmp_path, recipe, capsys):
    (tmp_path / "cluster.yaml").write_text("partition: slow\naccount: mine\n")
    flags = ["--cluster", str(tmp_path / "cluster.yaml"), "--partition", "fast", "--nodes", "4"]
    status = main([str(recipe), *flags, "--stages", "stage3", "--dry-run", "--stage.steps=9"])
    text = capsys.readouterr().out
    assert status == 0
    assert "#SBATCH --partition=fast\n" in text
    assert "#SBATCH --account=mine\n" in text
    assert "#SBATCH --nodes=4\n" in text
    assert "--stage.steps=9" in text
    assert "stage1" not in text


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--partion", "x"], "unknown argument '--partion' (did you mean '--partition'?)"),
        (["--partion=x"], "unknown field 'partion'"),
        (["--cluster", "none.yaml"], "none.yaml"),
        (["--stages", "stage9"], "has no stage9"),
    ],
)
def test_main__bad_input_is_one_line(recipe, capsys, extra, message):
    assert main([str(recipe), "--dry-run", *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_main__recipe_by_name(tmp_path, capsys):
    assert main(["demo", "--dry-run", "--output", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    recipe = Path(__file__).resolve().parents[2] / "stages" / "recipes" / "demo.yaml"
    assert f"--recipe {shlex.quote(str(recipe))} --output={tmp_path}" in text
    assert f"#SBATCH --output={tmp_path / 'demo' / 'slurm'}/%j_0_log.out" in text


def test_main__unknown_recipe_lists_the_nearest(capsys):
    assert main(["demoo", "--dry-run"]) == 2
    assert capsys.readouterr().err == "radio-distill: no recipe 'demoo' (did you mean 'demo'?)\n"


def test_main__reports_the_chain(recipe, login_node, capsys):
    assert main([str(recipe), "--partition", "gpu"]) == 0
    assert capsys.readouterr().out == "jobs: 41 -> 42 -> 43\n"
