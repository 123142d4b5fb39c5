"""Bytes of single samples out of indexed shards, by ``pread``.

What fails is tried once more with the file opened anew, which is enough after a failover of a file
server; what fails again, or is not answered in time, is a bad image, not the end of the run.
"""

import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, NamedTuple, TypeVar

from ..errors import DataError
from ..system.files import open_regular, printable, reason_of
from .images import BadImageError
from .tar_index import Shard, parse_sample
from .tar_scan import Member, Sample

Value = TypeVar("Value")

READ_TIMEOUT = 60.0
"""Seconds for one read, where no recipe says otherwise."""
MAX_STALLED = 8
"""Reads of one process that may be without an answer at a time."""


class NoAnswerError(Exception):
    """A call that did not come back in time."""


class DiskStalledError(DataError):
    """A disk that answers no longer."""

    exit_status = 1
    """It may answer again, or on another machine, so that starting again is worth it."""


class ReadTimeout:
    """Runs calls that may never come back, for nothing in Python ends a system call.

    They run in a thread, one after the other. When one takes too long, its thread is left behind
    with all that it holds: its file stays open, for a descriptor that is closed under a read may be
    given to another file. Such threads are daemons, which a program does not wait for at its end.

    Args:
        seconds: how long each call may take.
    """

    def __init__(self, seconds: float):
        self._seconds, self._process = seconds, os.getpid()
        self._helper: _Helper | None = None
        self._stalled: list[threading.Thread] = []

    def __reduce__(self) -> tuple[type["ReadTimeout"], tuple[float]]:
        return ReadTimeout, (self._seconds,)

    def __del__(self) -> None:
        if self._helper is not None:
            self._helper.calls.put(None)

    def run(self, function: Callable[..., Value], *arguments: Any) -> Value:
        """Return what ``function`` returns, or raise what it raises.

        Raises:
            NoAnswerError: it takes too long.
            DiskStalledError: so do others, ``MAX_STALLED`` in all.
        """
        if self._process != os.getpid():  # threads do not survive a fork
            self._process, self._helper, self._stalled = os.getpid(), None, []
        helper, self._helper = self._helper or _start_helper(), None
        helper.calls.put((function, arguments))
        try:
            value, error = helper.answers.get(timeout=self._seconds)
        except BaseException as failure:  # Ctrl-C too: the answer must not reach the next who asks
            helper.calls.put(None)
            if not isinstance(failure, Empty):
                raise
            self._stalled = [*(one for one in self._stalled if one.is_alive()), helper.thread]
            if len(self._stalled) < MAX_STALLED:
                raise NoAnswerError(f"no answer within {self._seconds:g} s") from None
            raise DiskStalledError(
                f"the disk does not answer: {len(self._stalled)} reads have taken more than "
                f"{self._seconds:g} s; fix the disk or raise data.read_timeout, and start again"
            ) from None
        self._helper = helper
        try:
            if error is not None:
                raise error
            return value
        finally:
            del error  # it holds this frame, and with it what was to be read


class _Helper(NamedTuple):
    """A thread that makes one call after the other, until it gets None."""

    calls: "SimpleQueue[Any]"
    answers: "SimpleQueue[Any]"
    thread: threading.Thread


def _start_helper() -> _Helper:
    calls: SimpleQueue[Any] = SimpleQueue()
    answers: SimpleQueue[Any] = SimpleQueue()
    thread = threading.Thread(target=_serve, args=(calls, answers), name="read", daemon=True)
    thread.start()
    return _Helper(calls, answers, thread)


def _serve(calls: "SimpleQueue[Any]", answers: "SimpleQueue[Any]") -> None:
    while (call := calls.get()) is not None:
        answers.put(_outcome(*call))
        del call  # it would keep a file open until the next one


def _outcome(function: Callable[..., Any], arguments: Any) -> tuple[Any, BaseException | None]:
    try:
        return function(*arguments), None
    except BaseException as error:
        return None, error


class _OpenShard:
    """An open file and its index; closed when nobody holds it, and so never under a read."""

    def __init__(self, shard: Shard):
        self.file: BinaryIO = open_regular(shard.path)
        self.lines = shard.lines()
        if os.fstat(self.file.fileno()).st_size != shard.size:
            raise DataError("changed during the run")

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()

    def read(self, member: Member) -> bytes:
        data = os.pread(self.file.fileno(), member.size, member.offset)
        if len(data) != member.size:
            raise DataError(f"ends before byte {member.offset + member.size}")
        return data


class ShardReader:
    """Reads samples of many shards, in any order.

    Files are opened when first needed, in each process for itself, and the least recently used ones
    are closed, so that a run over 100 000 shards stays below the limit of open files.

    Args:
        shards: the shards that samples are numbered in.
        max_open: how many of them are open at a time.
        timeout: seconds after which a read counts as stalled.
    """

    def __init__(self, shards: Sequence[Shard], max_open: int = 64, timeout: float = READ_TIMEOUT):
        self.shards = shards
        self._max_open = max_open
        self._timeout = ReadTimeout(timeout)
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def sample(self, shard: int, number: int) -> Sample:
        """Return what the index knows of sample ``number`` of shard ``shard``.

        Raises:
            BadImageError: shard or index cannot be read (``unreadable``, ``stalled``).
            DiskStalledError: the disk has left too many reads without an answer.
        """
        return self._twice(shard, lambda: parse_sample(self._opened(shard).lines[number]))

    def key(self, shard: int, sample: Sample | int) -> str:
        """Return ``shard:member`` of a sample's image, for logs; of a number, ``shard:#3``."""
        name = f"#{sample}" if isinstance(sample, int) else f"{sample.key}.{sample.image_suffix}"
        return printable(f"{self.shards[shard].path.name}:{name}")

    def image_bytes(self, shard: int, sample: Sample) -> bytes:
        """Read the image of a sample.

        Raises:
            BadImageError: the bytes are not those that were indexed (``checksum``), or as
                :meth:`sample`.
            DiskStalledError: as :meth:`sample`.
        """
        assert sample.image_suffix, f"{sample.key}: the index admits no sample without image"
        member = sample.members[sample.image_suffix]
        data = self._twice(shard, lambda: self._timeout.run(self._opened(shard).read, member))
        if zlib.crc32(data) != member.crc32:
            raise BadImageError("checksum", "content differs from the index")
        return data

    def _twice(self, shard: int, action: Callable[[], Value]) -> Value:
        """Do something with a shard; where it fails, once more with the file opened anew."""
        try:
            return self._once(shard, action)
        except BadImageError as error:
            if error.kind == "stalled":
                raise
        return self._once(shard, action)

    def _once(self, shard: int, action: Callable[[], Value]) -> Value:
        try:
            return action()
        except DiskStalledError:
            raise
        except (NoAnswerError, OSError, DataError) as error:
            self._open.pop(shard, None)
            kind = "stalled" if isinstance(error, NoAnswerError) else "unreadable"
            reason = f"shard {printable(self.shards[shard].path)}: {reason_of(error)}"
            raise BadImageError(kind, reason) from error

    def _opened(self, number: int) -> _OpenShard:
        if number not in self._open:
            opened = self._timeout.run(_OpenShard, self.shards[number])
            if len(self._open) >= self._max_open:
                self._open.popitem(last=False)
            self._open[number] = opened
        self._open.move_to_end(number)
        return self._open[number]
