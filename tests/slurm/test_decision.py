"""What becomes of a job follows from how its processes ended, and never loops for ever."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.decision import Decision, Ending, cause_of, decide, exclusion
from slurm.history import Stop
from slurm.outcomes import Outcome


def outcome(rank: int = 0, status: int | None = 0, host: str = "", **more) -> Outcome:
    more = {"ended": 100.0 if status is not None else 0.0, **more}
    host = host or f"n{rank + 1}"
    return Outcome(rank=rank, host=host, process=1, started=1.0, status=status, **more)


def ending(*statuses: int | None, **more) -> Ending:
    outcomes = [outcome(rank, status) for rank, status in enumerate(statuses)]
    return Ending(outcomes=outcomes, processes=more.pop("processes", len(statuses)), **more)


def stop(kind: str, step: int | None = None) -> Stop:
    return Stop(name="stage1", job="41", restart=0, kind=kind, reason="", step=step)


def decided(end: Ending, max_requeues: int = 30, max_retries: int = 3) -> Decision:
    return decide(end, max_requeues, max_retries)


def test_decide__done_where_all_processes_say_so():
    assert decided(ending(0, 0)).kind == "done"
    assert decided(ending(0, 0, status=1)).kind == "done"  # say the container's clean-up failed


@pytest.mark.parametrize("statuses", [(0,), (0, None), ()])
def test_decide__silence_is_not_done(statuses):
    assert decided(ending(*statuses, processes=2)).kind == "retry"


@pytest.mark.parametrize("end", [ending(75, 75), ending(0, 75)])
def test_decide__requeues_what_has_saved(end):
    outcomes = [replace(item, signal=12) for item in end.outcomes]
    decision = decided(replace(end, outcomes=outcomes))
    assert decision == Decision(kind="requeue", reason="saved after SIGUSR2")


def test_decide__requeues_after_a_preemption_that_left_time_to_save():
    """With a GraceTime the processes get SIGTERM while the batch script gets nothing."""
    end = Ending(outcomes=[outcome(0, 75, signal=15)], processes=1)
    assert decided(end) == Decision(kind="requeue", reason="saved after SIGTERM")


def test_decide__max_requeues_bounds_them():
    history = [stop("requeue", 3), stop("retry", 4), stop("requeue", 5)]
    assert decided(ending(75, history=history), max_requeues=3).kind == "requeue"
    decision = decided(ending(75, history=history), max_requeues=2)
    assert decision.kind == "failed"
    assert "max_requeues = 2 is spent" in decision.reason


@pytest.mark.parametrize("statuses", [(75, 75), (1, None), (2,), (None, None), (-9, 1)])
def test_decide__what_slurm_ends_is_left_to_slurm(statuses):
    assert decided(ending(*statuses, ending=True)).kind == "left"
    assert decided(ending(*statuses, restarted=True, ending=True)).kind == "left"


def test_decide__an_orphan_does_nothing():
    decision = decided(ending(75, restarted=True))
    assert decision.kind == "left"
    assert "lost node" in decision.reason
    decision = decided(ending(None, restarted=True, dead_nodes={"n1"}))
    assert decision.reason == "Slurm had it queue again: n1 was lost"


@pytest.mark.parametrize("statuses", [(75, 75), (None, None), (1, 75)])
def test_decide__its_time_limit_requeues_even_what_did_not_save(statuses):
    decision = decided(ending(*statuses, ending=True, time_limit=True))
    assert decision == Decision(kind="requeue", reason="reached its time limit")


def test_decide__taken_over_is_left():
    assert decided(ending(76, 1)).kind == "left"


def test_decide__an_error_of_the_user_is_not_tried_again():
    end = Ending(outcomes=[outcome(0, 1), outcome(1, 2, reason="no shards")], processes=2)
    assert decided(end) == Decision(kind="failed", reason="rank 1 on n2: no shards")


@pytest.mark.parametrize(
    ("status", "words"),
    [(1, "ended with status 1"), (-11, "killed by SIGSEGV"), (70, "no step was finished")],
)
def test_decide__a_crash_is_tried_again_elsewhere(status, words):
    decision = decided(ending(75, status))
    assert decision.kind == "retry"
    assert decision.blamed == ("n2",)
    assert decision.reason.startswith("rank 1 on n2: ")
    assert words in decision.reason


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


def test_decide__nobody_is_blamed_where_nothing_is_known():
    decision = decided(ending(None, None, status=1))
    assert decision.blamed == ()
    assert decision.reason == "2 of 2 processes ended without a word (srun: 1)"


def test_decide__the_silent_one_is_blamed_where_others_ended_well():
    assert decided(ending(0, None)).blamed == ("n2",)


def test_decide__a_node_out_of_reach_is_blamed_before_the_errors_of_its_peers():
    assert decided(ending(1, None, dead_nodes={"n2", "n7"})).blamed == ("n2",)


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
