"""The walk through a tar shard that finds its samples, and what must not be used.

A tar reader takes a damaged header for the end of the archive, so a reader of streams loses the
rest of the shard without a word. Here the structure must be whole: every header valid, none larger
than any honest one, each behind the one before it, and a clean end marker. Within a whole structure
single members may still be unfit; they are left out, and counted by kind:

``unsafe_name``   absolute, with ``..``, not printable, or longer than any file name
``not_a_file``    a link, a device, a sparse file
``too_large``     above ``MAX_MEMBER_BYTES``
``duplicate``     of a sample that came before; the first one stays
``no_picture``    a sample of other members only

Members in a row of one sample and one kind count once, so that the counts are samples.
"""

import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import DataError
from ..files import reason_of
from .images import IMAGE_SUFFIXES
from .names import is_safe, printable, shortened, split_name
from .patience import open_regular

MAX_MEMBER_BYTES = 256 << 20
_BLOCK = 512
_MOST_PADDING = 4 << 20  # bytes; tar's own default is 10 KiB
_MAX_HEADER_BYTES = 16 << 10  # long names and extended headers; tarfile would read gigabytes
_NAMES_KEPT = 10


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


class LeftOut(NamedTuple):
    """Samples of one kind that are not used."""

    num_samples: int
    names: tuple[str, ...]
    """The first few of them, fit for a log."""


class Contents(NamedTuple):
    """What a shard holds."""

    samples: list[Sample]
    left_out: dict[str, LeftOut]
    """By kind."""


def walk_shard(path: Path) -> Contents:
    """List the samples of a tar file, and what is left out.

    Raises:
        DataError: the file cannot be read, its structure is damaged, it was written to meanwhile,
            or nothing in it can be used; one line with shard and reason.
    """
    shard = f"shard {printable(path)}"
    try:
        with open_regular(path) as file:
            before = os.fstat(file.fileno())
            contents = _walk(file)
            after = os.fstat(file.fileno())
    except OSError as error:
        raise DataError(f"{shard}: {reason_of(error)}") from error
    except Exception as error:  # tarfile fails on hostile bytes with nearly any exception
        reason = printable(reason_of(error)) or type(error).__name__
        raise DataError(
            f"{shard} is not a whole, plain tar file: {reason}; make it anew"
        ) from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"{shard} was written to while it was read; start again when it is whole")
    if not contents.samples:
        raise DataError(f"{shard} has no pictures{_in_brackets(contents.left_out)}; remove it")
    return contents


def describe(left_out: Mapping[str, LeftOut]) -> str:
    """Return kinds, counts and first names in one line."""
    return ", ".join(
        f"{item.num_samples} {kind} ({', '.join(item.names[:3])}{', …' * (item.num_samples > 3)})"
        for kind, item in sorted(left_out.items())
    )


def _in_brackets(left_out: Mapping[str, LeftOut]) -> str:
    return f" that can be used ({describe(left_out)})" if left_out else ""


def _walk(file: BinaryIO) -> Contents:
    found = _Found()
    end, size = 0, os.fstat(file.fileno()).st_size
    headers: Any = _Headers(file)  # tarfile only reads, seeks and tells
    # Not the encoding of the locale, or a name would depend on the machine.
    with tarfile.TarFile(fileobj=headers, encoding="utf-8", errors="surrogateescape") as tar:
        for info in tar:
            if info.size < 0 or not end < tar.offset <= size:
                raise ValueError(f"header at byte {end} points outside the file, or back")
            end = tar.offset
            found.add(info, file)
    _check_end(file, end)
    return found.contents()


class _Headers:
    """What tarfile itself reads of a shard: headers, and nothing large."""

    def __init__(self, file: BinaryIO):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise ValueError(f"header of {size} bytes")
        return self._file.read(size)


class _Found:
    """Samples and what is left out, member by member."""

    def __init__(self) -> None:
        self._samples: dict[str, Sample] = {}
        self._counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}
        self._group, self._is_first = "", True  # members in a row share a key, and make a sample
        self._last_left_out = ("", "")
        self._incomplete: set[str] = set()  # keys of which something is left out

    def add(self, info: tarfile.TarInfo, file: BinaryIO) -> None:
        key, suffix = split_name(info.name)
        if info.isreg() and suffix and key != self._group:
            self._group, self._is_first = key, key not in self._samples
            self._last_left_out = ("", "")
        kind = self._unfit(info, key, suffix)
        if kind:
            self._leave_out(kind, key, info.name)
        elif suffix and not info.isdir():
            self._samples.setdefault(key, Sample(key, {})).members[suffix] = _measure(file, info)

    def contents(self) -> Contents:
        samples = []
        for sample in self._samples.values():
            if sample.image_suffix:
                samples.append(sample)
            elif sample.key not in self._incomplete:  # else it is counted already
                self._leave_out("no_picture", sample.key, sample.key)
        counts = self._counts.items()
        return Contents(
            samples, {kind: LeftOut(count, tuple(self._names[kind])) for kind, count in counts}
        )

    def _unfit(self, info: tarfile.TarInfo, key: str, suffix: str) -> str:
        """Return the kind of what is wrong with a member, or nothing."""
        if not is_safe(info.name):
            return "unsafe_name"
        if info.isdir():
            return ""
        if not info.isreg() or info.issparse():
            return "not_a_file"
        if info.size > MAX_MEMBER_BYTES:
            return "too_large"
        if suffix and key in self._samples:
            is_new = self._is_first and suffix not in self._samples[key].members
            return "" if is_new else "duplicate"
        return ""

    def _leave_out(self, kind: str, key: str, name: str) -> None:
        if (kind, key) != self._last_left_out:
            self._counts[kind] += 1
            names = self._names.setdefault(kind, [])
            if len(names) < _NAMES_KEPT:
                names.append(shortened(name))
        self._last_left_out = kind, key
        self._incomplete.add(key)


def _measure(file: BinaryIO, info: tarfile.TarInfo) -> Member:
    file.seek(info.offset_data)
    data = file.read(info.size)
    if len(data) != info.size:
        raise ValueError(f"cut off inside {info.name!r}")
    return Member(info.offset_data, info.size, zlib.crc32(data))


def _check_end(file: BinaryIO, end: int) -> None:
    """Two blocks of zeros end an archive, and only the padding of a tape's record may follow."""
    file.seek(end)
    rest = file.read(_MOST_PADDING + 1)
    if rest.strip(b"\0"):
        raise ValueError(f"damaged after byte {end}")
    if len(rest) > _MOST_PADDING:
        raise ValueError(f"more than {_MOST_PADDING} bytes of zeros after byte {end}")
    if len(rest) < 2 * _BLOCK:
        raise ValueError(f"no end marker after byte {end}, so it is cut off")
