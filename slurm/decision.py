"""What to do with a job whose processes are over: a pure function, without Slurm.

======================================  ==================================================
every process ended with 0              done
Slurm is ending the job                 left: Slurm queues it again, or was told not to
some saved because of a signal          requeue, up to ``max_requeues`` times
another start has taken the folder      left
a process met an error of the user's    failed: it would come again
anything else                           retry, up to ``max_retries`` times, while steps are gained
======================================  ==================================================
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from signal import Signals

from radio_distill.errors import HUNG_STATUS, InterruptedRunError, RadioDistillError, TakenOverError

from .history import Kind, Stop
from .outcomes import Outcome

INTERRUPTED, TAKEN_OVER = InterruptedRunError.exit_status, TakenOverError.exit_status
USER_ERROR = RadioDistillError.exit_status
_HEAD_START = 10.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Everything that is known of a start of a job when its processes are over."""

    outcomes: Sequence[Outcome]
    processes: int
    """That should have run."""
    step: int | None = None
    """That the stage has reached; None for a job without steps."""
    status: int = 0
    """Of srun."""
    restarted: bool = False
    """Whether Slurm has counted another start since."""
    ending: bool = False
    """Whether Slurm is ending the job: a preemption, a requeue, a cancellation, its time limit."""
    time_limit: bool = False
    dead_nodes: Collection[str] = ()
    """Nodes that Slurm cannot reach."""
    history: Sequence[Stop] = ()
    """Earlier stops of this job."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is done with the job, why, and the nodes that a crash came from."""

    kind: Kind
    reason: str
    blamed: tuple[str, ...] = ()


def decide(end: Ending, max_requeues: int, max_retries: int) -> Decision:
    """Decide what becomes of a job."""
    statuses = [outcome.status for outcome in end.outcomes]
    if len(statuses) >= end.processes and not any(status != 0 for status in statuses):
        return Decision(kind="done", reason="complete")
    if end.restarted:
        lost = ", ".join(_lost(end))
        cause = f"{lost} was lost" if lost else "requeue, preemption or lost node"
        return Decision(kind="left", reason=f"Slurm had it queue again: {cause}")
    if end.time_limit:
        return _requeue(end, max_requeues, "reached its time limit")
    if end.ending:
        return Decision(kind="left", reason="cancelled or preempted")
    if TAKEN_OVER in statuses:
        return Decision(kind="left", reason="a process started later has taken over its folder")
    if INTERRUPTED in statuses and all(status in (0, INTERRUPTED) for status in statuses):
        return _requeue(end, max_requeues, f"saved after {_signal_of(end.outcomes)}")
    return _after_crash(end, max_retries)


def _requeue(end: Ending, most: int, reason: str) -> Decision:
    done = sum(stop.kind == "requeue" for stop in end.history)
    if done >= most:
        return Decision(
            kind="failed", reason=f"{reason}; max_requeues = {most} is spent: raise it, and resume"
        )
    return Decision(kind="requeue", reason=reason)


def _signal_of(outcomes: Sequence[Outcome]) -> str:
    number = next((outcome.signal for outcome in outcomes if outcome.signal), 0)
    return Signals(number).name if number else "a signal"


def _after_crash(end: Ending, most: int) -> Decision:
    cause = cause_of(end.outcomes)
    reason = _reason(cause, end)
    if cause is not None and cause.status == USER_ERROR:
        return Decision(kind="failed", reason=reason)
    blamed = _blamed(cause, end)
    crashes = [stop for stop in end.history if stop.kind == "retry"]
    if len(crashes) >= most:
        return Decision(
            kind="failed", reason=f"{reason}; max_retries = {most} is spent", blamed=blamed
        )
    if crashes and (end.step or 0) <= (crashes[-1].step or 0):
        where = f" at step {end.step}: no step was gained" if end.step is not None else ""
        return Decision(kind="failed", reason=f"{reason}; crashed again{where}", blamed=blamed)
    return Decision(kind="retry", reason=reason, blamed=blamed)


def cause_of(outcomes: Sequence[Outcome]) -> Outcome | None:
    """Return the process that the others failed because of.

    An error of the user's is certain; else the first one counts. One that was killed is found out
    a little later than the errors of its peers, whose connections break at once.
    """
    failed = [outcome for outcome in outcomes if outcome.status not in (None, 0, INTERRUPTED)]

    def order(outcome: Outcome) -> tuple[bool, float]:
        return outcome.status != USER_ERROR, outcome.ended - _HEAD_START * outcome.killed

    return min(failed, key=order, default=None)


def _blamed(cause: Outcome | None, end: Ending) -> tuple[str, ...]:
    """Name the nodes of a crash: those out of reach, else where its cause ran."""
    if lost := _lost(end):
        return lost
    if cause is not None:
        return (cause.host,)
    hosts = {outcome.host for outcome in end.outcomes}
    silent = {outcome.host for outcome in end.outcomes if outcome.status is None}
    return tuple(sorted(silent)) if silent < hosts else ()


def _lost(end: Ending) -> tuple[str, ...]:
    return tuple(sorted({outcome.host for outcome in end.outcomes} & set(end.dead_nodes)))


def _reason(cause: Outcome | None, end: Ending) -> str:
    if cause is None:
        silent = end.processes - sum(outcome.status is not None for outcome in end.outcomes)
        return f"{silent} of {end.processes} processes ended without a word (srun: {end.status})"
    words = cause.reason or f"ended with status {cause.status}; see {cause.log}"
    if cause.status == HUNG_STATUS:
        words = "no step was finished for too long"
    if cause.killed:
        words = f"killed by {Signals(-(cause.status or 0)).name}"
    return f"rank {cause.rank} on {cause.host}: {words}"


def exclusion(
    blamed: Sequence[str], excluded: Sequence[str], usable: Collection[str], nodes: int
) -> tuple[str, ...]:
    """Return all nodes to exclude: those of before, and as many of the blamed as can be spared.

    Args:
        blamed: nodes that a crash came from.
        excluded: nodes that are excluded already.
        usable: nodes of the partition that can run jobs.
        nodes: how many the job needs.
    """
    result = list(excluded)
    for node in blamed:
        if node not in result and len(set(usable) - {*result, node}) >= nodes:
            result.append(node)
    return tuple(result)
