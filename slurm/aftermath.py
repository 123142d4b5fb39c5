"""Decides whether a job queues again, when all its processes are over.

    python slurm/aftermath.py FOLDER NAME STATUS_OF_SRUN [--ending]

The last lines of every job's script call it on the job's first node, outside any container. All
requeues are decided here. It ends with 0 only where the job is done, so that what waits for the job
does not start on something unfinished.
"""

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import get_args

if __package__ in (None, ""):  # run as a file: put the checkout, and only it, first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from radio_distill.train.run_dir import read_status
from slurm import commands, history, outcomes
from slurm.chain import Chain, find_chain
from slurm.commands import SlurmError
from slurm.decision import USER_ERROR, Decision, Ending, decide, exclusion
from slurm.outcomes import Outcome, Place

_MARK = "radio-distill: "  # before every error of the user's, and before what is written here
_OURS = re.compile(rf"{_MARK}\S+: ({'|'.join(get_args(history.Kind))}): ")


def main(argv: Sequence[str] | None = None) -> int:
    """Decide and act; returns the exit status of the batch script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("status", type=int)
    parser.add_argument("--ending", action="store_true", help="Slurm is ending the job")
    arguments = parser.parse_args(argv)

    folder, chain = find_chain(arguments.folder)
    place = Place.of(os.environ)
    job = described(place.job)
    over = job.get("JobState", "RUNNING") != "RUNNING"
    stage_folder = chain.task(arguments.name, place.job).stage_folder
    ending = Ending(
        outcomes=[with_last_words(outcome) for outcome in outcomes.read(folder, place)],
        processes=processes_of(chain, arguments.name),
        step=reached_step(Path(stage_folder)) if stage_folder else None,
        status=arguments.status,
        restarted=int(job.get("Restarts", place.restart)) > place.restart,
        ending=arguments.ending or over,
        time_limit=over and job.get("Reason") == "TimeLimit",
        dead_nodes=dead_nodes(job),
        history=[stop for stop in history.read(folder) if stop.job == place.job],
    )
    decision = decide(ending, chain.cluster.max_requeues, chain.cluster.max_retries)
    excluded: tuple[str, ...] = ()
    if decision.kind == "retry" and chain.cluster.exclude_crashed:
        excluded = nodes_to_exclude(decision, job)
    stop = history.Stop(
        name=arguments.name,
        job=place.job,
        restart=place.restart,
        kind=decision.kind,
        reason=words_of(decision, stage_folder),
        step=ending.step,
        excluded=excluded,
    )
    carry_out(folder, stop)
    return 0 if decision.kind == "done" else 1


def carry_out(folder: Path, stop: history.Stop) -> None:
    """Note a decision, then have Slurm do it; it ends this script when it requeues the job."""
    history.append(folder, stop)
    print(f"{_MARK}{stop.name}: {stop.kind}: {stop.reason}", file=sys.stderr)
    if stop.kind not in ("requeue", "retry"):
        return
    try:
        commands.requeue(stop.job)
    except SlurmError as error:
        history.append(folder, replace(stop, kind="failed", reason=f"{stop.reason}; {error}"))
        raise
    if stop.excluded:
        try:  # Slurm takes it only now that the job waits again
            commands.exclude(stop.job, stop.excluded)
        except SlurmError as error:  # it may come back to that node, which is no reason to fail
            print(f"{_MARK}{error}", file=sys.stderr)


def described(job_id: str) -> Mapping[str, str]:
    """Return what Slurm says of the job; nothing where it does not answer."""
    try:
        return next(iter(commands.show_job(job_id)), {})
    except SlurmError as error:
        print(f"radio-distill: {error}", file=sys.stderr)
        return {}


def with_last_words(outcome: Outcome) -> Outcome:
    """Return the outcome of an error of the user's with the message that stands in the log."""
    if outcome.status != USER_ERROR:
        return outcome
    with suppress(OSError):
        lines = Path(outcome.log).read_text(encoding="utf-8", errors="replace").splitlines()
        words = [line for line in lines if line.startswith(_MARK) and not _OURS.match(line)]
        return replace(outcome, reason=words[-1].removeprefix(_MARK) if words else outcome.reason)
    return outcome


def processes_of(chain: Chain, name: str) -> int:
    """Return how many processes a job should have had."""
    link = next(link for link in chain.links if link.name == name)
    cluster = link.cluster(chain.cluster)
    return cluster.nodes * cluster.processes_per_node


def reached_step(stage_folder: Path) -> int:
    """Return the last step that a stage is known to have reached."""
    saved = [
        int(path.name.removeprefix("step-"))
        for path in (stage_folder / "checkpoints").glob("step-" + "[0-9]" * 8)
    ]
    status = read_status(stage_folder)
    return max([*saved, status.step if status else 0])


def words_of(decision: Decision, stage_folder: str) -> str:
    """Return the reason, with what the stage itself said of an error."""
    status = read_status(Path(stage_folder)) if stage_folder else None
    said = status.reason if status and status.state in ("failed", "hung") else ""
    if decision.kind not in ("retry", "failed") or not said or said in decision.reason:
        return decision.reason
    if ": killed by " in decision.reason:  # what the stage said is only that its peer was gone
        return decision.reason
    return f"{decision.reason}: {said}"


def dead_nodes(job: Mapping[str, str]) -> set[str]:
    """Return the nodes of the job's partition that cannot run jobs."""
    with suppress(SlurmError):
        return commands.nodes_of(job["Partition"])[1] if "Partition" in job else set()
    return set()


def nodes_to_exclude(decision: Decision, job: Mapping[str, str]) -> tuple[str, ...]:
    """Return all nodes that the job must not use from now on; none where Slurm does not answer."""
    with suppress(SlurmError, KeyError):
        usable, _ = commands.nodes_of(job["Partition"])
        before = commands.hostnames(job["ExcNodeList"])
        excluded = exclusion(decision.blamed, before, usable, int(job["NumNodes"].split("-")[0]))
        return excluded if set(excluded) > set(before) else ()
    return ()


if __name__ == "__main__":
    sys.exit(main())
