"""What became of each start of each job, one line each: ``history.jsonl``."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

HISTORY = "history.jsonl"

Kind = Literal["done", "requeue", "retry", "left", "failed"]


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


def append(folder: Path, stop: Stop) -> None:
    """Add a line."""
    with (folder / HISTORY).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(stop)) + "\n")


def read(folder: Path) -> list[Stop]:
    """Return all stops, the oldest first; a line that was cut short is passed over."""
    try:
        lines = (folder / HISTORY).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    stops = []
    for line in lines:
        try:
            fields = json.loads(line)
            stops.append(Stop(**{**fields, "excluded": tuple(fields["excluded"])}))
        except (ValueError, TypeError, KeyError):
            continue
    return stops
