"""The scan of a tar shard that finds its samples, and what must not be used.

A tar reader takes a damaged header for the end of the archive, so a reader of streams loses the
rest of the shard without a word. Here the structure must be whole: every header valid, none larger
than any honest one, each behind the one before it, and a clean end marker. Within a whole structure
single members may still be unfit; they are left out, and counted by kind:

``unsafe_name``   absolute, with ``..``, too long, or made to deceive; see :func:`is_safe`
``not_a_file``    a link to what is not in the shard, a device, a sparse file
``too_large``     above ``MAX_MEMBER_BYTES``
``duplicate``     of a member that came before; the first one stays
``no_image``      a sample of other members only

Members in a row of one sample and one kind count once, so that the counts are samples.

A member whose last suffix is that of an image is an image, and each makes a sample of its own:
``a.jpg``, ``a.1.jpg`` and ``a.left.png`` are three. Not so masks and the like: where two images
differ in the last suffix alone (``a.jpg``, ``a.png``), the one is used whose suffix comes first in
``IMAGE_SUFFIXES``, and a member such as ``a.seg.png`` is used only where there is no other. Members
of one name need not stand side by side. Arrays (``ARRAY_SUFFIXES``) are images in a shard that has
no others. What is notable but no fault is counted too, see ``NOTES``.
"""

import os
import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

from ..errors import DataError
from ..system.files import printable, reason_of, shortened
from .cache import CacheError
from .find import is_hidden
from .images import ARRAY_SUFFIXES, IMAGE_SUFFIXES, MAX_MEMBER_BYTES
from .remote import Place, open_place

_BLOCK = 512
_MOST_PADDING = 4 << 20  # bytes; tar's own default is 10 KiB
_MAX_HEADER_BYTES = 16 << 10  # long names and extended headers; tarfile would read gigabytes
_NAMES_KEPT = 10
_MAX_NAME_LENGTH = 1000
_UNSAFE = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f"  # control characters
    "\u2028\u2029"  # separators of lines and paragraphs
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks of writing direction
    "\ud800-\udc7f\udd00-\udfff"  # surrogates; the others stand for bytes that are not UTF-8
    "]"
)
_NO_PHOTOGRAPH = re.compile(
    r"(alpha|annotations?|depth|disparity|edges?|flow|gt|instances?|labels?|masks?|matte|normals?|"
    r"panoptic|seg|segmentation|semantic|thumb|thumbnail)[_-]?[0-9]*"
)
"""A word between key and last suffix of what belongs to an image and is none of its own."""

NOTES = {
    "further_image": "further images of a sample, used as images of their own",
    "second_file": "passed over as masks or second files of an image",
    "hidden": "passed over as hidden",
    "side_file": "passed over, for they belong to no image",
}
"""Words for members that are notable but no fault, by kind."""

_OTHER_FORMATS = {
    b"\x1f\x8b": "it is compressed with gzip; unpack it with `gunzip`",
    b"BZh": "it is compressed with bzip2; unpack it with `bunzip2`",
    b"\xfd7zXZ": "it is compressed with xz; unpack it with `unxz`",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd; unpack it with `unzstd`",
    b"PK\3\4": "it is a zip file; unpack it and make shards of it with `radio-distill shards`",
    b"PAR1": "it is a Parquet file; write its images into a tar",
    b"version https://git-lfs": "it is a pointer of Git LFS; fetch it with `git lfs pull`",
}


class Member(NamedTuple):
    """One file inside a shard."""

    offset: int
    size: int
    crc32: int


class Sample(NamedTuple):
    """One image, and the members that belong to it."""

    key: str
    """Name up to the first dot of the file's name, as webdataset has it."""
    members: dict[str, Member]
    """By lower-case suffix, without the dot."""

    @property
    def image_suffix(self) -> str | None:
        """Suffix of the image that is used."""
        images = [*filter(_is_image, self.members)] or [*filter(_is_array, self.members)]
        return min(images, key=_preference, default=None)


class LeftOut(NamedTuple):
    """Samples of one kind that are not used, or members that are notable."""

    num_samples: int
    names: tuple[str, ...]
    """The first few of them, fit for a log."""


class Contents(NamedTuple):
    """The contents of a shard."""

    samples: list[Sample]
    """Each with an image; none where the shard is empty."""
    left_out: dict[str, LeftOut]
    """Samples that must not be used, by kind."""
    notes: dict[str, LeftOut]
    """Members that are notable but no fault, by kind."""


class DamagedShardError(DataError):
    """A shard whose structure is not whole, so that nothing of it can be used.

    Args:
        reason: what is wrong, without the shard's name.
    """

    def __init__(self, shard: str, reason: str):
        super().__init__(f"{shard} {reason}")
        self.reason = reason


class _OtherFormatError(ValueError):
    """A file that is no damaged tar but something else; the text says what to do with it."""


def scan_shard(path: Place) -> Contents:
    """List the samples of a tar file, and what is left out.

    Raises:
        DamagedShardError: the structure is not whole; one line with shard and reason.
        DataError: the file cannot be read, or was written to meanwhile.
    """
    shard = f"shard {printable(path)}"
    try:
        with open_place(path) as file:
            before = os.fstat(file.fileno())
            contents = _scan(file)
            after = os.fstat(file.fileno())
    except OSError as error:
        raise DataError(f"{shard}: {reason_of(error)}") from error
    except CacheError:
        raise
    except Exception as error:  # tarfile fails on hostile bytes with nearly any exception
        reason = printable(reason_of(error)) or type(error).__name__
        hint = "" if isinstance(error, _OtherFormatError) else "; make it anew"
        reason = f"is not a whole, plain tar file: {reason}{hint}"
        raise DamagedShardError(shard, reason) from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"{shard} was written to while it was read; start again when it is whole")
    return contents


def describe(left_out: Mapping[str, LeftOut]) -> str:
    """Return kinds, counts and first names in one line."""
    return ", ".join(
        f"{number} {kind} ({', '.join(names[:3])}{', …' * (number > 3)})"
        for kind, (number, names) in sorted(left_out.items())
    )


def is_safe(name: str) -> bool:
    """Tell whether a member's name is relative, stays below its folder, and deceives nobody.

    A name out of a shard is never used as a path, and is escaped wherever it is shown. Those with
    control characters, separators of lines, or marks of writing direction are left out all the
    same; everything else that people have is used: spaces of every kind, joined emoji, bytes of
    another encoding than UTF-8.
    """
    rises = name.startswith("/") or ".." in name.split("/")
    return not rises and not _UNSAFE.search(name) and len(name) <= _MAX_NAME_LENGTH


def split_name(name: str) -> tuple[str, str]:
    """Return key and lower-case suffix of a member, split at the first dot as webdataset does.

    The suffix is empty where webdataset passes the member over.
    """
    folder, slash, file_name = name.rpartition("/")
    stem, _, suffix = file_name.partition(".")
    if not stem or (not slash and stem.startswith("__") and name.endswith("__")):
        return name, ""
    return folder + slash + stem, suffix.lower()


def _is_image(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in IMAGE_SUFFIXES


def _is_array(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in ARRAY_SUFFIXES


def _preference(suffix: str) -> tuple[bool, int]:
    stem, _, last = suffix.rpartition(".")
    return _is_no_photograph(stem), (*IMAGE_SUFFIXES, *ARRAY_SUFFIXES).index(last)


def _is_no_photograph(stem: str) -> bool:
    return any(map(_NO_PHOTOGRAPH.fullmatch, stem.split(".")))


def _scan(file: BinaryIO) -> Contents:
    members = _Members(file)
    end, size = 0, os.fstat(file.fileno()).st_size
    _check_beginning(file)
    headers: Any = _Headers(file)  # tarfile only reads, seeks and tells
    # Not the encoding of the locale, or a name would depend on the machine.
    with tarfile.TarFile(fileobj=headers, encoding="utf-8", errors="surrogateescape") as tar:
        for info in tar:
            if info.size < 0 or not end < tar.offset <= size:
                raise ValueError(f"header at byte {end} points outside the file, or back")
            end = tar.offset
            members.add(info)
    _check_end(file, end)
    return members.contents()


class _Headers:
    """The part of a shard that tarfile itself reads: headers, and nothing large."""

    def __init__(self, file: BinaryIO):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise ValueError(f"header of {size} bytes")
        return self._file.read(size)


def _count(counts: dict[str, LeftOut], kind: str, name: str) -> None:
    number, names = counts.get(kind, (0, ()))
    if number < _NAMES_KEPT:
        names = (*names, shortened(name))
    counts[kind] = LeftOut(number + 1, names)


class _Members:
    """Collects the samples of a shard and what is left out of it, member by member."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._groups: dict[str, dict[str, Member]] = {}
        self._links: list[tuple[str, str, tarfile.TarInfo]] = []
        self._left_out: dict[str, LeftOut] = {}
        self._notes: dict[str, LeftOut] = {}
        self._group, self._is_repeated = "", False  # of the members in a row that share a key
        self._last_left_out = ("", "")
        self._incomplete: set[str] = set()  # keys of which something is left out

    def add(self, info: tarfile.TarInfo) -> None:
        key, suffix = split_name(info.name)
        if suffix and not info.isdir() and key != self._group:
            self._group, self._is_repeated, self._last_left_out = key, False, ("", "")
        if not is_safe(info.name):
            self._leave_out("unsafe_name", key, info.name)
        elif info.isdir():
            return
        elif any(map(is_hidden, info.name.split("/"))):
            _count(self._notes, "hidden", info.name)
        elif info.issym():  # what it points to may come later
            self._links.append((key, suffix, info))
        elif not info.isreg() or info.issparse():
            self._add_link(key, suffix, info)
        elif info.size > MAX_MEMBER_BYTES:
            self._leave_out("too_large", key, info.name)
        elif not suffix:
            _count(self._notes, "side_file", info.name)
        elif not self._repeats(key, suffix, info.name):
            self._groups.setdefault(key, {})[suffix] = _measure(self._file, info)

    def contents(self) -> Contents:
        for key, suffix, info in self._links:
            self._is_repeated = False
            self._add_link(key, suffix, info)
        found = any(_is_image(suffix) for members in self._groups.values() for suffix in members)
        is_image = _is_image if found else _is_array
        samples = [sample for key in self._groups for sample in self._split(key, is_image)]
        folders = {posixpath.dirname(sample.key) for sample in samples}
        for key, members in self._groups.items():
            if any(map(is_image, members)) or key in self._incomplete:
                continue  # used, or counted already
            name = f"{key}.{next(iter(members))}"
            if samples and posixpath.dirname(key) not in folders:
                _count(self._notes, "side_file", name)
            else:
                self._leave_out("no_image", key, name)
        return Contents(samples, self._left_out, self._notes)

    def _add_link(self, key: str, suffix: str, info: tarfile.TarInfo) -> None:
        """Take a link for the member that it points to, within the shard."""
        names = [info.linkname] if info.islnk() else []
        if info.issym() and not info.linkname.startswith("/"):
            place = posixpath.join(posixpath.dirname(info.name), info.linkname)
            names = [posixpath.normpath(place), f"./{posixpath.normpath(place)}"]
        targets = (self._groups.get(key, {}).get(suffix) for key, suffix in map(split_name, names))
        member = next(filter(None, targets), None)
        if member is None or not suffix:
            self._leave_out("not_a_file", key, info.name)
        elif not self._repeats(key, suffix, info.name):
            self._groups.setdefault(key, {})[suffix] = member

    def _repeats(self, key: str, suffix: str, name: str) -> bool:
        """Leave a member out that was there before, and what follows it of its sample."""
        self._is_repeated = self._is_repeated or suffix in self._groups.get(key, {})
        if self._is_repeated:
            self._leave_out("duplicate", key, name)
        return self._is_repeated

    def _split(self, key: str, is_image: Callable[[str], bool]) -> list[Sample]:
        """Make a sample of each image of a group, and give it the members of its name.

        The others go with the first.
        """
        members = self._groups[key]
        images = list(filter(is_image, members))
        stems = dict.fromkeys(suffix.rpartition(".")[0] for suffix in images)
        own = [stem for stem in stems if not _is_no_photograph(stem)] or list(stems)[:1]
        parts: dict[str, dict[str, Member]] = {stem: {} for stem in own}
        for suffix, member in members.items() if own else ():
            parts[_owner(suffix, parts)][suffix] = member
        samples = [Sample(key, part) for part in parts.values()]
        used = [sample.image_suffix for sample in samples]
        for suffix in images:
            if suffix not in used:
                _count(self._notes, "second_file", f"{key}.{suffix}")
            elif suffix != used[0]:
                _count(self._notes, "further_image", f"{key}.{suffix}")
        return samples

    def _leave_out(self, kind: str, key: str, name: str) -> None:
        if (kind, key) != self._last_left_out:
            _count(self._left_out, kind, name)
        self._last_left_out = kind, key
        self._incomplete.add(key)


def _owner(suffix: str, stems: Mapping[str, Any]) -> str:
    """Return the longest of the stems that a suffix begins with, else the first."""
    stem = suffix
    while stem:
        stem = stem.rpartition(".")[0]
        if stem in stems and len(stems) > 1:
            return stem
    return next(iter(stems))


def _measure(file: BinaryIO, info: tarfile.TarInfo) -> Member:
    file.seek(info.offset_data)
    data = file.read(info.size)
    if len(data) != info.size:
        raise ValueError(f"cut off inside {info.name!r}")
    return Member(info.offset_data, info.size, zlib.crc32(data))


def _check_beginning(file: BinaryIO) -> None:
    """Name the format of a file that is well known and no tar."""
    start = file.read(_BLOCK)
    file.seek(0)
    for magic, text in _OTHER_FORMATS.items():
        # A tar begins with the name of its first member, which may begin so too.
        if start.startswith(magic) and start[257:262] != b"ustar":
            raise _OtherFormatError(text)


def _check_end(file: BinaryIO, end: int) -> None:
    """Two blocks of zeros end an archive, and only the padding of a tape's record may follow."""
    file.seek(end)
    rest = file.read(_MOST_PADDING + 1)
    if behind := rest.lstrip(b"\0"):
        if behind[257:262] == b"ustar":
            raise _OtherFormatError(
                f"another archive follows after byte {end}; join archives with `tar -A`, not `cat`"
            )
        raise ValueError(f"damaged after byte {end}")
    if len(rest) > _MOST_PADDING:
        raise ValueError(f"more than {_MOST_PADDING} bytes of zeros after byte {end}")
    if len(rest) < 2 * _BLOCK:
        raise ValueError(f"no end marker after byte {end}, so it is cut off")
