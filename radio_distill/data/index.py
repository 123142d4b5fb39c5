"""What a tar shard holds, found out once and kept in a file beside it.

:mod:`.walk` checks a shard and lists its samples; the CRC of each member is noted, and checked
whenever the member is read. ``NAME.tar.index.jsonl`` beside the shard has one head line, which is
all that is read at the start of a run, and one line a sample. It is made on first use and again
when size or time of the shard differ, or when the head is damaged. Several processes may make it at
once: each writes a file of its own, and all of them write the same. Where the folder cannot be
written, the index stays in memory.
"""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import reason_of, replacing
from .names import printable
from .patience import open_regular
from .walk import MAX_MEMBER_BYTES, LeftOut, Member, Sample, walk_shard

logger = logging.getLogger(__name__)

_VERSION = 2
_MAX_HEAD_BYTES = 1 << 20
_THREADS = 8  # hides the latency of a network file system


@dataclass(frozen=True)
class Shard:
    """A checked shard: the head of its index."""

    path: Path
    size: int
    mtime_ns: int
    num_samples: int
    digest: str
    """sha256 of the sample lines, so of names, places and CRCs of all members."""
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    """What the shard holds besides and must not be used, by kind; see :mod:`.walk`."""
    kept: tuple[bytes, ...] = field(default=(), repr=False)
    """The sample lines, where they could not be stored."""

    @property
    def num_left_out(self) -> int:
        """Samples that are not used."""
        return sum(item.num_samples for item in self.left_out.values())

    def lines(self) -> Sequence[bytes]:
        """Return one line a sample, for :func:`parse_sample`.

        Raises:
            OSError: the index cannot be read.
            DataError: it is not the one whose head was read.
        """
        if self.kept:
            return self.kept
        with open_regular(index_path(self.path)) as file:
            lines = file.read().splitlines()[1:]
        if len(lines) != self.num_samples or _digest(lines) != self.digest:
            raise DataError(
                f"{printable(index_path(self.path))} is damaged; delete it and start again"
            )
        return lines


def index_path(shard: Path) -> Path:
    """Where the index of a shard is stored."""
    return shard.with_name(shard.name + ".index.jsonl")


def open_shards(paths: Sequence[Path]) -> list[Shard]:
    """Open the indexes of many shards at once, in order; raises as :func:`open_shard` does."""
    shards = []
    for result in try_open_shards(paths):
        if isinstance(result, DataError):
            raise result
        shards.append(result)
    return shards


def try_open_shards(paths: Sequence[Path]) -> list[Shard | DataError]:
    """Open the indexes of many shards at once; in place of a damaged one stands its error."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_try_open, paths))


def open_shard(path: Path) -> Shard:
    """Read the stored index of a shard, or make it.

    Raises:
        DataError: the shard cannot be read, is damaged, or has nothing that can be used.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"shard {printable(path)}: {reason_of(error)}") from error
    shard = _read_head(path)
    if shard is None or (shard.size, shard.mtime_ns) != (status.st_size, status.st_mtime_ns):
        shard = _make(path, status)
    return shard


def parse_sample(line: bytes) -> Sample:
    """Read one sample line of an index; raises DataError where it is none."""
    try:
        key, members = json.loads(line)
        sample = Sample(key, {suffix: Member(*place) for suffix, place in members.items()})
        whole = all(0 <= member.size <= MAX_MEMBER_BYTES for member in sample.members.values())
        if sample.image_suffix is None or not whole:
            raise ValueError("no picture, or one of impossible size")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"line of an index is damaged ({reason_of(error)}); delete it") from error
    return sample


def _try_open(path: Path) -> Shard | DataError:
    try:
        return open_shard(path)
    except DataError as error:
        return error


def _make(path: Path, status: os.stat_result) -> Shard:
    logger.info("indexing %s", printable(path))
    contents = walk_shard(path)
    lines = [json.dumps(sample, separators=(",", ":")).encode() for sample in contents.samples]
    digest = _digest(lines)
    shard = Shard(path, status.st_size, status.st_mtime_ns, len(lines), digest, contents.left_out)
    try:
        with replacing(index_path(path)) as temporary:
            temporary.write_bytes(b"\n".join([_head_line(shard), *lines]) + b"\n")
    except OSError as error:
        logger.info("index of %s stays in memory: %s", printable(path), reason_of(error))
        return replace(shard, kept=tuple(lines))
    return shard


def _head_line(shard: Shard) -> bytes:
    head = {"version": _VERSION, **asdict(shard)}
    del head["path"], head["kept"]
    return json.dumps({**head, "crc32": _crc32(head)}).encode()


def _read_head(path: Path) -> Shard | None:
    """Return what is stored; None when it is missing, damaged, or of another version."""
    try:
        with open_regular(index_path(path)) as file:
            head = json.loads(file.readline(_MAX_HEAD_BYTES))
        if head.pop("crc32") != _crc32(head) or head.pop("version") != _VERSION:
            return None
        left_out = {
            kind: LeftOut(count, tuple(names))
            for kind, (count, names) in head.pop("left_out").items()
        }
        return Shard(path, **head, left_out=left_out)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _crc32(head: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(head, sort_keys=True).encode())


def _digest(lines: Sequence[bytes]) -> str:
    return hashlib.sha256(b"\n".join(lines)).hexdigest()
