"""Bytes of single samples out of indexed shards, by ``pread``.

Files are opened when first needed, in each process for itself, and the least recently used ones are
closed, so that a run over 100 000 shards stays below the limit of open files.
"""

import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import DataError
from ..files import reason_of
from .images import BadImageError
from .index import Member, Sample, Shard, parse_sample


class _OpenShard(NamedTuple):
    descriptor: int
    lines: Sequence[bytes]


class ShardReader:
    """Reads samples of many shards, in any order.

    Args:
        shards: the shards that samples are numbered in.
        max_open: how many of them are open at a time.
    """

    def __init__(self, shards: Sequence[Shard], max_open: int = 64):
        self.shards = shards
        self._max_open = max_open
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for item in self._open.values():
            os.close(item.descriptor)

    def sample(self, shard: int, number: int) -> Sample:
        """Return what the index knows of sample ``number`` of shard ``shard``."""
        return parse_sample(self._opened(shard).lines[number])

    def key(self, shard: int, sample: Sample) -> str:
        """Return ``shard:member`` of a sample's picture, for logs."""
        return f"{self.shards[shard].path.name}:{sample.key}.{sample.image_suffix}"

    def image_bytes(self, shard: int, sample: Sample) -> bytes:
        """Read the picture of a sample.

        Raises:
            BadImageError: the bytes are not those that were indexed.
            DataError: the shard cannot be read any more.
        """
        assert sample.image_suffix, f"{sample.key}: the index admits no sample without picture"
        return self._read(shard, sample.members[sample.image_suffix])

    def _read(self, shard: int, member: Member) -> bytes:
        try:
            data = os.pread(self._opened(shard).descriptor, member.size, member.offset)
        except OSError as error:
            raise DataError(f"shard {self.shards[shard].path}: {reason_of(error)}") from error
        if len(data) != member.size or zlib.crc32(data) != member.crc32:
            raise BadImageError("checksum", "content differs from the index")
        return data

    def _opened(self, number: int) -> _OpenShard:
        if number not in self._open:
            if len(self._open) >= self._max_open:
                os.close(self._open.popitem(last=False)[1].descriptor)
            self._open[number] = _open(self.shards[number])
        self._open.move_to_end(number)
        return self._open[number]


def _open(shard: Shard) -> _OpenShard:
    lines = shard.lines()
    try:
        descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"shard {shard.path}: {reason_of(error)}") from error
    if os.fstat(descriptor).st_size != shard.size:
        os.close(descriptor)
        raise DataError(f"shard {shard.path} changed during the run; start again")
    return _OpenShard(descriptor, lines)
