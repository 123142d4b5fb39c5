"""How a stage is doing, in a small file for those who look from outside: ``status.json``.

Written by rank 0 next to ``recipe.yaml``, at log lines and when the stage ends. A process that is
killed leaves "running" behind; the time tells since when nothing was heard of it.
"""

import json
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from ..system.files import replacing

STATUS = "status.json"


@dataclass(frozen=True, kw_only=True)
class Status:
    """A stage at one moment."""

    state: Literal["running", "complete", "interrupted", "failed", "hung"]
    """``interrupted``: a signal asked it to stop, and it saved. ``failed``: see ``reason``."""
    step: int
    steps: int
    """Of the whole stage."""
    images_per_second: float = 0.0
    seconds_left: float = 0.0
    reason: str = ""
    """Why it stopped, one line."""
    host: str = field(default_factory=socket.gethostname)
    time: float = field(default_factory=time.time)
    """Seconds since 1970."""


def write_status(folder: Path, status: Status) -> None:
    """Replace the status of the stage in ``folder``."""
    with replacing(folder / STATUS) as temporary:
        temporary.write_text(json.dumps(asdict(status), indent=1) + "\n", encoding="utf-8")


def read_status(folder: Path) -> Status | None:
    """Return the status of the stage in ``folder``; None where there is none that can be read."""
    try:
        return Status(**json.loads((folder / STATUS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
