"""What becomes of a job follows from how its processes ended, and never loops for ever.

Outcomes survive what may happen around a process; the end of a batch script reads them, decides,
and asks Slurm for it.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radio_distill.train.run_dir import Status, write_status
from slurm.chain import Chain, Job, Task, private_folder, read_chain, write_chain
from slurm.cluster import Cluster
from slurm.requeue import (
    Ending,
    Outcome,
    Start,
    Stop,
    append_stop,
    cause_of,
    decide,
    exclusion,
    main,
    note_end,
    note_start,
    reached_step,
    read_outcomes,
    read_stops,
)
from slurm.scontrol import SlurmError

START = Start(job="41_2", restart=3, host="n1")


def test_start__of_a_task_of_an_array_that_was_restarted():
    environment = {
        "SLURM_JOB_ID": "43",
        "SLURM_ARRAY_JOB_ID": "41",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_RESTART_COUNT": "3",
        "SLURMD_NODENAME": "n1",
    }
    assert Start.of(environment) == START
    assert Start.of({"SLURM_JOB_ID": "41"}).job == "41"
    assert Start.of({"SLURM_JOB_ID": "41"}).restart == 0


def test_read_outcomes__a_start_without_an_end(tmp_path):
    note_start(tmp_path, START, rank=5)
    (found,) = read_outcomes(tmp_path, START)
    assert (found.rank, found.host, found.status) == (5, "n1", None)
    assert not found.killed


def test_read_outcomes__the_end_with_its_reason_in_one_line(tmp_path):
    outcome = note_start(tmp_path, START, rank=0)
    note_end(tmp_path, START, outcome, 75, "saved\n  it", 12)
    (found,) = read_outcomes(tmp_path, START)
    assert (found.status, found.signal, found.reason) == (75, 12, "saved it")
    assert found.ended >= found.started
    assert Outcome(rank=0, host="", process=1, started=0, status=-9).killed


def test_read_outcomes__only_this_start_of_this_job(tmp_path):
    for place in (START, Start(job="41_2", restart=2), Start(job="41", restart=3)):
        note_start(tmp_path, place, rank=0)
    assert [outcome.host for outcome in read_outcomes(tmp_path, START)] == ["n1"]


def test_read_outcomes__by_rank_and_without_damaged_ones(tmp_path):
    for rank in (10, 2, 1):
        note_start(tmp_path, START, rank)
    (tmp_path / "outcomes" / "41_2-3-1.json").write_text('{"rank": 1, "ho')
    (tmp_path / "outcomes" / "41_2-3-7.json").write_text("[]")
    assert [outcome.rank for outcome in read_outcomes(tmp_path, START)] == [2, 10]
    assert read_outcomes(tmp_path / "none", START) == []


def test_note_start__a_folder_that_cannot_be_written_ends_nothing(tmp_path, caplog):
    (tmp_path / "outcomes").touch()
    note_start(tmp_path, START, rank=0)
    assert "cannot write" in caplog.text


def test_read_stops__gives_back_what_was_appended(tmp_path):
    stops = [
        Stop(
            name="stage1", job="41", restart=0, kind="retry", reason="a", step=3, excluded=("n1",)
        ),
        Stop(name="stage1", job="41", restart=1, kind="done", reason="b"),
    ]
    for stop in stops:
        append_stop(tmp_path, stop)
    assert read_stops(tmp_path) == stops


def test_read_stops__passes_over_a_line_that_was_cut_short(tmp_path):
    stop = Stop(name="stage1", job="41", restart=0, kind="done", reason="complete")
    append_stop(tmp_path, stop)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"name": "stage2", "jo')
    assert read_stops(tmp_path) == [stop]
    assert read_stops(tmp_path / "none") == []


def outcome(rank=0, status=0, host="", **more):
    more = {"ended": 100.0 if status is not None else 0.0, **more}
    host = host or f"n{rank + 1}"
    return Outcome(rank=rank, host=host, process=1, started=1.0, status=status, **more)


def ending(*statuses, **more):
    outcomes = [outcome(rank, status) for rank, status in enumerate(statuses)]
    return Ending(outcomes=outcomes, processes=more.pop("processes", len(statuses)), **more)


def stop(kind, step=None):
    return Stop(name="stage1", job="41", restart=0, kind=kind, reason="", step=step)


def decided(end, max_requeues=30, max_retries=3):
    return decide(end, max_requeues, max_retries)


def saved(*statuses, signal):
    end = ending(*statuses)
    return replace(end, outcomes=[replace(one, signal=signal) for one in end.outcomes])


@pytest.mark.parametrize(
    ("end", "kind", "words", "blamed"),
    [
        (ending(0, 0), "done", "complete", ()),
        (ending(0, 0, status=1), "done", "complete", ()),  # say the container's clean-up failed
        # Silence is not done. Nobody is blamed where nothing is known.
        (ending(0, processes=2), "retry", "1 of 2 processes ended without a word", ()),
        (ending(processes=2), "retry", "2 of 2 processes ended without a word", ()),
        (ending(0, None), "retry", "1 of 2 processes ended without a word", ("n2",)),
        (ending(None, None, status=1), "retry", "ended without a word (srun: 1)", ()),
        (saved(75, 75, signal=12), "requeue", "saved after SIGUSR2", ()),
        (saved(0, 75, signal=12), "requeue", "saved after SIGUSR2", ()),
        # With a GraceTime the processes get SIGTERM while the batch script gets nothing.
        (saved(75, signal=15), "requeue", "saved after SIGTERM", ()),
        # The time limit requeues even what did not save.
        *(
            (ending(*statuses, ending=True, time_limit=True), "requeue", "its time limit", ())
            for statuses in [(75, 75), (None, None), (1, 75)]
        ),
        # What Slurm ends or has started again is left to it.
        *(
            (ending(*statuses, ending=True, restarted=restarted), "left", "", ())
            for statuses in [(75, 75), (1, None), (2,), (None, None), (-9, 1)]
            for restarted in (False, True)
        ),
        (ending(75, restarted=True), "left", "lost node", ()),
        (ending(None, restarted=True, dead_nodes={"n1"}), "left", "n1 was lost", ()),
        (ending(76, 1), "left", "taken over", ()),
        # A crash is tried again elsewhere; an error of the user's is not.
        (ending(75, 1), "retry", "rank 1 on n2: ended with status 1", ("n2",)),
        (ending(75, -11), "retry", "rank 1 on n2: killed by SIGSEGV", ("n2",)),
        (ending(75, 70), "retry", "rank 1 on n2: no step was finished", ("n2",)),
        (ending(1, 2), "failed", "rank 1 on n2: ended with status 2", ()),
        # A node out of reach is blamed before the errors of its peers.
        (ending(1, None, dead_nodes={"n2", "n7"}), "retry", "rank 0 on n1", ("n2",)),
    ],
)
def test_decide__the_table(end, kind, words, blamed):
    decision = decided(end)
    assert (decision.kind, decision.blamed) == (kind, blamed)
    assert words in decision.reason


def test_decide__an_error_of_the_user_carries_its_reason():
    end = Ending(outcomes=[outcome(0, 1), outcome(1, 2, reason="no shards")], processes=2)
    assert decided(end).reason == "rank 1 on n2: no shards"


def test_decide__max_requeues_bounds_them():
    history = [stop("requeue", 3), stop("retry", 4), stop("requeue", 5)]
    assert decided(ending(75, history=history), max_requeues=3).kind == "requeue"
    decision = decided(ending(75, history=history), max_requeues=2)
    assert decision.kind == "failed"
    assert "max_requeues = 2 is spent" in decision.reason


def test_decide__max_retries_bounds_them():
    history = [stop("retry", step) for step in (1, 5, 9)]
    assert decided(ending(1, step=12, history=history), max_retries=4).kind == "retry"
    decision = decided(ending(1, step=12, history=history), max_retries=3)
    assert decision.kind == "failed"
    assert "max_retries = 3 is spent" in decision.reason
    assert decided(ending(1, step=12), max_retries=0).kind == "failed"


@pytest.mark.parametrize(("step", "kind"), [(5, "failed"), (4, "failed"), (6, "retry")])
def test_decide__a_crash_at_the_same_step_is_final(step, kind):
    history = [stop("retry", 5), stop("requeue", 5)]
    assert decided(ending(1, step=step, history=history)).kind == kind


def test_decide__a_job_without_steps_is_tried_once_more():
    assert decided(ending(1)).kind == "retry"
    assert decided(ending(1, history=[stop("retry")])).kind == "failed"


def test_cause_of__a_kill_comes_before_the_errors_that_follow_from_it():
    peers = outcome(0, 1, ended=100.0)
    assert cause_of([peers, outcome(1, -9, ended=101.0)]).rank == 1
    # A launcher that waits in vain for hung peers kills them half a minute after the cause.
    assert cause_of([peers, outcome(1, -9, ended=130.0)]).rank == 0


def test_cause_of__the_first_of_several_errors():
    assert cause_of([outcome(0, 1, ended=5.0), outcome(1, 1, ended=4.0), outcome(2, 75)]).rank == 1
    assert cause_of([outcome(0, 0), outcome(1, 75), outcome(2, None)]) is None


@given(
    st.lists(st.sampled_from([None, 0, 1, 2, 70, 75, 76, -9, -15]), max_size=4),
    st.integers(1, 4),
    st.integers(0, 4),
    st.integers(0, 4),
    st.lists(st.integers(0, 30), min_size=1, max_size=40),
)
def test_decide__a_job_that_always_ends_alike_is_started_a_bounded_number_of_times(
    statuses, processes, max_requeues, max_retries, steps
):
    history: list[Stop] = []
    for step in steps:
        end = ending(*statuses, processes=processes, step=step, history=history)
        decision = decided(end, max_requeues, max_retries)
        if decision.kind not in ("requeue", "retry"):
            break
        history.append(stop(decision.kind, step))
    assert len(history) <= max(max_requeues, max_retries)
    assert decision.kind != "done" or statuses.count(0) == len(statuses) >= processes
    crashes = [item.step for item in history if item.kind == "retry"]
    assert crashes == sorted(set(crashes))


@pytest.mark.parametrize(
    ("blamed", "excluded", "usable", "nodes", "expected"),
    [
        (["a"], [], "abc", 2, ("a",)),
        (["a"], [], "ab", 2, ()),  # one too few would be left
        (["b"], ["a"], "abc", 1, ("a", "b")),
        (["b"], ["a"], "abc", 2, ("a",)),
        (["a"], ["a"], "abc", 1, ("a",)),
        (["a", "b"], [], "abcd", 3, ("a",)),
        (["x"], [], "ab", 2, ("x",)),  # a node that is down already costs nothing
        ([], ["a"], "abc", 1, ("a",)),
    ],
)
def test_exclusion__spares_enough_nodes(blamed, excluded, usable, nodes, expected):
    assert exclusion(blamed, excluded, set(usable), nodes) == expected


JOB = "JobId=41 JobState={state} Reason={reason} Restarts={restarts} Partition=low NumNodes=1 "
JOB += "ExcNodeList=(null)"


@pytest.fixture
def folder(tmp_path, slurm_task, login_node):
    """The folder of a chain with one job of one process, which has reached step 7."""
    slurm_task()
    folder = private_folder(tmp_path / "slurm")
    stage = tmp_path / "stage1"
    (stage / "checkpoints" / "step-00000007").mkdir(parents=True)
    (stage / "checkpoints" / ".step-00000009.tmp").mkdir()
    task = Task(job_id="41", stage_folder=str(stage))
    job = Job(name="stage1", target="a:main", tasks=(task,))
    write_chain(folder, Chain(jobs=(job,), cluster=Cluster(gpus_per_node=0, max_retries=1)))
    know(login_node)
    return folder


def know(login_node, state="RUNNING", reason="None", restarts=0):
    (login_node / "job-41").write_text(JOB.format(state=state, reason=reason, restarts=restarts))


def ended(folder, status, **more):
    outcome = Outcome(rank=0, host="n1", process=1, started=1.0)
    note_end(folder, Start(job="41"), outcome, status, **more)


def requeue(folder, *flags, status="0"):
    result = main([str(folder), "stage1", status, *flags])
    return result, read_stops(folder)[-1]


def changes(login_node):
    """What Slurm was asked to change."""
    lines = (login_node / "calls").read_text().splitlines()
    return [line for line in lines if line.startswith(("requeue", "update"))]


def test_main__a_job_that_is_done(folder, login_node):
    ended(folder, 0)
    status, stop = requeue(folder)
    assert (status, stop.kind, stop.step) == (0, "done", 7)
    assert changes(login_node) == []


def test_main__a_job_that_has_saved_queues_again(folder, login_node):
    ended(folder, 75, signal=12)
    status, stop = requeue(folder)
    assert (status, stop.kind, stop.reason) == (1, "requeue", "saved after SIGUSR2")
    assert changes(login_node) == ["requeue 41"]


def test_main__a_crash_is_tried_again_off_its_node_and_not_for_ever(folder, login_node):
    ended(folder, -9)
    status, stop = requeue(folder, status="137")
    assert (status, stop.kind, stop.excluded) == (1, "retry", ("n1",))
    assert changes(login_node) == ["requeue 41", "update JobId=41 ExcNodeList=n1"]
    status, stop = requeue(folder, status="137")
    assert (status, stop.kind) == (1, "failed")
    assert len(changes(login_node)) == 2


def test_main__asks_for_a_task_of_an_array_by_its_place(folder, login_node, slurm_task):
    """The number of an array's last task is the array's own: it would requeue all of them."""
    slurm_task(SLURM_JOB_ID="41", SLURM_ARRAY_JOB_ID="41", SLURM_ARRAY_TASK_ID="0")
    chain = read_chain(folder)
    (task,) = chain.jobs[0].tasks
    link = replace(chain.jobs[0], tasks=(replace(task, job_id="41_0"),))
    write_chain(folder, chain.with_job(link))
    assert requeue(folder)[1].job == "41_0"
    assert changes(login_node) == ["requeue 41_0"]


def test_main__keeps_a_node_that_the_job_cannot_do_without(folder, login_node):
    (login_node / "nodes").write_text("n1 idle\nn2 down\n")
    ended(folder, -9)
    assert requeue(folder)[1].excluded == ()
    assert changes(login_node) == ["requeue 41"]


def test_main__an_error_of_the_user_carries_what_the_stage_said(folder, login_node, tmp_path):
    write_status(tmp_path / "stage1", Status(state="failed", step=9, steps=20, reason="no disk"))
    ended(folder, 2, reason="ended with status 2")
    status, stop = requeue(folder, status="2")
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
    note_end(folder, Start(job="41"), outcome, 2)
    assert requeue(folder)[1].reason == "rank 0 on n1: stages.x: no such field"
    log.unlink()
    assert requeue(folder)[1].reason == f"rank 0 on n1: ended with status 2; see {log}"


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
    status, stop = requeue(folder, *flags)
    assert (status, stop.kind) == (1, "left")
    assert changes(login_node) == []


def test_main__queues_again_at_the_time_limit(folder, login_node):
    know(login_node, state="COMPLETING", reason="TimeLimit")
    status, stop = requeue(folder, "--ending")
    assert (status, stop.kind, stop.reason) == (1, "requeue", "reached its time limit")
    assert changes(login_node) == ["requeue 41"]


def test_main__notes_a_requeue_that_slurm_refused(folder, login_node):
    ended(folder, 75, signal=12)
    text = (login_node / "scontrol").read_text()
    refusal = 'case "$*" in requeue*) echo "Job is too old" >&2; exit 1;; esac\n'
    (login_node / "scontrol").write_text(text.replace("case", refusal + "case", 1))
    with pytest.raises(SlurmError):
        requeue(folder)
    stop = read_stops(folder)[-1]
    assert stop.kind == "failed"
    assert "Job is too old" in stop.reason


def test_main__without_an_answer_it_still_decides(folder, login_node, capsys):
    (login_node / "scontrol").write_text("#!/bin/sh\necho down >&2; exit 1\n")
    ended(folder, 0)
    assert requeue(folder)[0] == 0
    assert "scontrol" in capsys.readouterr().err


def test_main__is_a_script_that_a_foreign_folder_does_not_disturb(folder, tmp_path):
    foreign = tmp_path / "foreign"
    (foreign / "slurm").mkdir(parents=True)
    (foreign / "slurm" / "__init__.py").write_text("raise SystemExit('a foreign slurm was run')")
    ended(folder, 0)
    script = Path(__file__).resolve().parents[2] / "slurm" / "requeue.py"
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
