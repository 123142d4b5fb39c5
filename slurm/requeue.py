"""Whether a job queues again when all its processes are over, and what is remembered for that.

    python slurm/requeue.py FOLDER NAME STATUS_OF_SRUN [--ending]

The last lines of every job's script call it on the job's first node, outside any container. All
requeues are decided here. It ends with 0 only where the job is done, so that what waits for the job
does not start on something unfinished.

======================================  ==================================================
every process ended with 0              done
Slurm counts another start already      left to Slurm
it has reached its time limit           requeue, up to ``max_requeues`` times
Slurm is ending the job                 left: Slurm queues it again, or was told not to
another start has taken the folder      left
some saved because of a signal          requeue, up to ``max_requeues`` times
a process met an error of the user's    failed: it would come again
anything else                           retry off that node, up to ``max_retries`` times, while
                                        steps are gained
======================================  ==================================================

Exit statuses do not tell these apart: srun reports the highest one, torchrun makes each into a 1,
and a process that is ended because another one failed looks like that one. So each process notes
its start and its end in a file (``outcomes/JOB-RESTART-RANK.json``), and each decision is a line of
``history.jsonl``.
"""

import argparse
import json
import logging
import os
import re
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from signal import Signals
from socket import gethostname
from typing import Literal, get_args

if __package__ in (None, ""):  # run as a file: put the checkout, and only it, first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from radio_distill.errors import HUNG_STATUS, InterruptedRunError, RadioDistillError, TakenOverError
from radio_distill.system.files import replacing
from radio_distill.train.run_dir import read_status
from slurm import scontrol
from slurm.chain import find_chain
from slurm.scontrol import SlurmError

OUTCOMES, HISTORY = "outcomes", "history.jsonl"
INTERRUPTED, TAKEN_OVER = InterruptedRunError.exit_status, TakenOverError.exit_status
USER_ERROR = RadioDistillError.exit_status
_HEAD_START = 10.0  # seconds

Kind = Literal["done", "requeue", "retry", "left", "failed"]
_MARK = "radio-distill: "  # before every error of the user's, and before what is written here
_OURS = re.compile(rf"{_MARK}\S+: ({'|'.join(get_args(Kind))}): ")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Which start of which job a process belongs to."""

    job: str
    """``41``, or ``41_2`` for a task of an array; its own number may also stand for the array."""
    restart: int = 0
    """How often Slurm had started the job before."""
    host: str = ""
    """The node, by Slurm's name of it."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Start":
        """Read it from the variables that Slurm sets."""
        array = environment.get("SLURM_ARRAY_JOB_ID")
        task = f"{array}_{environment.get('SLURM_ARRAY_TASK_ID')}" if array else ""
        return cls(
            job=task or environment.get("SLURM_JOB_ID", ""),
            restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
            host=environment.get("SLURMD_NODENAME") or gethostname(),
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The start of a process and, once it is over, its end."""

    rank: int
    host: str
    process: int
    started: float
    log: str = ""
    """File that its messages go to."""
    status: int | None = None
    """Exit status, or minus the signal that killed it; None where nothing was heard of an end."""
    signal: int = 0
    """That asked it to stop; 0 for none."""
    reason: str = ""
    ended: float = 0.0

    @property
    def killed(self) -> bool:
        """Whether it died without a chance to say why."""
        return self.status is not None and self.status < 0


def note_start(folder: Path, start: Start, rank: int) -> Outcome:
    """Note that this process has started."""
    log = folder / f"{start.job}_{os.environ.get('SLURM_PROCID', '0')}_log.err"
    outcome = Outcome(
        rank=rank, host=start.host, process=os.getpid(), started=time.time(), log=str(log)
    )
    _write(folder, start, outcome)
    return outcome


def note_end(
    folder: Path, start: Start, outcome: Outcome, status: int, reason: str = "", signal: int = 0
) -> None:
    """Note how a process has ended."""
    reason = " ".join(reason.split())
    ended = replace(outcome, status=status, reason=reason, signal=signal, ended=time.time())
    _write(folder, start, ended)


def read_outcomes(folder: Path, start: Start) -> list[Outcome]:
    """Return what is known of the processes of one start of a job, by rank."""
    outcomes = []
    for path in (folder / OUTCOMES).glob(f"{start.job}-{start.restart}-*.json"):
        with suppress(OSError, ValueError, TypeError):  # else as one that said nothing
            outcomes.append(Outcome(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted(outcomes, key=lambda outcome: outcome.rank)


def _write(folder: Path, start: Start, outcome: Outcome) -> None:
    """Write it; a full disk must not end a run that could still go on."""
    path = folder / OUTCOMES / f"{start.job}-{start.restart}-{outcome.rank}.json"
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(outcome)) + "\n", encoding="utf-8")
    except OSError as error:
        logging.getLogger(__name__).warning("cannot write %s: %s", path, error.strerror)


@dataclass(frozen=True, kw_only=True)
class Stop:
    """The end of one start of a job, and what was decided."""

    name: str
    """Of the job in the chain, for instance ``stage1``."""
    job: str
    """``41``, or ``41_2`` for a task of an array."""
    restart: int
    kind: Kind
    """``requeue``: saved, goes on. ``retry``: crashed, tried again. ``left``: up to Slurm."""
    reason: str
    step: int | None = None
    """That the stage had reached."""
    excluded: tuple[str, ...] = ()
    """Nodes that it must not use from now on."""
    time: float = field(default_factory=time.time)


def append_stop(folder: Path, stop: Stop) -> None:
    """Add a line to the history."""
    with (folder / HISTORY).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(stop)) + "\n")


def read_stops(folder: Path) -> list[Stop]:
    """Return the history, the oldest first; a line that was cut short is passed over."""
    stops: list[Stop] = []
    with suppress(OSError):
        for line in (folder / HISTORY).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, TypeError, KeyError):
                fields = json.loads(line)
                stops.append(Stop(**{**fields, "excluded": tuple(fields["excluded"])}))
    return stops


def note_lost_start(folder: Path, name: str, start: Start) -> None:
    """Note a start of a job whose batch script could not: its node was lost or it was killed."""
    before = start.restart - 1
    if (start.job, before) not in {(stop.job, stop.restart) for stop in read_stops(folder)}:
        reason = "Slurm had it queue again: its node was lost, or it was killed at once"
        stop = Stop(name=name, job=start.job, restart=before, kind="left", reason=reason)
        append_stop(folder, stop)


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
    """Decide what becomes of a job, without asking Slurm; see the module's table."""
    statuses = [outcome.status for outcome in end.outcomes]
    lost = tuple(sorted({outcome.host for outcome in end.outcomes} & set(end.dead_nodes)))
    if len(statuses) >= end.processes and not any(status != 0 for status in statuses):
        return Decision(kind="done", reason="complete")
    if end.restarted:
        cause = f"{', '.join(lost)} was lost" if lost else "requeue, preemption or lost node"
        return Decision(kind="left", reason=f"Slurm had it queue again: {cause}")
    if end.time_limit:
        return _requeue(end, max_requeues, "reached its time limit")
    if end.ending:
        return Decision(kind="left", reason="cancelled or preempted")
    if TAKEN_OVER in statuses:
        return Decision(kind="left", reason="a process started later has taken over its folder")
    if INTERRUPTED in statuses and set(statuses) <= {0, INTERRUPTED}:
        number = next((outcome.signal for outcome in end.outcomes if outcome.signal), 0)
        signal = Signals(number).name if number else "a signal"
        return _requeue(end, max_requeues, f"saved after {signal}")
    return _after_crash(end, max_retries, lost)


def _requeue(end: Ending, most: int, reason: str) -> Decision:
    if sum(stop.kind == "requeue" for stop in end.history) < most:
        return Decision(kind="requeue", reason=reason)
    reason += f"; max_requeues = {most} is spent: raise it, and resume"
    return Decision(kind="failed", reason=reason)


def _after_crash(end: Ending, most: int, lost: tuple[str, ...]) -> Decision:
    cause = cause_of(end.outcomes)
    if cause is None:
        hosts = {outcome.host for outcome in end.outcomes}
        silent = {outcome.host for outcome in end.outcomes if outcome.status is None}
        blamed = lost or (tuple(sorted(silent)) if silent < hosts else ())
        count = end.processes - sum(outcome.status is not None for outcome in end.outcomes)
        reason = f"{count} of {end.processes} processes ended without a word (srun: {end.status})"
    else:
        blamed, words = lost or (cause.host,), cause.reason
        if cause.killed:
            words = f"killed by {Signals(-(cause.status or 0)).name}"
        elif cause.status == HUNG_STATUS:
            words = "no step was finished for too long"
        words = words or f"ended with status {cause.status}; see {cause.log}"
        reason = f"rank {cause.rank} on {cause.host}: {words}"
        if cause.status == USER_ERROR:
            return Decision(kind="failed", reason=reason)
    crashes = [stop for stop in end.history if stop.kind == "retry"]
    if len(crashes) >= most:
        reason += f"; max_retries = {most} is spent"
    elif crashes and (end.step or 0) <= (crashes[-1].step or 0):
        reason += "; crashed again"
        reason += f" at step {end.step}: no step was gained" if end.step is not None else ""
    else:
        return Decision(kind="retry", reason=reason, blamed=blamed)
    return Decision(kind="failed", reason=reason, blamed=blamed)


def cause_of(outcomes: Sequence[Outcome]) -> Outcome | None:
    """Return the process that the others failed because of.

    An error of the user's is certain; else the first one counts. One that was killed is found out
    a little later than the errors of its peers, whose connections break at once.
    """
    failed = [outcome for outcome in outcomes if outcome.status not in (None, 0, INTERRUPTED)]

    def order(outcome: Outcome) -> tuple[bool, float]:
        return outcome.status != USER_ERROR, outcome.ended - _HEAD_START * outcome.killed

    return min(failed, key=order, default=None)


def exclusion(
    blamed: Sequence[str], excluded: Sequence[str], usable: Collection[str], nodes: int
) -> tuple[str, ...]:
    """Return all nodes to exclude: those of before, and as many of the blamed as can be spared.

    ``usable`` are the nodes of the partition that can run jobs, of which the job needs ``nodes``.
    """
    result = list(excluded)
    for node in blamed:
        if node not in result and len(set(usable) - {*result, node}) >= nodes:
            result.append(node)
    return tuple(result)


def main(argv: Sequence[str] | None = None) -> int:
    """Decide and act; returns the exit status of the batch script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("status", type=int)
    parser.add_argument("--ending", action="store_true", help="Slurm is ending the job")
    arguments = parser.parse_args(argv)

    folder, chain = find_chain(arguments.folder)
    start = Start.of(os.environ)
    known: Mapping[str, str] = {}
    dead_nodes: set[str] = set()
    try:  # a controller that does not answer is no reason not to decide
        known = next(iter(scontrol.show_job(start.job)), {})
        dead_nodes = scontrol.nodes_of(known["Partition"])[1] if "Partition" in known else set()
    except SlurmError as error:
        print(f"{_MARK}{error}", file=sys.stderr)
    over = known.get("JobState", "RUNNING") != "RUNNING"
    stage_folder = chain.task(arguments.name, start.job).stage_folder
    step = reached_step(Path(stage_folder)) if stage_folder else None
    ending = Ending(
        outcomes=[_with_last_words(outcome) for outcome in read_outcomes(folder, start)],
        processes=chain.job(arguments.name).cluster(chain.cluster).processes,
        step=step,
        status=arguments.status,
        restarted=int(known.get("Restarts", start.restart)) > start.restart,
        ending=arguments.ending or over,
        time_limit=over and known.get("Reason") == "TimeLimit",
        dead_nodes=dead_nodes,
        history=[stop for stop in read_stops(folder) if stop.job == start.job],
    )
    decision = decide(ending, chain.cluster.max_requeues, chain.cluster.max_retries)
    tries_elsewhere = decision.kind == "retry" and chain.cluster.exclude_crashed
    stop = Stop(
        name=arguments.name,
        job=start.job,
        restart=start.restart,
        kind=decision.kind,
        reason=_with_stage_s_words(decision, stage_folder),
        step=step,
        excluded=_nodes_to_exclude(decision, known) if tries_elsewhere else (),
    )
    _carry_out(folder, stop)
    return 0 if decision.kind == "done" else 1


def _carry_out(folder: Path, stop: Stop) -> None:
    """Note a decision, then have Slurm do it; it ends this script when it requeues the job."""
    append_stop(folder, stop)
    print(f"{_MARK}{stop.name}: {stop.kind}: {stop.reason}", file=sys.stderr)
    if stop.kind not in ("requeue", "retry"):
        return
    try:
        scontrol.requeue(stop.job)
    except SlurmError as error:
        append_stop(folder, replace(stop, kind="failed", reason=f"{stop.reason}; {error}"))
        raise
    if stop.excluded:
        try:  # Slurm takes it only now that the job waits again
            scontrol.exclude(stop.job, stop.excluded)
        except SlurmError as error:  # it may come back to that node, which is no reason to fail
            print(f"{_MARK}{error}", file=sys.stderr)


def _with_last_words(outcome: Outcome) -> Outcome:
    """Return the outcome of an error of the user's with the message that stands in the log."""
    if outcome.status == USER_ERROR:
        with suppress(OSError):
            lines = Path(outcome.log).read_text(encoding="utf-8", errors="replace").splitlines()
            words = [line for line in lines if line.startswith(_MARK) and not _OURS.match(line)]
            if words:
                return replace(outcome, reason=words[-1].removeprefix(_MARK))
    return outcome


def _with_stage_s_words(decision: Decision, stage_folder: str) -> str:
    """Return the reason, with what the stage itself said of an error.

    Of a process that was killed, it would only say that its peer was gone.
    """
    status = read_status(Path(stage_folder)) if stage_folder else None
    words = status.reason if status and status.state in ("failed", "hung") else ""
    known = not words or words in decision.reason or ": killed by " in decision.reason
    if known or decision.kind not in ("retry", "failed"):
        return decision.reason
    return f"{decision.reason}: {words}"


def reached_step(stage_folder: Path) -> int:
    """Return the last step that a stage is known to have reached."""
    whole = (stage_folder / "checkpoints").glob("step-" + "[0-9]" * 8)
    status = read_status(stage_folder)
    saved = [int(path.name.removeprefix("step-")) for path in whole]
    return max([*saved, status.step if status else 0])


def _nodes_to_exclude(decision: Decision, known: Mapping[str, str]) -> tuple[str, ...]:
    """Return all nodes that the job must not use from now on; none where Slurm does not answer."""
    with suppress(SlurmError, KeyError):
        usable, _ = scontrol.nodes_of(known["Partition"])
        before = scontrol.hostnames(known["ExcNodeList"])
        nodes = int(known["NumNodes"].split("-")[0])
        excluded = exclusion(decision.blamed, before, usable, nodes)
        return excluded if set(excluded) > set(before) else ()
    return ()


if __name__ == "__main__":
    sys.exit(main())
