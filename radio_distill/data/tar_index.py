"""Indexes of tar shards: their contents, found out once and kept in a file.

:mod:`.tar_scan` checks a shard and lists its samples; the CRC of each member is noted, and checked
whenever the member is read. An index has one head line, which is all that is read at the start of a
run, and one line a sample. It is made on first use and again when size or time of the shard differ,
or when the head is damaged. Of a damaged shard the head says what is wrong, so that it is not read
again either. Several processes may make an index at once: each writes a file of its own, and all of
them write the same.

An index lies in one of several folders, which are tried in turn: ``BESIDE`` the shard, as
``NAME.tar.index.jsonl``, or anywhere, under a name that tells the shards of different folders
apart. Where none can be written, the index stays in memory.
"""

import hashlib
import json
import logging
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..errors import DataError
from ..system.files import open_regular, printable, reason_of, replacing
from .cache import CacheError, make_room
from .images import MAX_MEMBER_BYTES
from .remote import Place, Remote, open_place
from .tar_scan import DamagedShardError, LeftOut, Member, Sample, scan_shard

logger = logging.getLogger(__name__)
Value = TypeVar("Value")

BESIDE = "beside"
"""In place of a folder for indexes: each beside its shard."""

_VERSION = 3
_MAX_HEAD_BYTES = 1 << 20
_THREADS = 8  # hides the latency of a network file system
_SECONDS_A_LINE = 60.0  # between lines that say how far a long reading is


@dataclass(frozen=True)
class Shard:
    """A checked shard: the head of its index."""

    path: Place
    size: int
    mtime_ns: int
    """Time of the last change; of a remote shard a number that stands for its version."""
    num_samples: int
    """Samples in use."""
    digest: str
    """sha256 of the sample lines, so of names, places and CRCs of all members."""
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    """Samples that must not be used, by kind; see :mod:`.tar_scan`."""
    notes: Mapping[str, LeftOut] = field(default_factory=dict)
    """Members that are notable but no fault, by kind."""
    damage: str = ""
    """The reason why nothing of the shard can be used; empty where it can."""
    index: Path | None = None
    """The file that stores the sample lines."""
    kept: tuple[bytes, ...] = field(default=(), repr=False)
    """The sample lines, where they could not be stored."""
    chosen: bytes = field(default=b"", repr=False)
    """Which samples a curation keeps, as packed bits; empty for all."""

    @property
    def num_left_out(self) -> int:
        """Samples that are not used."""
        return sum(item.num_samples for item in self.left_out.values())

    def lines(self) -> Sequence[bytes]:
        """Return one line a sample in use, for :func:`parse_sample`.

        Raises:
            OSError: the index cannot be read.
            DataError: it is not the one whose head was read.
        """
        lines: Sequence[bytes] = self.kept
        if self.index is not None:
            with open_regular(self.index) as file:
                lines = file.read().splitlines()[1:]
            if _digest(lines) != self.digest:
                raise DataError(f"{printable(self.index)} is damaged; delete it and start again")
        if not self.chosen:
            return lines
        return list(compress(lines, np.unpackbits(np.frombuffer(self.chosen, np.uint8))))


def index_path(shard: Place, folder: str = BESIDE) -> Path:
    """Return the place of a shard's index in a folder; beside a remote shard is in the cache."""
    if isinstance(shard, Remote):
        parent = shard.cache.folder if folder == BESIDE else Path(folder).expanduser()
        return parent / f"{shard.name[:100]}.{shard.key}.index.jsonl"
    if folder == BESIDE:
        return shard.with_name(shard.name + ".index.jsonl")
    place = hashlib.sha256(os.fsencode(os.path.abspath(shard.parent))).hexdigest()[:16]
    return Path(folder).expanduser() / f"{shard.name}.{place}.index.jsonl"


def open_shard(path: Place, folders: Sequence[str] = (BESIDE,)) -> Shard:
    """Read the stored index of a shard, or make it.

    Raises:
        DataError: the shard cannot be read, or is damaged.
    """
    shard = _stored(path, folders)
    return _make_index(shard, folders) if isinstance(shard, _Unindexed) else shard


def open_shards(paths: Sequence[Place]) -> list[Shard]:
    """Open the indexes of many shards at once, in order; raises as :func:`open_shard` does."""
    shards = []
    for result in try_open_shards(paths):
        if isinstance(result, DataError):
            raise result
        shards.append(result)
    return shards


def try_open_shards(
    paths: Sequence[Place], folders: Sequence[str] = (BESIDE,)
) -> list[Shard | DataError]:
    """Open the indexes of many shards at once; in place of a damaged one stands its error.

    Shards without an index are read whole; why, how far, and where the indexes go is logged.
    """
    pool = ThreadPoolExecutor(_THREADS)
    try:
        results = list(pool.map(lambda path: _trying(_stored, path, folders), paths))
        unindexed = [result for result in results if isinstance(result, _Unindexed)]
        made = iter(_make_indexes(pool, unindexed, folders) if unindexed else [])
        return [next(made) if isinstance(result, _Unindexed) else result for result in results]
    finally:  # whoever presses Ctrl-C does not wait for terabytes
        pool.shutdown(wait=False, cancel_futures=True)


def parse_sample(line: bytes) -> Sample:
    """Read one sample line of an index; raises DataError where it is none."""
    try:
        key, members = json.loads(line)
        sample = Sample(key, {suffix: Member(*place) for suffix, place in members.items()})
        whole = all(0 <= member.size <= MAX_MEMBER_BYTES for member in sample.members.values())
        if sample.image_suffix is None or not whole:
            raise ValueError("no image, or one of impossible size")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"line of an index is damaged ({reason_of(error)}); delete it") from error
    return sample


class _Unindexed(NamedTuple):
    """A shard whose index must be made."""

    path: Place
    size: int
    mtime_ns: int
    why: str


def _trying(function: Callable[..., Value], *arguments: Any) -> Value | DataError:
    try:
        return function(*arguments)
    except CacheError:
        raise
    except DataError as error:
        return error


def _stored(path: Place, folders: Sequence[str]) -> Shard | _Unindexed:
    """Return what the first index says that fits the shard."""
    try:
        if isinstance(path, Remote):
            path = path.look()
            size, mtime_ns = path.size, path.mtime_ns
        else:
            status = path.stat()
            size, mtime_ns = status.st_size, status.st_mtime_ns
    except OSError as error:
        raise DataError(f"shard {printable(path)}: {reason_of(error)}") from error
    reasons = []
    for place in _places(path, folders):
        shard = _read_head(path, place)
        if isinstance(shard, str):
            reasons.append(shard)
        elif shard.mtime_ns != mtime_ns or size not in (-1, shard.size):
            reasons.append("whose index is of other contents")
        elif shard.damage:
            raise DataError(
                f"shard {printable(path)} {shard.damage} (if it is mended and nothing but its "
                f"bytes changed, delete {printable(shard.index)})"
            )
        else:
            if isinstance(path, Remote) and reasons:  # other machines look in the first places
                with suppress(OSError):
                    return _store(shard, list(shard.lines()), folders)
            return shard
    return _Unindexed(path, size, mtime_ns, next(filter(None, reasons), "without an index"))


def _places(path: Place, folders: Sequence[str]) -> list[Path]:
    """Return where indexes of a shard are looked for; of a remote one in the cache last."""
    names = list(dict.fromkeys([*folders, BESIDE]))
    if isinstance(path, Remote):
        names = [*(name for name in names if name != BESIDE), BESIDE]
    return [index_path(path, name) for name in names]


def _make_index(shard: _Unindexed, folders: Sequence[str]) -> Shard:
    path, size, mtime_ns, _ = shard
    try:
        contents = scan_shard(path)
        if size < 0:  # nobody knew before it was read
            with open_place(path) as file:
                size = os.fstat(file.fileno()).st_size
    except DamagedShardError as error:
        if path.suffix.lower() == ".tar":  # else it may be anything, and gets no file of ours
            _store(Shard(path, size, mtime_ns, 0, "", damage=error.reason), [], folders)
        raise
    if isinstance(path, Remote):
        make_room(path.cache)  # many at once are above the bound while they are in use
    lines = [json.dumps(sample, separators=(",", ":")).encode() for sample in contents.samples]
    digest = _digest(lines)
    indexed = Shard(path, size, mtime_ns, len(lines), digest, contents.left_out, contents.notes)
    return _store(indexed, lines, folders)


def _store(shard: Shard, lines: list[bytes], folders: Sequence[str]) -> Shard:
    """Write an index to the first folder that can be written; of a remote shard, to all."""
    head = {"version": _VERSION, **asdict(shard)}
    del head["path"], head["kept"], head["index"], head["chosen"]
    head_line = json.dumps({**head, "crc32": _crc32(head)}).encode()
    is_remote, stored = isinstance(shard.path, Remote), None
    for place in _places(shard.path, folders)[: None if is_remote else len(folders)]:
        try:
            with replacing(place) as temporary:
                temporary.write_bytes(b"\n".join([head_line, *lines]) + b"\n")
        except OSError as error:
            logger.debug("no index at %s: %s", printable(place), reason_of(error))
        else:
            stored = stored or place
            if not is_remote:
                break
    return replace(shard, index=stored, kept=() if stored else tuple(lines))


def _make_indexes(
    pool: Executor, unindexed: Sequence[_Unindexed], folders: Sequence[str]
) -> list[Shard | DataError]:
    """Index many shards; says why, how far that is, and which indexes lie elsewhere or nowhere."""
    number, size = len(unindexed), sum(max(0, item.size) for item in unindexed)
    reasons = Counter(item.why for item in unindexed).most_common()
    why = ", ".join(f"{count} {reason}" for reason, count in reasons)
    volume = f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
    logger.info("reading %d shards whole, once, to index them (%s): %s", number, volume, why)
    results: list[Shard | DataError] = []
    said, done = time.monotonic(), 0
    indexing = [pool.submit(_trying, _make_index, item, folders) for item in unindexed]
    for item, future in zip(unindexed, indexing, strict=True):
        while not wait([future], timeout=1.0).done:
            pass  # Ctrl-C just before a wait without end would be noticed after it
        results.append(future.result())
        done += max(0, item.size)
        if time.monotonic() - said > _SECONDS_A_LINE:
            said = time.monotonic()
            numbers = len(results), number, done / 1e9, size / 1e9
            logger.info("indexed %d of %d shards, %.3g of %.3g GB", *numbers)
    shards = [result for result in results if isinstance(result, Shard)]
    wanted = [_places(shard.path, folders)[0] for shard in shards]
    pairs = [(shard.index, place) for shard, place in zip(shards, wanted, strict=True)]
    elsewhere = [(index, place) for index, place in pairs if index not in (None, place)]
    if elsewhere:
        folder, place = (printable(path.parent) for path in elsewhere[0] if path is not None)
        logger.info(
            "indexes of %d shards go to %s, for %s cannot be written; data.index names another "
            "place", len(elsewhere), folder, place,
        )  # fmt: skip
    if nowhere := [place for index, place in pairs if index is None]:
        logger.warning(
            "indexes of %d shards stay in memory, for %s cannot be written, so every process and "
            "every start reads these shards whole; name a folder for them with data.index",
            len(nowhere), printable(nowhere[0].parent),
        )  # fmt: skip
    return results


def _read_head(path: Place, place: Path) -> Shard | str:
    """Return what is stored; else why that cannot be used, which is nothing where it is missing."""
    try:
        with open_regular(place) as file:
            head = json.loads(file.readline(_MAX_HEAD_BYTES))
        if head.pop("crc32") != _crc32(head):
            return "whose index is damaged"
        if head.pop("version") != _VERSION:
            return "whose index is of another version"
        left_out, notes = (
            {kind: LeftOut(number, tuple(names)) for kind, (number, names) in counts.items()}
            for counts in (head.pop("left_out"), head.pop("notes"))
        )
        return Shard(path=path, index=place, left_out=left_out, notes=notes, **head)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "whose index is damaged"


def _crc32(head: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(head, sort_keys=True).encode())


def _digest(lines: Sequence[bytes]) -> str:
    return hashlib.sha256(b"\n".join(lines)).hexdigest()
