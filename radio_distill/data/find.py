"""Lists the files below folders, and the shards that the entries of `data.shards` name.

One rule holds for images, shards, held-out and labelled sets: links are followed, but not back to a
folder that one comes from; hidden files and folders are passed over; what is passed over, leads
nowhere or cannot be read is counted, so that it can be said.

An entry of `data.shards` is a file, a folder that is searched for ``*.tar``, a pattern with ``*``,
``?``, ``[]`` or braces (``{000000..000127}``, ``{a,b}``), several of these joined by ``::``, or a
text file that names one a line. What exists under the very name that is written is taken for that,
whatever signs are in it. An address (``s3://…``) or a command (``pipe:…``) names a shard that lies
elsewhere, where there is a cache for it; see :mod:`.remote`.
"""

import glob
import logging
import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from ..errors import DataError
from ..system.files import printable, reason_of, refuse_unreadable, shortened
from .cache import Cache
from .images import ARRAY_SUFFIXES, IMAGE_SUFFIXES, readable_suffixes, what_reads
from .remote import PACKAGES, PIPE, FetchError, Place, Remote, matching, shown

logger = logging.getLogger(__name__)

_SUFFIXES_SHOWN = 8
_MADE_BY_SYSTEMS = {
    *("__macosx", "@eadir", "$recycle.bin", "system volume information"),
    *("thumbs.db", "desktop.ini"),
}
_MAX_EXPANDED = 1_000_000
_MAX_LIST_BYTES = 64 << 20
_ADDRESS = re.compile(r"(?i)\s*\||\w[\w+.-]*://|(pipe|s3a?|gs|gcs|hdfs|hf|https?|ftp|ssh|file):")
_JOINT = re.compile(r"(?<!\[)::")  # not that of an IPv6 address
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_LISTS = (".txt", ".lst", ".list")
_PACKED = (
    *(".gz", ".tgz", ".bz2", ".tbz2", ".tbz", ".xz", ".txz", ".zst", ".tzst"),
    *(".zip", ".7z", ".rar"),
)
_TABLES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".yaml", ".yml")
_MAKE_THEM = "make them with `radio-distill shards SRC OUT`"


def is_address(entry: str) -> bool:
    """Tell whether an entry of `data.shards` is an address or a command, and so no path."""
    return _ADDRESS.match(entry) is not None


def is_hidden(name: str) -> bool:
    """Tell whether the name of a file or folder says that it is not for the eye.

    That is a dot at its beginning (``.ipynb_checkpoints``, ``._a.jpg``), or a name that operating
    systems give to files of their own (``Thumbs.db``, ``__MACOSX``).
    """
    dotted = name.startswith(".") and name not in (".", "..")
    return dotted or name.lower() in _MADE_BY_SYSTEMS


@dataclass
class Tree:
    """The files below a folder."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    """All but hidden ones, sorted; also links that lead nowhere, and what is no plain file."""
    num_hidden: int = 0
    """Hidden files, and hidden folders, which are not looked into."""
    loops: list[Path] = field(default_factory=list)
    """Links back to a folder above them."""
    unreadable: list[Path] = field(default_factory=list)
    """Folders that cannot be listed."""
    has_arrays: bool = False
    """Whether arrays are images too, as those of ``data.bands`` are."""

    @cached_property
    def images(self) -> list[Path]:
        """Files whose suffix says that they are images, and that this installation decodes."""
        known = readable_suffixes().union(ARRAY_SUFFIXES if self.has_arrays else ())
        return [path for path in self.files if _suffix(path).lstrip(".") in known]

    def describe_rest(self, used: Collection[Path]) -> str:
        """Return in words what is passed over where ``used`` are the files in use, or nothing."""
        rest = sorted(set(self.files) - set(used))
        broken = [path for path in rest if path.is_symlink() and not os.path.exists(path)]
        parts = [_count_suffixes(set(rest) - set(broken))]
        parts += [f"{self.num_hidden} hidden"] if self.num_hidden else []
        parts += [
            f"{len(paths)} {what} ({printable(paths[0])})"
            for paths, what in (
                (broken, "links to nothing"),
                (self.loops, "links back to a folder above"),
                (self.unreadable, "folders that cannot be read"),
            )
            if paths
        ]
        return ", ".join(filter(None, parts))

    def say_rest(
        self, used: Collection[Path], besides: Collection[Path] = (), what: str = "images"
    ) -> None:
        """Log what is passed over where ``used`` are in use and ``besides`` belong to them."""
        if rest := self.describe_rest([*used, *besides]):
            level = logging.INFO if rest == f"{self.num_hidden} hidden" else logging.WARNING
            say_once(f"{printable(self.folder)}: {len(used)} {what}; passed over: {rest}", level)


def list_tree(folder: Path) -> Tree:
    """List what lies below a folder; a folder that is not there is one that cannot be read.

    Raises:
        DataError: the folder itself may not be looked into.
    """
    refuse_unreadable(folder, DataError)
    tree = Tree(folder)
    waiting: list[tuple[Path, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    while waiting:
        here, above = waiting.pop()
        try:
            status = here.stat()
            entries = list(os.scandir(here))
        except OSError:
            tree.unreadable.append(here)
            continue
        place = status.st_dev, status.st_ino
        if place in above:
            tree.loops.append(here)
            continue
        for entry in entries:
            if is_hidden(entry.name):
                tree.num_hidden += 1
            elif os.path.isdir(entry.path):
                waiting.append((here / entry.name, above | {place}))
            else:
                tree.files.append(here / entry.name)
    tree.files.sort()
    return tree


@cache
def say_once(line: str, level: int = logging.WARNING) -> None:
    """Log a line, once in a process, for folders and shards are looked at again and again."""
    logger.log(level, "%s", line)


@dataclass
class FoundShards:
    """The shards that the entries of `data.shards` name."""

    paths: list[Place]
    """Each shard once, in the order of the entries, sorted within each."""
    notes: list[str]
    """One line for each kind of thing that was passed over."""


def find_shards(patterns: Sequence[str], cache: Cache | None = None) -> FoundShards:
    """List the shards that entries name, each once, and what is passed over.

    Args:
        patterns: the entries.
        cache: where shards that lie elsewhere are copied to; without one they are refused.

    Raises:
        DataError: an entry names no shard, or what is none; one line with what it is.
    """
    notes: list[str] = []
    paths = [path for pattern in patterns for path in _shards_of(pattern, notes, cache)]
    if not paths:
        raise _no_shards(", ".join(patterns), "nothing is named", _MAKE_THEM)
    by_place: dict[str, Place] = {}
    for path in paths:
        name = path.key if isinstance(path, Remote) else os.path.realpath(path)
        if by_place.setdefault(name, path) != path and isinstance(path, Remote):
            raise DataError(f"data.shards: {path} is named with two users or queries; name it once")
    if num_again := len(paths) - len(by_place):
        notes.append(
            f"{num_again} shards are named more than once and used once; data.weights gives a "
            "source a larger share"
        )
    return FoundShards(list(by_place.values()), notes)


def _shards_of(pattern: str, notes: list[str], cache: Cache | None) -> list[Place]:
    text = os.path.expanduser(pattern)
    literal = re.split(r"[*?\[{]", text)[0]  # up to the folder in which a pattern begins to match
    refuse_unreadable(Path(text if literal == text else os.path.dirname(literal) or "."), DataError)
    if os.path.isdir(text):
        return _in_folder(Path(text), pattern, notes)
    if os.path.isfile(text):
        return _in_file(Path(text), pattern, cache)
    if os.path.lexists(text):
        return [Path(text)]  # a pipe, a link to nothing: whoever reads it says so
    if _JOINT.search(text):
        parts = filter(None, _JOINT.split(text))
        return [path for part in parts for path in _shards_of(part, notes, cache)]
    if is_address(text):
        return _elsewhere(text, pattern, cache)
    names = _expanded(text, pattern)
    by_name = [_named(name, pattern, notes) for name in names]
    missing = [name for name, paths in zip(names, by_name, strict=True) if not paths]
    if missing and len(names) > 1:
        raise _no_shards(
            pattern,
            f"{len(missing)} of the {len(names)} that the braces name are not there, the first "
            f"{shortened(missing[0])!r}",
            "name the folder or a pattern with * to take what is there",
        )
    if missing:
        raise _no_shards(pattern, _about_nothing(text), _MAKE_THEM)
    return [path for paths in by_name for path in paths]


def _elsewhere(text: str, pattern: str, cache: Cache | None) -> list[Place]:
    """Return the shards of an address or a command; nothing but ``*`` asks its server."""
    scheme = text.partition(":")[0].lower()
    is_command = text.startswith(PIPE)
    is_known = is_command or (scheme in PACKAGES and "://" in text)
    if cache is None or not is_known:
        raise _no_shards(shown(text), _about_address(text))
    if is_command and not cache.commands:
        reason = "it is a command, and data.commands is not set, so nothing is run"
        raise _no_shards(shown(text), reason)
    try:
        places = [matching(name, cache) for name in _expanded(text, shown(text))]
    except FetchError as error:
        raise _no_shards(shown(text), str(error)) from None
    if not all(places):
        hint = "name shards one by one, with braces, or in a text file"
        raise _no_shards(shown(text), "no file matches", hint)
    return [place for names in places for place in names]


def _expanded(text: str, pattern: str) -> list[str]:
    """Expand braces as a shell does."""
    try:
        count = sum(abs(int(end) - int(start)) for start, end in _RANGE.findall(text))
        if count <= _MAX_EXPANDED:  # else ranges alone would fill the memory
            names = list(islice(braceexpand(text, escape=False), _MAX_EXPANDED + 1))
            count = len(names)
    except (ValueError, RecursionError):  # braces that do not close are signs like others
        return [text]
    if count > _MAX_EXPANDED:
        raise _no_shards(pattern, f"its braces name more than {_MAX_EXPANDED:,} shards")
    return names


def _named(name: str, pattern: str, notes: list[str]) -> list[Place]:
    """Return the shards of one name, whose braces are expanded."""
    if os.path.isdir(name):
        return _in_folder(Path(name), pattern, notes)
    if os.path.isfile(name):
        return _in_file(Path(name), pattern)
    return _matching(name, pattern, notes) if glob.has_magic(name) else []


def _matching(text: str, pattern: str, notes: list[str]) -> list[Place]:
    """Match a pattern; the folders that it begins with and that exist are no pattern."""
    base = next((str(path) for path in Path(text).parents if os.path.isdir(path)), ".")
    literal = "" if base == "." else os.path.join(base, "")
    escaped = glob.escape(literal) + text[len(literal) :] if text.startswith(literal) else text
    for place in dict.fromkeys((escaped, text)):
        matches = [Path(match) for match in glob.glob(place, recursive=True)]
        files = [path for path in matches if path.is_symlink() or os.path.isfile(path)]
        others = [path for path in files if not _is_tar(path) and not _is_ours(path)]
        shards = list(filter(_is_tar, files))
        if shards and others:
            notes.append(f"passed over of {pattern}: {_count_suffixes(others)}")
        if shards or others:
            return [path for file in sorted(shards or others) for path in _in_file(file, pattern)]
        if folders := sorted(filter(Path.is_dir, matches)):
            return [path for folder in folders for path in _in_folder(folder, pattern, notes)]
    return []


def _in_folder(folder: Path, pattern: str, notes: list[str]) -> list[Place]:
    tree = list_tree(folder)
    shards = list(filter(_is_tar, tree.files))
    if not shards:
        raise _no_shards(pattern, *_about_folder(folder, tree))
    if rest := tree.describe_rest([*shards, *filter(_is_ours, tree.files)]):
        notes.append(f"passed over beside {len(shards)} shards in {printable(folder)}: {rest}")
    return list(shards)


def _in_file(path: Path, pattern: str, cache: Cache | None = None) -> list[Place]:
    suffix = _suffix(path)
    if suffix in _LISTS:
        return _listed(path, pattern, cache)
    if suffix in _PACKED:
        raise _no_shards(pattern, *_about_packed([path]))
    if suffix.lstrip(".") in IMAGE_SUFFIXES:
        raise _no_shards(pattern, "it is an image, not a tar of images", _MAKE_THEM)
    if suffix in _TABLES:
        reason = "it is no tar, and holds no images that could be read"
        raise _no_shards(pattern, reason, _MAKE_THEM)
    return [path]


def _listed(file: Path, pattern: str, cache: Cache | None) -> list[Place]:
    """Read a list of shards, one a line, found from here or from the folder of the list."""
    try:
        with file.open("rb") as stream:
            data = stream.read(_MAX_LIST_BYTES + 1)
        if len(data) > _MAX_LIST_BYTES:
            raise _no_shards(pattern, f"the list has more than {_MAX_LIST_BYTES >> 20} MB; cut it")
        lines = data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise _no_shards(pattern, reason_of(error)) from error
    except UnicodeDecodeError as error:
        raise _no_shards(pattern, "it is no text, so no list of shards") from error
    paths: list[Place] = []
    for line in map(str.strip, lines):
        if not line or line.startswith("#"):
            continue
        if is_address(line):
            paths += _elsewhere(line, pattern, cache)
            continue
        places = [os.path.expanduser(line), os.path.join(file.parent, line)]
        place = next(filter(os.path.isfile, places), None)
        if place is None or os.path.realpath(place) == os.path.realpath(file):
            raise _no_shards(pattern, f"it lists {shortened(line)!r}, which is no file")
        if _suffix(Path(place)) in _LISTS:
            raise _no_shards(
                pattern, f"it lists {shortened(line)!r}, which is a list too; join them"
            )
        paths += _in_file(Path(place), pattern)
    if not paths:
        raise _no_shards(pattern, "the list is empty")
    return paths


def _count_suffixes(paths: Iterable[Path]) -> str:
    """Return how many files there are of each suffix, in words."""
    counts = Counter(map(_suffix, sorted(paths))).most_common()
    words = [
        f"{number} {printable(suffix) or 'without suffix'}"
        + (f" (which need {package})" if (package := what_reads(suffix)) else "")
        for suffix, number in counts[:_SUFFIXES_SHOWN]
    ]
    if others := sum(number for _, number in counts[_SUFFIXES_SHOWN:]):
        words.append(f"{others} others")
    return ", ".join(words)


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _is_tar(path: Path) -> bool:
    return _suffix(path) == ".tar"


def _is_ours(path: Path) -> bool:
    """Tell whether a file is one that we put beside shards."""
    return path.name.endswith(".tar.index.jsonl") or path.name == "classes.txt"


def _about_address(text: str) -> str:
    if text.lstrip().startswith("|"):
        return "it is a command; write it as `pipe:COMMAND`"
    if text.lower().startswith("file:"):
        return "it is an address; write the path alone"
    if text.startswith(PIPE) or text.partition("://")[0] in PACKAGES:
        return (
            "it lies elsewhere; name a folder on a local disk for copies with data.cache, or copy "
            "it to a disk by hand"
        )
    schemes = ", ".join(f"{scheme}://" for scheme in PACKAGES)
    return f"it is an address of a kind that is not read ({schemes} are); copy it to a disk"


def _about_nothing(text: str) -> str:
    if glob.has_magic(text):
        return "no file matches"
    try:
        os.stat(text)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        return reason_of(error)
    where = "" if os.path.isabs(text) else f" in {printable(os.getcwd())}"
    return f"there is no such file or folder{where}"


def _about_folder(folder: Path, tree: Tree) -> tuple[str, str]:
    if packed := [path for path in tree.files if _suffix(path) in _PACKED]:
        return _about_packed(packed)
    if images := tree.images:
        command = f"radio-distill shards {shlex.quote(printable(folder))} OUT"
        return f"the folder holds {len(images)} images and no .tar", f"make shards with `{command}`"
    rest = tree.describe_rest([])
    return "the folder holds no .tar" + (f" but {rest}" if rest else ""), _MAKE_THEM


def _about_packed(packed: list[Path]) -> tuple[str, str]:
    return (
        f"compressed ({_count_suffixes(packed)}), and single images cannot be read out of that",
        "unpack it (`gunzip`, `unzip`, …), and if it is no tar, "
        "make shards with `radio-distill shards SRC OUT`",
    )


def _no_shards(pattern: str, reason: str, hint: str = "") -> DataError:
    return DataError(f"no shards found for {pattern!r}: {reason}" + (f"; {hint}" if hint else ""))
