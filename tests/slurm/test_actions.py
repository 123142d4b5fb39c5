"""``radio-distill slurm``: submits once, and looks after what it submitted."""

import shlex
import sys
from pathlib import Path

import pytest

from radio_distill.train.run_dir import Status, write_status
from radio_distill.train.stage_folders import write_stages
from slurm.chain import read_chain
from slurm.requeue import Stop, append_stop
from stages.cli import main as cli


@pytest.fixture(autouse=True)
def _prepared(monkeypatch):
    """Leave out what is looked at before; test_submission.py has that."""
    monkeypatch.setattr("stages.commands.submission.prepare", lambda request, *_: request)


def slurm(*arguments):
    return cli(["slurm", *map(str, arguments)])


@pytest.fixture
def run(tmp_path):
    return tmp_path / "runs" / "tiny"


def know(login_node, job_id, state, **fields):
    """Let the stand-in for scontrol know a job."""
    items = {"JobId": job_id, "JobState": state, "Reason": "None", "Restarts": "0", **fields}
    text = " ".join(f"{key}={value}" for key, value in items.items())
    (login_node / f"job-{job_id}").write_text(text + "\n")


def test_dry_run__scripts_say_all_without_a_cluster(tmp_path, recipe, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    flags = ["--partition", "gpu", "--gpus-per-node", "8", "--cpus-per-task", "6"]
    assert slurm(recipe, *flags, "--dry-run", "--resume", "--stages.stage2.steps", "7") == 0
    text = capsys.readouterr().out
    call = f"stages.cli:main train {recipe} --stages stage1 --stages.stage2.steps=7 --resume"
    assert f"# ---- stage1: {call}\n" in text
    assert text.count("#SBATCH --ntasks-per-node=8\n") == 3
    assert text.count("#SBATCH --ntasks-per-node=1\n") == 2
    assert "#SBATCH --dependency=afterok:EXPORT_JOB_ID\n" in text
    assert f"{shlex.quote(sys.executable)} -u -m submitit.core._submit" in text
    assert not (tmp_path / "runs").exists()


def test_dry_run__takes_flags_file_and_overrides(tmp_path, recipe, capsys):
    (tmp_path / "cluster.yaml").write_text("partition: slow\naccount: mine\n")
    flags = ["--cluster", tmp_path / "cluster.yaml", "--partition", "fast", "--no-eval"]
    assert slurm(recipe, *flags, "--stages", "stage3", "--dry-run", "--stage.steps=9") == 0
    text = capsys.readouterr().out
    assert "#SBATCH --partition=fast\n" in text
    assert "#SBATCH --account=mine\n" in text
    assert "--stages.stage3.steps=9" in text
    assert "# ---- export" in text
    assert "# ---- eval" not in text
    assert "stage1" not in text


def test_dry_run__recipe_by_name(tmp_path, capsys):
    assert slurm("demo", "--dry-run", "--output", tmp_path) == 0
    text = capsys.readouterr().out
    recipe = Path(__file__).resolve().parents[2] / "radio_distill/config/recipes/demo.yaml"
    assert f"train {shlex.quote(str(recipe))} --stages stage1 --output={tmp_path}" in text
    assert f"#SBATCH --output={tmp_path / 'demo' / 'slurm'}/%j_0_log.out" in text


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--partion", "x"], "unknown argument '--partion' (did you mean '--partition'?)"),
        (["--cluster", "none.yaml"], "none.yaml"),
        (["--stages", "stage9"], "has no stage9"),
        (["--launcher", "mpirun"], "'mpirun' is not one of srun, torchrun, accelerate"),
    ],
)
def test_submit__bad_input_is_one_line_before_anything_is_submitted(
    recipe, login_node, capsys, extra, message
):
    assert slurm(recipe, *extra) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(login_node.glob("*.sh"))


def test_submit__a_word_that_is_no_action(recipe, capsys):
    assert slurm("statsu", recipe) == 2
    assert "only status, cancel and resume take a run folder (did you mean 'status'?)" in (
        capsys.readouterr().err
    )
    assert slurm("status") == 2
    assert "radio-distill slurm status RUN" in capsys.readouterr().err


def test_submit__reports_the_chain(recipe, run, login_node, capsys):
    assert slurm(recipe, "--partition", "gpu") == 0
    assert capsys.readouterr().out == (
        "jobs: stage1 41 -> stage2 42 -> stage3 43 -> export 44 -> eval 45\n"
        f"`radio-distill slurm status {run}` shows how they are doing\n"
    )


def test_submit__refuses_a_second_chain_while_the_first_is_alive(recipe, run, login_node, capsys):
    assert slurm(recipe) == 0
    know(login_node, "42", "PENDING")
    capsys.readouterr()
    assert slurm(recipe) == 2
    error = capsys.readouterr().err
    assert "(stage2 42)" in error
    assert f"radio-distill slurm cancel {run}" in error
    know(login_node, "42", "CANCELLED")
    assert slurm(recipe) == 0


def test_submit__runs_here_too(tmp_path, recipe, recorded, monkeypatch, capsys):
    monkeypatch.setattr("stages.commands.train.run", lambda arguments: 0)
    flags = ["--executor", "debug", "--stages", "stage1", "--gpus-per-node", "0"]
    assert slurm(recipe, *flags) == 0
    assert "debug executor: waiting for stage1" in capsys.readouterr().out


def test_status__of_a_run(recipe, run, login_node, capsys):
    slurm(recipe)
    know(login_node, "41", "RUNNING", NodeList="n1", Restarts="2")
    know(login_node, "42", "PENDING", Reason="Dependency")
    capsys.readouterr()
    assert slurm("status", run) == 0
    heading, first, second, *_ = capsys.readouterr().out.splitlines()
    lines = [" ".join(line.split()) for line in (heading, first, second)]
    assert lines == [
        "job id Slurm step img/s ETA last sign restarts last stop",
        "stage1 41 RUNNING on n1 2",
        "stage2 42 PENDING waits for the job before 0",
    ]


def test_status__of_a_folder_without_a_chain(tmp_path, capsys):
    assert slurm("status", tmp_path) == 2
    assert "radio-distill slurm RECIPE" in capsys.readouterr().err


def test_cancel__what_is_not_over_from_the_end(recipe, run, login_node, capsys):
    slurm(recipe)
    for job_id, state in (("41", "COMPLETED"), ("42", "RUNNING"), ("43", "PENDING")):
        know(login_node, job_id, state)
    assert slurm("cancel", run) == 0
    assert "cancelled: stage2 42, stage3 43" in capsys.readouterr().out
    assert (login_node / "calls").read_text().splitlines()[-1] == "scancel 43 42"
    for job_id in ("42", "43"):
        know(login_node, job_id, "CANCELLED")
    assert slurm("cancel", run) == 0
    assert "no job" in capsys.readouterr().out


def test_resume__submits_what_is_not_complete(recipe, run, login_node, capsys):
    slurm(recipe, "--partition", "gpu", "--nodes", "2")
    stop = Stop(name="stage1", job="41", restart=0, kind="done", reason="complete")
    append_stop(run / "slurm", stop)
    know(login_node, "42", "RUNNING")
    assert slurm("resume", run) == 2
    assert "(stage2 42)" in capsys.readouterr().err
    know(login_node, "42", "FAILED")
    assert slurm("resume", run, "--nodes", "3") == 0
    assert "jobs: stage1 41 -> stage2 46 -> stage3 47" in capsys.readouterr().out
    text = (login_node / "46.sh").read_text()
    assert "#SBATCH --partition=gpu\n" in text
    assert "#SBATCH --nodes=3\n" in text
    assert "--dependency" not in text
    chain = read_chain(run / "slurm")
    assert chain.cluster.nodes == 3
    assert chain.jobs[1].tasks[0].arguments[-1] == "--resume"


def test_resume__nothing_where_all_is_complete(recipe, run, login_node, capsys):
    slurm(recipe, "--stages", "stage1")
    stop = Stop(name="stage1", job="41", restart=0, kind="done", reason="complete")
    append_stop(run / "slurm", stop)
    assert slurm("resume", run) == 0
    assert "complete" in capsys.readouterr().out
    assert not (login_node / "42.sh").exists()


def test_help__explains_it_all(capsys):
    with pytest.raises(SystemExit):
        cli(["slurm", "--help"])
    text = capsys.readouterr().out
    for word in ("status RUN", "cancel RUN", "resume RUN", "--upsamplers", "--launcher", "--sweep"):
        assert word in text


def test_status__of_jobs_that_ran_on_this_machine(recipe, run, recorded, monkeypatch, capsys):
    """There is no Slurm: what is known comes from the stages' own files."""
    monkeypatch.setattr("stages.commands.train.run", lambda arguments: 0)
    flags = ["--executor", "debug", "--stages", "stage1", "--gpus-per-node", "0"]
    assert slurm(recipe, *flags) == 0
    for folder in ("stage1", "stage1.1", "proxy", "a.b-tile"):
        (run / folder).mkdir(parents=True, exist_ok=True)
    write_stages(run, ["stage1", "proxy", "a.b"])
    capsys.readouterr()
    assert slurm("status", run) == 0
    assert "no stage" in capsys.readouterr().out
    write_status(run / "stage1", Status(state="complete", step=6, steps=6))
    write_status(run / "stage1.1", Status(state="failed", step=2, steps=6))
    running = Status(state="running", step=3, steps=4, images_per_second=8.0, seconds_left=60)
    write_status(run / "proxy", running)
    failed = Status(state="failed", step=1, steps=4, reason="out of memory")
    write_status(run / "a.b-tile", failed)
    assert slurm("status", run) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{run} has no jobs in Slurm (its jobs run on this machine")
    lines = [" ".join(line.split()) for line in lines]
    assert lines[0].split()[:3] == ["job", "id", "state"]
    assert lines[1].startswith("stage1 complete 6 of 6")
    assert lines[2].startswith("proxy running 3 of 4 8.0 1:00")
    assert lines[3].startswith("a.b-tile failed out of memory 1 of 4")
    assert len(lines) == 4


def test_status__of_a_run_that_was_only_trained(tmp_path, capsys):
    (tmp_path / "stage1").mkdir()
    write_status(tmp_path / "stage1", Status(state="complete", step=6, steps=6))
    assert slurm("status", tmp_path) == 0
    assert "nothing was submitted" in capsys.readouterr().out
