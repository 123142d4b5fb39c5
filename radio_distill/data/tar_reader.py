"""Bytes of single samples out of indexed shards, by ``pread``.

What fails is tried once more with the file opened anew, which is enough after a failover of a file
server; what fails again, or is not answered in time, is a bad image, not the end of the run.
"""

import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, TypeVar

from ..errors import DataError
from ..system.files import printable, reason_of
from .cache import CacheError
from .images import BadImageError
from .read_timeout import READ_TIMEOUT, DiskStalledError, NoAnswerError, ReadTimeout
from .remote import FetchError, Remote, open_place
from .tar_index import Shard, parse_sample
from .tar_scan import Member, Sample

Value = TypeVar("Value")


class _OpenShard:
    """An open file and its index; closed when nobody holds it, and so never under a read."""

    def __init__(self, shard: Shard):
        self.file: BinaryIO = open_place(shard.path)
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


class LostShardError(DataError):
    """Shards that were there at the start and cannot be fetched any more."""

    exit_status = 1
    """The network may be back the next time."""


class ShardReader:
    """Reads samples of many shards, in any order.

    Files are opened when first needed, in each process for itself, and the least recently used ones
    are closed, so that a run over 100 000 shards stays below the limit of open files.

    Args:
        shards: the shards that samples are numbered in.
        max_open: how many of them are open at a time.
        timeout: seconds after which a read counts as stalled.
        max_lost: share of the shards that may be lost because they cannot be fetched.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        max_open: int = 64,
        timeout: float = READ_TIMEOUT,
        max_lost: float = 0.0,
    ):
        self.shards = shards
        self._max_lost = max_lost
        self._lost: dict[int, str] = {}
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
            LostShardError: more shards cannot be fetched than may be lost.
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
            DiskStalledError, LostShardError: as :meth:`sample`.
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
        except (DiskStalledError, LostShardError, CacheError):
            raise
        except (NoAnswerError, OSError, DataError) as error:
            self._open.pop(shard, None)
            kind = "stalled" if isinstance(error, NoAnswerError) else "unreadable"
            reason = f"shard {printable(self.shards[shard].path)}: {reason_of(error)}"
            raise BadImageError(kind, reason) from error

    def _opened(self, number: int) -> _OpenShard:
        if number not in self._open:
            shard = self.shards[number]
            if isinstance(shard.path, Remote):  # which limits the time by itself
                opened = self._fetched(number)
            else:
                opened = self._timeout.run(_OpenShard, shard)
            if len(self._open) >= self._max_open:
                self._open.popitem(last=False)
            self._open[number] = opened
        self._open.move_to_end(number)
        return self._open[number]

    def _fetched(self, number: int) -> _OpenShard:
        """Open a remote shard; one that could not be fetched once is not tried for every image."""
        if number in self._lost:
            raise FetchError(self._lost[number])
        try:
            return _OpenShard(self.shards[number])
        except FetchError as error:
            self._lost[number] = str(error)
            if len(self._lost) > self._max_lost * len(self.shards):
                name = printable(self.shards[number].path)
                raise LostShardError(
                    f"shard {name}: {error}; {len(self._lost)} of {len(self.shards)} are lost, and "
                    f"data.max_bad_shards is {self._max_lost:g}"
                ) from None
            raise
