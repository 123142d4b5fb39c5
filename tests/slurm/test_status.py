"""The table tells what Slurm, the stages and the history know, and what they do not."""

import time

import pytest

from radio_distill.train.run_dir import Status, write_status
from slurm.chain import Chain, Job, Task
from slurm.requeue import Stop, append_stop
from slurm.status import print_rows, rows_of


def chain_of(*tasks, name="stage1"):
    return Chain(jobs=(Job(name=name, target="a:main", tasks=tasks),))


def know(login_node, job_id, *lines):
    (login_node / f"job-{job_id}").write_text("".join(f"{line}\n" for line in lines))


def test_rows_of__a_running_stage(tmp_path, login_node, capsys):
    status = Status(
        state="running", step=50, steps=200, images_per_second=12.34, seconds_left=3661,
        time=time.time() - 65,
    )  # fmt: skip
    write_status(tmp_path / "stage1", status)
    know(login_node, "41", "JobId=41 JobState=RUNNING Reason=None Restarts=1 NodeList=n[1-2]")
    stop = Stop(
        name="stage1", job="41", restart=0, kind="retry", reason="rank 3: killed", excluded=("n7",)
    )
    append_stop(tmp_path, stop)
    chain = chain_of(Task(job_id="41", stage_folder=str(tmp_path / "stage1")))
    rows = rows_of(tmp_path, chain)
    assert rows[0].alive
    assert not rows[0].complete
    print_rows(rows)
    line = " ".join(capsys.readouterr().out.splitlines()[1].split())
    assert line == (
        "stage1 41 RUNNING on n[1-2] 50 of 200 12.3 1:01:01 1:05 ago 1 rank 3: killed; keeps off n7"
    )


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Resources", "PENDING waits for free nodes"),
        ("Dependency", "PENDING waits for the job before"),
        ("None", "PENDING"),
        ("SomethingNew", "PENDING SomethingNew"),
    ],
)
def test_rows_of__why_a_job_waits(tmp_path, login_node, reason, words):
    know(login_node, "41", f"JobId=41 JobState=PENDING Reason={reason} Restarts=0")
    (row,) = rows_of(tmp_path, chain_of(Task(job_id="41")))
    assert f"{row.state} {row.detail}".strip() == words
    assert row.alive


def test_rows_of__tasks_of_an_array(tmp_path, login_node):
    know(
        login_node,
        "41",
        "JobId=41 ArrayJobId=41 ArrayTaskId=2-3,7%2 JobState=PENDING Reason=JobArrayTaskLimit",
        "JobId=43 ArrayJobId=41 ArrayTaskId=1 JobState=RUNNING Reason=None NodeList=n2 Restarts=0",
        "JobId=42 ArrayJobId=41 ArrayTaskId=0 JobState=COMPLETED Reason=None Restarts=3",
    )
    tasks = [Task(label=f"t{index}", job_id=f"41_{index}") for index in range(4)]
    rows = rows_of(tmp_path, chain_of(*tasks))
    assert [row.name for row in rows] == [f"stage1 t{index}" for index in range(4)]
    assert [row.state for row in rows] == ["COMPLETED", "RUNNING", "PENDING", "PENDING"]
    assert [row.alive for row in rows] == [False, True, True, True]
    assert [row.restarts for row in rows][:2] == [3, 0]


def test_rows_of__what_slurm_has_forgotten(tmp_path, login_node, capsys):
    append_stop(tmp_path, Stop(name="a", job="41", restart=0, kind="done", reason="complete"))
    tasks = [Task(label="a", job_id="41"), Task(label="b", job_id="42"), Task(label="c")]
    rows = rows_of(tmp_path, chain_of(*tasks))
    assert [row.complete for row in rows] == [True, False, False]
    assert not any(row.alive for row in rows)
    print_rows(rows)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [
        "stage1 a 41 complete complete",
        "stage1 b 42 unknown to Slurm",
        "stage1 c unknown to Slurm",
    ]


def test_rows_of__accounting_knows_longer(tmp_path, login_node):
    (login_node / "sacct").write_text("#!/bin/sh\necho 'CANCELLED by 0'\n")
    (login_node / "sacct").chmod(0o700)
    (row,) = rows_of(tmp_path, chain_of(Task(job_id="41")))
    assert (row.state, row.alive) == ("CANCELLED", False)
