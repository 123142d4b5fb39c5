"""How a chain is doing: a line for each job, from Slurm, the stages' files and the history."""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from radio_distill.system.progress import clock, table_console
from radio_distill.train.run_dir import STATUS, Status, read_status
from radio_distill.train.stage_folders import is_aside, stage_folders

from . import scontrol
from .chain import Chain, Job, Task
from .requeue import Stop, read_stops

_ENDED = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL",
    "DEADLINE", "OUT_OF_MEMORY", "REVOKED",
)  # fmt: skip
_WAITS_FOR = {
    "Dependency": "the job before",
    "DependencyNeverSatisfied": "a job that failed",
    "Resources": "free nodes",
    "Priority": "jobs of higher priority",
    "BeginTime": "its turn after a requeue",
    "JobArrayTaskLimit": "other tasks of its array",
    "JobHeldUser": "scontrol release: it is held",
    "JobHeldAdmin": "an administrator: it is held",
    "PartitionDown": "its partition, which is down",
    "ReqNodeNotAvail": "nodes that are not available",
    "Nodes": "nodes that are not available",
    "PartitionTimeLimit": "nothing: its time limit is above the partition's",
    "PartitionNodeLimit": "nothing: it asks for more nodes than the partition has",
    "AssociationJobLimit": "the account's other jobs",
    "QOSMaxJobsPerUserLimit": "the user's other jobs",
}
_COLUMNS = (
    ("job", "left"), ("id", "right"), ("Slurm", "left"), ("step", "right"), ("img/s", "right"),
    ("ETA", "right"), ("last sign", "right"), ("restarts", "right"), ("last stop", "left"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of one job, or of one task of an array."""

    name: str
    job_id: str
    state: str
    """Slurm's word, in capital letters; empty where Slurm has forgotten it."""
    detail: str = ""
    """Nodes it runs on, or what it waits for."""
    restarts: int | None = None
    status: Status | None = None
    stop: Stop | None = None
    """The newest one."""

    @property
    def alive(self) -> bool:
        """Whether the job still waits, runs or is being ended."""
        return bool(self.state) and self.state not in _ENDED

    @property
    def complete(self) -> bool:
        """Whether all its processes ended well."""
        return self.stop is not None and self.stop.kind == "done"


def rows_of(folder: Path, chain: Chain) -> list[Row]:
    """Ask Slurm and read the files; one row for each task.

    Raises:
        SlurmError: where Slurm does not answer.
    """
    stops = {stop.job: stop for stop in read_stops(folder)}
    rows = []
    for job in chain.jobs:
        known = [record for number in job.job_ids if number for record in scontrol.show_job(number)]
        rows += [_row(job, task, known, stops.get(task.job_id)) for task in job.tasks]
    return rows


def rows_here(run: Path) -> list[Row]:
    """Return a row for each stage and fit that Slurm knows nothing of, from their files."""
    rows = []
    stages = itertools.chain.from_iterable(stage_folders(run, STATUS).values())
    fits = (folder for folder in sorted(run.glob("fit/*")) if not is_aside(folder))
    for folder in (*stages, *fits):
        if (status := read_status(folder)) is not None:
            name = folder.relative_to(run).as_posix()
            state, reason = status.state, status.reason
            rows.append(Row(name=name, job_id="", state=state, detail=reason, status=status))
    return rows


def _row(job: Job, task: Task, known: Sequence[Mapping[str, str]], stop: Stop | None) -> Row:
    record = next((record for record in known if _is(record, task.job_id)), {})
    state, reason, detail = record.get("JobState", ""), record.get("Reason", "None"), ""
    if not state and task.job_id:
        state = scontrol.accounted_state(task.job_id)
    if state == "PENDING" and reason != "None":
        detail = f"waits for {_WAITS_FOR[reason]}" if reason in _WAITS_FOR else reason
    elif state == "RUNNING":
        detail = f"on {record.get('NodeList', '')}"
    return Row(
        name=f"{job.name} {task.label}".strip(),
        job_id=task.job_id,
        state=state,
        detail=detail,
        restarts=int(record["Restarts"]) if "Restarts" in record else None,
        status=read_status(Path(task.stage_folder)) if task.stage_folder else None,
        stop=stop,
    )


def _is(record: Mapping[str, str], job_id: str) -> bool:
    """Tell whether Slurm's record is of this task; one record may stand for several that wait."""
    array, _, task = job_id.partition("_")
    if not task:
        return record["JobId"] == job_id
    if record.get("ArrayJobId") != array:
        return False
    for part in record.get("ArrayTaskId", "").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and int(first) <= int(task) <= int(last or first):
            return True
    return False


def print_rows(rows: Sequence[Row], source: str = "Slurm") -> None:
    """Print the table, in full width where nobody looks; ``source`` is who tells the state."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name, justify in _COLUMNS:
        name = source if name == "Slurm" else name
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*_cells(row))
    table_console().print(table)


def _cells(row: Row) -> list[str]:
    state = row.state or ("complete" if row.complete else "unknown to Slurm")
    status, stop = row.status, row.stop
    cells = [row.name, row.job_id, f"{state} {row.detail}".strip()]
    if status is None:
        cells += [""] * 4
    else:
        running = row.state in ("RUNNING", "running") and status.state == "running"
        cells += [
            f"{status.step} of {status.steps}",
            f"{status.images_per_second:.1f}" if running else "",
            clock(status.seconds_left) if running else "",
            f"{clock(time.time() - status.time)} ago",
        ]
    cells.append("" if row.restarts is None else str(row.restarts))
    excluded = f"; keeps off {', '.join(stop.excluded)}" if stop and stop.excluded else ""
    return [*cells, f"{stop.reason}{excluded}" if stop else ""]
