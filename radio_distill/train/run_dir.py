"""The lock on a stage's folder, and the status of the stage for those who look from outside.

::

    STAGE/owner.json      who owns the folder: token, host, process, Slurm job
    STAGE/.owner-N        the same of the N-th claim; made by one process only, touched every few
                          seconds while that lives, removed when it ends by itself
    STAGE/status.json     state, step, rate and time left; written every few seconds by rank 0

Two processes that write into one folder damage each other's checkpoints. A start is refused while
the owner lives. An owner that finds another's token in ``owner.json`` must stop: Slurm starts a job
anew when a node no longer answers, and on a node that only lost its network the old processes live.

Of several starts at the same moment the one that makes ``.owner-N`` wins, on any file system.
Whether an owner lives is known of a process of this machine; of another machine's, its file must
have been touched within the last minute, by the clock of the file system.
"""

import json
import logging
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import ConfigError, TakenOverError
from ..system.files import reason_of, replacing

logger = logging.getLogger(__name__)

OWNER, STATUS = "owner.json", "status.json"
FRESH = "RADIO_DISTILL_FRESH"
"""Environment variable of a job that was submitted without --resume and that Slurm started again:
it goes on with nothing but what it has begun itself."""
BEAT = 5.0
"""Seconds between two signs of life."""
STATUS_SECONDS = 5.0
"""Seconds between two writes of the status."""
SILENCE = 60.0
"""Seconds without one after which an owner on another machine is taken for dead."""

_CLAIM = re.compile(r"\.owner-(\d{1,9})")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An owner of a folder."""

    number: int = 0
    token: str = ""
    host: str = ""
    process: int = 0
    started: str = ""
    """When the process began, as its machine's kernel counts it; empty where that is unknown."""
    machine: str = ""
    """Identifies the machine (and container) within which the process's number counts."""
    folder: str = ""
    slurm_job: str = ""
    slurm_restart: int = 0
    time: float = 0.0

    @property
    def name(self) -> str:
        """Name the process for a message."""
        job = f" (Slurm job {self.slurm_job})" if self.slurm_job else ""
        return f"process {self.process} on {self.host}{job}"


class RunLock:
    """The lock of rank 0 on a stage's folder, taken just before the first step.

    Args:
        folder: of the stage; whoever owned it before finds out at its next :meth:`check`.
        number: of the claim; by default the next one.

    Raises:
        FileExistsError: another process has made the claim of that number.
    """

    def __init__(self, folder: Path, number: int | None = None):
        before = current(folder)
        if number is None:
            number = 1 + (before.number if before else 0)
        self._folder = folder
        self.claim = _own_claim(folder, number, os.environ)
        text = json.dumps(asdict(self.claim), indent=1) + "\n"
        with (folder / self._file).open("x", encoding="utf-8") as file:
            file.write(text)
        for rival in _claims(folder):  # made since, and perhaps over already
            if rival.token != self.claim.token and rival.number >= number:
                (folder / self._file).unlink(missing_ok=True)
                raise FileExistsError(f"{folder} was claimed by {rival.name}")
        try:
            with replacing(folder / OWNER) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError:
            (folder / self._file).unlink(missing_ok=True)
            raise
        for earlier in _numbers(folder):
            if earlier < number:
                (folder / f".owner-{earlier}").unlink(missing_ok=True)
        self._is_over = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="owner", daemon=True)
        self._beating.start()

    @classmethod
    def take(cls, folder: Path, take_over: bool = False) -> "RunLock":
        """Claim a folder that no living process owns; with ``take_over``, one that is owned too.

        Raises:
            ConfigError: where a living process owns it, also one that claimed it at this moment; or
                where it cannot be written.
        """
        while True:
            before = current(folder)
            refuse_living(folder, take_over)
            try:
                return cls(folder, 1 + (before.number if before else 0))
            except FileExistsError:
                take_over = False  # another start was faster
            except OSError as error:
                raise ConfigError(
                    f"cannot write to {folder}: {reason_of(error)}; make it writable, or choose "
                    "another with --output"
                ) from error

    def check(self) -> None:
        """Raise TakenOverError where another process has claimed the folder since."""
        claim = _read(self._folder / OWNER)
        if claim is None:
            return  # a file system that does not answer is no other owner
        if claim.token != self.claim.token:
            raise TakenOverError(
                f"{self._folder} was taken over by process {claim.process} on {claim.host}, which "
                "was started later; this one stops and writes no more"
            )

    def move(self, folder: Path) -> None:
        """Note that the folder has another name now."""
        self._folder = folder

    def release(self) -> None:
        """Give the folder up: the process still lives, but writes no more."""
        self._is_over.set()
        self._beating.join(BEAT)  # a disk that does not answer must not keep it
        try:
            (self._folder / self._file).unlink(missing_ok=True)
        except OSError as error:
            logger.debug("cannot remove %s: %s", self._folder / self._file, error)

    @property
    def _file(self) -> str:
        return f".owner-{self.claim.number}"

    def _beat(self) -> None:
        while not self._is_over.wait(BEAT):
            try:
                os.utime(self._folder / self._file)
            except OSError:
                continue  # it may answer the next time; and nobody but this process needs the file


def current(folder: Path) -> Claim | None:
    """Return the newest claim on a folder, of a process that lives or not; None without any."""
    return max(_claims(folder), key=lambda claim: claim.number, default=None)


def refuse_living(folder: Path, take_over: bool = False) -> None:
    """Raise ConfigError where a living process owns a folder; not with ``take_over``."""
    claim = current(folder)
    if claim is None or take_over or not is_alive(folder, claim):
        return
    raise ConfigError(
        f"{folder} belongs to a run that is going on, {claim.name}: wait for it, or end it first; "
        "--take-over (of train and fit-upsampler) makes it stop and takes the folder"
    )


def was_requeued(folder: Path) -> bool:
    """Return whether the folder's last owner was this Slurm job, before Slurm started it again."""
    claim = current(folder)
    return claim is not None and _is_requeued(claim, _own_claim(folder, 0, os.environ))


def is_alive(folder: Path, claim: Claim) -> bool:
    """Return whether the process of a claim lives and still wants the folder.

    An earlier start of this Slurm job does not count: Slurm has given it up. Takes up to a minute
    where the process belongs to another machine and was heard of in the last one.
    """
    own = _own_claim(folder, 0, os.environ)
    if _is_requeued(claim, own):
        return False
    path = folder / f".owner-{claim.number}"
    if not path.exists():
        return False
    if claim.machine and claim.machine == own.machine and claim.started:
        is_copy = os.path.exists(claim.folder) and not os.path.samefile(claim.folder, folder)
        return not is_copy and _start_of(claim.process) == claim.started
    return _is_touched(path, claim)


def _is_requeued(claim: Claim, own: Claim) -> bool:
    is_same_job = bool(own.slurm_job) and claim.slurm_job == own.slurm_job
    return is_same_job and claim.slurm_restart < own.slurm_restart


def _is_touched(path: Path, claim: Claim) -> bool:
    """Watch a file until it is touched, or has not been for too long."""
    try:
        first = _time_of(path)
        silent = max(0.0, _now(path.parent) - first)
        if silent < SILENCE:
            logger.info(
                "%s was owned by %s %.0f s ago; looking whether it lives, for up to %.0f s",
                path.parent, claim.name, silent, SILENCE - silent,
            )  # fmt: skip
        begin = time.monotonic()
        while silent + time.monotonic() - begin < SILENCE:
            time.sleep(min(1.0, BEAT / 5))
            if _time_of(path) != first:
                return True
    except FileNotFoundError:  # it has just ended
        return False
    return False


def _time_of(path: Path) -> float:
    with path.open("rb") as file:  # a network file system asks its server when a file is opened
        return os.fstat(file.fileno()).st_mtime


def _now(folder: Path) -> float:
    """Return the time by the clock that stamps the files of a folder."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _claims(folder: Path) -> list[Claim]:
    """Return all claims that a folder still has, also those that were not carried out."""
    claims = [_read(folder / f".owner-{number}", number) for number in _numbers(folder)]
    return [claim for claim in (*claims, _read(folder / OWNER)) if claim is not None]


def _numbers(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [int(match[1]) for name in names if (match := _CLAIM.fullmatch(name))]


def _read(path: Path, number: int = 0) -> Claim | None:
    """Read a claim; of one that is being written, only its number is known."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kinds = {name: type(value) for name, value in asdict(Claim()).items()}
        known = {name: kinds[name](value) for name, value in values.items() if name in kinds}
        return Claim(**{"number": number, **known})
    except OSError:
        return None
    except (ValueError, TypeError, AttributeError, RecursionError):
        return Claim(number=number, process=0, host="?") if number else None


def _own_claim(folder: Path, number: int, environment: Mapping[str, str]) -> Claim:
    return Claim(
        number=number,
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        process=os.getpid(),
        started=_start_of(os.getpid()),
        machine=_machine(),
        folder=str(folder.absolute()),
        slurm_job=environment.get("SLURM_JOB_ID", ""),
        slurm_restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
        time=time.time(),
    )


def _start_of(process: int) -> str:
    """Return when a process began, in ticks since its machine did; empty where it is over."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *values = text.rpartition(")")[2].split()  # the name before may hold anything
    return "" if state in "ZX" else values[18]


def _machine() -> str:
    """Return what two processes have in common whose numbers can be compared; else empty."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


State = Literal["running", "complete", "interrupted", "failed", "hung"]
"""``interrupted``: a signal asked it to stop, and it saved. ``failed``: the status has a reason."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """A stage at one moment. A process that is killed leaves ``running`` behind, with its time."""

    state: State
    step: int
    steps: int
    """Steps of the whole stage."""
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


class StatusFile:
    """Writes the status of a stage, which may be a file on a network, every few seconds.

    Args:
        folder: of the stage.
        steps: of the whole stage.
        images_per_step: over all processes.
        lock: of rank 0 on the folder.
    """

    def __init__(self, folder: Path, steps: int, images_per_step: int, lock: RunLock | None):
        self._folder, self._steps, self._lock = folder, steps, lock
        self._images_per_step = images_per_step
        self._time = -STATUS_SECONDS

    @property
    def is_due(self) -> bool:
        """Whether it was written long enough ago."""
        return time.monotonic() - self._time >= STATUS_SECONDS

    def write(
        self, state: State, step: int, images_per_second: float, reason: str = ""
    ) -> TakenOverError | None:
        """Write the status, unless the disk is full; returns an error where the folder is lost."""
        self._time = time.monotonic()
        left = (self._steps - step) * self._images_per_step
        status = Status(
            state=state,
            step=step,
            steps=self._steps,
            images_per_second=images_per_second,
            seconds_left=left / images_per_second if images_per_second else 0.0,
            reason=reason,
        )
        try:
            if self._lock is not None:
                self._lock.check()
            write_status(self._folder, status)
        except TakenOverError as error:
            return error
        except OSError as error:
            logger.warning("cannot write the status of %s: %s", self._folder, error)
        return None
