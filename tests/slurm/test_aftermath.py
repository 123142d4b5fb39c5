"""The end of a batch script: reads what happened, decides, and asks Slurm for it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from radio_distill.train.run_dir import Status, write_status
from slurm import history, outcomes
from slurm.aftermath import main, reached_step
from slurm.chain import Chain, Link, Task, private_folder, read_chain, write_chain
from slurm.cluster import Cluster
from slurm.commands import SlurmError
from slurm.outcomes import Outcome, Place

JOB = "JobId=41 JobState={state} Reason={reason} Restarts={restarts} Partition=low NumNodes=1 "
JOB += "ExcNodeList=(null)"


@pytest.fixture
def folder(tmp_path, slurm_task, login_node) -> Path:
    """The folder of a chain with one job of one process, which has reached step 7."""
    slurm_task()
    folder = private_folder(tmp_path / "slurm")
    stage = tmp_path / "stage1"
    (stage / "checkpoints" / "step-00000007").mkdir(parents=True)
    (stage / "checkpoints" / ".step-00000009.tmp").mkdir()
    task = Task(job_id="41", stage_folder=str(stage))
    link = Link(name="stage1", target="a:main", tasks=(task,))
    write_chain(folder, Chain(links=(link,), cluster=Cluster(gpus_per_node=0, max_retries=1)))
    know(login_node)
    return folder


def know(login_node: Path, state="RUNNING", reason="None", restarts=0) -> None:
    (login_node / "job-41").write_text(JOB.format(state=state, reason=reason, restarts=restarts))


def ended(folder: Path, status: int, **more) -> None:
    outcome = Outcome(rank=0, host="n1", process=1, started=1.0)
    outcomes.end(folder, Place(job="41"), outcome, status, **more)


def aftermath(folder: Path, *flags: str, status: str = "0") -> tuple[int, history.Stop]:
    result = main([str(folder), "stage1", status, *flags])
    return result, history.read(folder)[-1]


def changes(login_node: Path) -> list[str]:
    """What Slurm was asked to change."""
    lines = (login_node / "calls").read_text().splitlines()
    return [line for line in lines if line.startswith(("requeue", "update"))]


def test_main__a_job_that_is_done(folder, login_node):
    ended(folder, 0)
    status, stop = aftermath(folder)
    assert (status, stop.kind, stop.step) == (0, "done", 7)
    assert changes(login_node) == []


def test_main__a_job_that_has_saved_queues_again(folder, login_node):
    ended(folder, 75, signal=12)
    status, stop = aftermath(folder)
    assert (status, stop.kind, stop.reason) == (1, "requeue", "saved after SIGUSR2")
    assert changes(login_node) == ["requeue 41"]


def test_main__a_crash_is_tried_again_off_its_node_and_not_for_ever(folder, login_node):
    ended(folder, -9)
    status, stop = aftermath(folder, status="137")
    assert (status, stop.kind, stop.excluded) == (1, "retry", ("n1",))
    assert changes(login_node) == ["requeue 41", "update JobId=41 ExcNodeList=n1"]
    status, stop = aftermath(folder, status="137")
    assert (status, stop.kind) == (1, "failed")
    assert len(changes(login_node)) == 2


def test_main__asks_for_a_task_of_an_array_by_its_place(folder, login_node, slurm_task):
    """The number of an array's last task is the array's own: it would requeue all of them."""
    slurm_task(SLURM_JOB_ID="41", SLURM_ARRAY_JOB_ID="41", SLURM_ARRAY_TASK_ID="0")
    chain = read_chain(folder)
    (task,) = chain.links[0].tasks
    link = replace(chain.links[0], tasks=(replace(task, job_id="41_0"),))
    write_chain(folder, chain.with_link(link))
    assert aftermath(folder)[1].job == "41_0"
    assert changes(login_node) == ["requeue 41_0"]


def test_main__keeps_a_node_that_the_job_cannot_do_without(folder, login_node):
    (login_node / "nodes").write_text("n1 idle\nn2 down\n")
    ended(folder, -9)
    assert aftermath(folder)[1].excluded == ()
    assert changes(login_node) == ["requeue 41"]


def test_main__an_error_of_the_user_carries_what_the_stage_said(folder, login_node, tmp_path):
    write_status(tmp_path / "stage1", Status(state="failed", step=9, steps=20, reason="no disk"))
    ended(folder, 2, reason="ended with status 2")
    status, stop = aftermath(folder, status="2")
    assert (status, stop.kind, stop.step) == (1, "failed", 9)
    assert stop.reason == "rank 0 on n1: ended with status 2: no disk"
    assert changes(login_node) == []


def test_main__an_error_of_the_user_is_read_from_the_log(folder, tmp_path):
    log = tmp_path / "log.err"
    log.write_text(
        "radio-distill: an earlier one\nradio-distill: stages.x: no such field\n\xff\n"
        "radio-distill: stage1: retry: rank 0\n"
    )
    outcome = Outcome(rank=0, host="n1", process=1, started=1.0, log=str(log))
    outcomes.end(folder, Place(job="41"), outcome, 2)
    assert aftermath(folder)[1].reason == "rank 0 on n1: stages.x: no such field"
    log.unlink()
    assert aftermath(folder)[1].reason == f"rank 0 on n1: ended with status 2; see {log}"


@pytest.mark.parametrize(
    ("known", "flags"),
    [
        ({"state": "COMPLETING"}, []),
        ({}, ["--ending"]),
        ({"state": "COMPLETING", "restarts": 1}, ["--ending"]),
        ({"restarts": 1}, []),
    ],
)
def test_main__what_slurm_ends_or_has_restarted_is_left_alone(folder, login_node, known, flags):
    know(login_node, **known)
    ended(folder, 75, signal=15)
    status, stop = aftermath(folder, *flags)
    assert (status, stop.kind) == (1, "left")
    assert changes(login_node) == []


def test_main__queues_again_at_the_time_limit(folder, login_node):
    know(login_node, state="COMPLETING", reason="TimeLimit")
    status, stop = aftermath(folder, "--ending")
    assert (status, stop.kind, stop.reason) == (1, "requeue", "reached its time limit")
    assert changes(login_node) == ["requeue 41"]


def test_main__notes_a_requeue_that_slurm_refused(folder, login_node):
    ended(folder, 75, signal=12)
    text = (login_node / "scontrol").read_text()
    refusal = 'case "$*" in requeue*) echo "Job is too old" >&2; exit 1;; esac\n'
    (login_node / "scontrol").write_text(text.replace("case", refusal + "case", 1))
    with pytest.raises(SlurmError):
        aftermath(folder)
    stop = history.read(folder)[-1]
    assert stop.kind == "failed"
    assert "Job is too old" in stop.reason


def test_main__without_an_answer_it_still_decides(folder, login_node, capsys):
    (login_node / "scontrol").write_text("#!/bin/sh\necho down >&2; exit 1\n")
    ended(folder, 0)
    assert aftermath(folder)[0] == 0
    assert "scontrol" in capsys.readouterr().err


def test_main__is_a_script_that_a_foreign_folder_does_not_disturb(folder, tmp_path):
    foreign = tmp_path / "foreign"
    (foreign / "slurm").mkdir(parents=True)
    (foreign / "slurm" / "__init__.py").write_text("raise SystemExit('a foreign slurm was run')")
    ended(folder, 0)
    script = Path(__file__).resolve().parents[2] / "slurm" / "aftermath.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder), "stage1", "0"],
        cwd=foreign,
        env=dict(os.environ),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "radio-distill: stage1: done: complete\n")


def test_reached_step__of_whole_checkpoints_and_the_status(tmp_path, folder):
    assert reached_step(tmp_path / "stage1") == 7
    write_status(tmp_path / "stage1", Status(state="running", step=12, steps=20))
    assert reached_step(tmp_path / "stage1") == 12
    assert reached_step(tmp_path / "none") == 0
