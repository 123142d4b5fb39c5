"""What a tar shard holds, checked strictly, and kept in a file beside it.

A tar reader takes a damaged header for the end of the archive, so a reader of streams loses the
rest of the shard without a word. Here a shard is used only when it is whole: every header valid, a
clean end marker, regular files with safe names, no name twice, a picture in every sample. The CRC
of each member is noted, and checked whenever the member is read.

``NAME.tar.index.jsonl`` beside the shard has one head line, which is all that is read at the start
of a run, and one line a sample. It is made on first use and again when size or time of the shard
differ. Where the folder cannot be written, the index stays in memory.
"""

import hashlib
import json
import logging
import os
import tarfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..errors import DataError
from ..files import reason_of, replacing
from .images import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

MAX_MEMBER_BYTES = 256 << 20
_VERSION = 1
_BLOCK = 512
_THREADS = 8  # hides the latency of a network file system


class Member(NamedTuple):
    """One file inside a shard."""

    offset: int
    size: int
    crc32: int


class Sample(NamedTuple):
    """Members that share a name up to the first dot, as webdataset groups them."""

    key: str
    members: dict[str, Member]
    """By lower-case suffix, without the dot."""

    @property
    def image_suffix(self) -> str | None:
        """Suffix of the picture: the first in ``IMAGE_SUFFIXES`` that there is."""
        return next((suffix for suffix in IMAGE_SUFFIXES if suffix in self.members), None)


@dataclass(frozen=True)
class Shard:
    """A checked shard: the head of its index."""

    path: Path
    size: int
    mtime_ns: int
    num_samples: int
    digest: str
    """sha256 of the sample lines, so of names, places and CRCs of all members."""
    kept: tuple[bytes, ...] = field(default=(), repr=False)
    """The sample lines, where they could not be stored."""

    def lines(self) -> Sequence[bytes]:
        """Return one line a sample, for :func:`parse_sample`."""
        if self.kept:
            return self.kept
        try:
            lines = index_path(self.path).read_bytes().splitlines()[1:]
        except OSError as error:
            raise DataError(f"{index_path(self.path)}: {reason_of(error)}; start again") from error
        if len(lines) != self.num_samples or _digest(lines) != self.digest:
            raise DataError(f"{index_path(self.path)} is damaged; delete it and start again")
        return lines


def index_path(shard: Path) -> Path:
    """Where the index of a shard is stored."""
    return shard.with_name(shard.name + ".index.jsonl")


def open_shards(paths: Sequence[Path]) -> list[Shard]:
    """Open the indexes of many shards at once, in order; see :func:`open_shard`."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(open_shard, paths))


def open_shard(path: Path) -> Shard:
    """Read the stored index of a shard, or make it.

    Raises:
        DataError: the shard cannot be read, is damaged, or has something no shard should have.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"shard {path}: {reason_of(error)}") from error
    shard = _read_head(path)
    if shard is None or (shard.size, shard.mtime_ns) != (status.st_size, status.st_mtime_ns):
        shard = _make(path, status)
    return shard


def parse_sample(line: bytes) -> Sample:
    """Read one sample line of an index."""
    key, members = json.loads(line)
    return Sample(key, {suffix: Member(*place) for suffix, place in members.items()})


def index_shard(path: Path) -> list[Sample]:
    """Walk through a tar file and list its samples.

    Raises:
        DataError: for everything the module's text names; one line with shard and reason.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            samples, end = _walk(tar, file)
            _check_end(file, end)
    except OSError as error:
        raise DataError(f"shard {path}: {reason_of(error)}") from error
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise DataError(
            f"shard {path} is not a whole, plain tar file: {reason_of(error)}; make it anew"
        ) from error
    if not samples:
        raise DataError(f"shard {path} has no pictures; remove it")
    return samples


def _walk(tar: tarfile.TarFile, file: BinaryIO) -> tuple[list[Sample], int]:
    """Return the samples, and where the last member ends."""
    samples: dict[str, Sample] = {}
    previous, end = "", 0
    for info in tar:
        end = info.offset_data + -(-info.size // _BLOCK) * _BLOCK
        key, suffix = _check_member(info)
        if not suffix:
            continue
        if key not in samples:
            samples[key] = Sample(key, {})
        elif key != previous or suffix in samples[key].members:
            raise ValueError(f"sample {key!r} comes twice")
        previous = key
        samples[key].members[suffix] = _measure(file, info)
    for sample in samples.values():
        if sample.image_suffix is None:
            raise ValueError(f"sample {sample.key!r} has no picture")
    return list(samples.values()), end


def _check_member(info: tarfile.TarInfo) -> tuple[str, str]:
    """Return key and suffix of a member; the suffix is empty where webdataset skips it too."""
    name = info.name
    if name.startswith("/") or ".." in name.split("/") or not name.isprintable():
        raise ValueError(f"unsafe name {name!r}")
    if info.isdir():
        return "", ""
    if not info.isreg() or info.issparse():
        raise ValueError(f"{name!r} is not a regular file")
    if info.size > MAX_MEMBER_BYTES:
        raise ValueError(f"{name!r} has {info.size} bytes, more than {MAX_MEMBER_BYTES}")
    folder, slash, file_name = name.rpartition("/")
    stem, _, suffix = file_name.partition(".")
    if not stem or (not slash and stem.startswith("__") and name.endswith("__")):
        return "", ""
    return folder + slash + stem, suffix.lower()


def _measure(file: BinaryIO, info: tarfile.TarInfo) -> Member:
    file.seek(info.offset_data)
    data = file.read(info.size)
    if len(data) != info.size:
        raise ValueError(f"cut off inside {info.name!r}")
    return Member(info.offset_data, info.size, zlib.crc32(data))


def _check_end(file: BinaryIO, end: int) -> None:
    """Two blocks of zeros end an archive, and nothing else may follow."""
    file.seek(end)
    num_zeros = 0
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise ValueError(f"damaged after byte {end}")
        num_zeros += len(chunk)
    if num_zeros < 2 * _BLOCK:
        raise ValueError(f"no end marker after byte {end}, so it is cut off")


def _make(path: Path, status: os.stat_result) -> Shard:
    logger.info("indexing %s", path)
    lines = [json.dumps(sample, separators=(",", ":")).encode() for sample in index_shard(path)]
    shard = Shard(path, status.st_size, status.st_mtime_ns, len(lines), _digest(lines))
    head = {"version": _VERSION, **asdict(shard)}
    del head["path"], head["kept"]
    try:
        with replacing(index_path(path)) as temporary:
            temporary.write_bytes(b"\n".join([json.dumps(head).encode(), *lines]) + b"\n")
    except OSError as error:
        logger.info("index of %s stays in memory: %s", path, reason_of(error))
        return replace(shard, kept=tuple(lines))
    return shard


def _read_head(path: Path) -> Shard | None:
    """Return what is stored; None when it is missing, of another version, or no index at all."""
    try:
        with index_path(path).open("rb") as file:
            head = json.loads(file.readline())
        if head.pop("version") != _VERSION:
            return None
        return Shard(path, **head)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _digest(lines: Sequence[bytes]) -> str:
    return hashlib.sha256(b"\n".join(lines)).hexdigest()
