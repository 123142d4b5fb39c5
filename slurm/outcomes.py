"""How each process of a job ended, in a small file: ``outcomes/JOB-RESTART-RANK.json``.

Exit statuses do not tell it. srun reports the highest one, torchrun makes each into a 1, and a
process that is ended because another one failed looks like that one. So each process notes its
start and its end, and :mod:`slurm.decision` reads all of them when the job is over.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from socket import gethostname

from radio_distill.system.files import replacing

FOLDER = "outcomes"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which start of which job a process belongs to."""

    job: str
    """``41``, or ``41_2`` for a task of an array; its own number may also stand for the array."""
    restart: int = 0
    """How often Slurm had started the job before."""
    host: str = ""
    """The node, by Slurm's name of it."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Place":
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


def begin(folder: Path, place: Place, rank: int) -> Outcome:
    """Note that this process has started."""
    task = os.environ.get("SLURM_PROCID", "0")
    outcome = Outcome(
        rank=rank,
        host=place.host,
        process=os.getpid(),
        started=time.time(),
        log=str(folder / f"{place.job}_{task}_log.err"),
    )
    _write(folder, place, outcome)
    return outcome


def end(
    folder: Path, place: Place, outcome: Outcome, status: int, reason: str = "", signal: int = 0
) -> None:
    """Note how a process has ended."""
    reason = " ".join(reason.split())
    done = replace(outcome, status=status, reason=reason, signal=signal, ended=time.time())
    _write(folder, place, done)


def read(folder: Path, place: Place) -> list[Outcome]:
    """Return what is known of the processes of one start of a job, by rank."""
    found = []
    for path in (folder / FOLDER).glob(f"{place.job}-{place.restart}-*.json"):
        try:
            found.append(Outcome(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue  # as good as not written: the process counts as one that said nothing
    return sorted(found, key=lambda outcome: outcome.rank)


def _write(folder: Path, place: Place, outcome: Outcome) -> None:
    """Write it; a full disk must not end a run that could still go on."""
    path = folder / FOLDER / f"{place.job}-{place.restart}-{outcome.rank}.json"
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(outcome)) + "\n", encoding="utf-8")
    except OSError as error:
        logging.getLogger(__name__).warning("cannot write %s: %s", path, error.strerror)
