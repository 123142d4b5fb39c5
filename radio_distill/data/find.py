"""From what `data.shards` says to tar files on a disk.

An entry is a file, a folder that is searched for ``*.tar``, a pattern with ``*``, ``?``, ``[]`` or
braces (``{000000..000127}``, ``{a,b}``), several of these joined by ``::``, or a text file that
names one a line. What exists under the very name that is written is taken for that, whatever signs
are in it. Addresses and commands are refused: shards are read in any order, so they must be files.
"""

import glob
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from ..errors import DataError
from ..system.files import reason_of
from .images import IMAGE_SUFFIXES
from .names import printable, shortened
from .tree import Tree, count_suffixes, list_tree, refuse_unreadable

_MAX_EXPANDED = 1_000_000
_MAX_LIST_BYTES = 64 << 20
_ADDRESS = re.compile(r"(?i)\s*\||\w[\w+.-]*://|(pipe|s3a?|gs|gcs|hdfs|hf|https?|ftp|ssh|file):")
_BRACES = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?\}|\{([^{}]*,[^{}]*)\}")
_LISTS = (".txt", ".lst", ".list")
_UNPACK = {
    ".gz": "gunzip -k",
    ".tgz": "gunzip -k",
    ".bz2": "bunzip2 -k",
    ".tbz2": "bunzip2 -k",
    ".tbz": "bunzip2 -k",
    ".xz": "unxz -k",
    ".txz": "unxz -k",
    ".zst": "unzstd",
    ".tzst": "unzstd",
}
_TABLES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".yaml", ".yml")
_ARCHIVES = {".zip": "unzip", ".7z": "7z x", ".rar": "unrar x"}
_MAKE_THEM = "make them with `radio-distill shards SRC OUT`"


@dataclass
class FoundShards:
    """What the entries of `data.shards` name."""

    paths: list[Path] = field(default_factory=list)
    """Each shard once, in the order of the entries, sorted within each."""
    notes: list[str] = field(default_factory=list)
    """What was passed over on the way, one line each."""


def find_shards(patterns: Sequence[str]) -> list[Path]:
    """List the shards that entries name; see :func:`search_shards`."""
    return search_shards(patterns).paths


def search_shards(patterns: Sequence[str]) -> FoundShards:
    """List the shards that entries name, each once, and what is passed over.

    Raises:
        DataError: an entry names no shard, or what is none; one line with what it is.
    """
    found = FoundShards()
    by_place: dict[str, Path] = {}
    num_again = 0
    for pattern in patterns:
        paths = _shards_of(pattern, found.notes)
        for path in paths:
            place = os.path.realpath(path)
            num_again += place in by_place
            by_place.setdefault(place, path)
    found.paths = list(by_place.values())
    if num_again:
        found.notes.append(
            f"{num_again} shards are named more than once and used once; data.weights gives a "
            "source a larger share"
        )
    return found


def _shards_of(pattern: str, notes: list[str]) -> list[Path]:
    text = os.path.expanduser(pattern)
    refuse_unreadable(_literal_part(text))
    if os.path.isdir(text):
        return _in_folder(Path(text), pattern, notes)
    if os.path.isfile(text):
        return _in_file(Path(text), pattern, notes)
    if os.path.lexists(text):
        return [Path(text)]  # a pipe, a link to nothing: whoever reads it says so
    if _ADDRESS.match(text):
        raise _none(pattern, _about_address(text))
    if "::" in text:
        return [path for part in text.split("::") if part for path in _shards_of(part, notes)]
    names = _expanded(text, pattern)
    if len(names) > 1:
        return _of_braces(names, pattern, notes)
    paths = _matching(text, pattern, notes)
    if not paths:
        raise _none(pattern, _about_nothing(text), _MAKE_THEM)
    return paths


def _literal_part(text: str) -> Path:
    """Return the entry, or the folder in which a pattern begins to match."""
    literal = re.split(r"[*?\[{]", text)[0]
    return Path(text if literal == text else os.path.dirname(literal) or ".")


def _in_folder(folder: Path, pattern: str, notes: list[str]) -> list[Path]:
    tree = list_tree(folder)
    shards = [path for path in tree.files if _is_tar(path)]
    if not shards:
        raise _none(pattern, *_about_folder(folder, tree))
    if rest := tree.describe_rest([*shards, *filter(_is_ours, tree.files)]):
        notes.append(f"passed over beside {len(shards)} shards in {printable(folder)}: {rest}")
    return shards


def _in_file(path: Path, pattern: str, notes: list[str]) -> list[Path]:
    suffix = path.suffix.lower()
    if suffix in _LISTS:
        return _listed(path, pattern, notes)
    if suffix in _UNPACK or suffix in _ARCHIVES:
        raise _none(pattern, *_about_packed([path], path))
    if suffix.lstrip(".") in IMAGE_SUFFIXES:
        raise _none(pattern, "it is an image, not a tar of images", _MAKE_THEM)
    if suffix in _TABLES:
        raise _none(pattern, "it is no tar, and holds no images that could be read", _MAKE_THEM)
    return [path]


def _listed(file: Path, pattern: str, notes: list[str]) -> list[Path]:
    """Read a list of shards, one a line, found from here or from the folder of the list."""
    try:
        with file.open("rb") as stream:
            lines = stream.read(_MAX_LIST_BYTES).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise _none(pattern, reason_of(error)) from error
    except UnicodeDecodeError as error:
        raise _none(pattern, "it is no text, so no list of shards") from error
    entries = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    paths: list[Path] = []
    for entry in entries:
        places = [os.path.expanduser(entry), os.path.join(file.parent, entry)]
        place = next(filter(os.path.isfile, places), None)
        if place is None or os.path.realpath(place) == os.path.realpath(file):
            raise _none(pattern, f"it lists {shortened(entry)!r}, which is no file")
        if Path(place).suffix.lower() in _LISTS:
            raise _none(pattern, f"it lists {shortened(entry)!r}, which is a list too; join them")
        paths += _in_file(Path(place), pattern, notes)
    if not paths:
        raise _none(pattern, "the list is empty")
    return paths


def _of_braces(names: list[str], pattern: str, notes: list[str]) -> list[Path]:
    paths, lacking = [], []
    for name in names:
        if os.path.exists(name) or not glob.has_magic(name):
            found = [Path(name)] if os.path.isfile(name) else []
        else:
            found = _matching(name, pattern, notes)
        if os.path.isdir(name):
            found = _in_folder(Path(name), pattern, notes)
        paths += found
        lacking += [] if found else [name]
    if lacking:
        raise _none(
            pattern,
            f"{len(lacking)} of the {len(names)} that the braces name are not there, the first "
            f"{shortened(lacking[0])!r}",
            "name the folder or a pattern with * to take what is there",
        )
    return paths


def _matching(text: str, pattern: str, notes: list[str]) -> list[Path]:
    """Match a pattern; the folders that it begins with and that exist are no pattern."""
    base = next((str(p) for p in Path(text).parents if os.path.isdir(p)), ".")
    literal = "" if base == "." else os.path.join(base, "")
    rest = text[len(literal) :] if text.startswith(literal) else text
    places = [glob.escape(literal) + rest if text.startswith(literal) else text, text]
    for place in dict.fromkeys(places):
        matches = [Path(match) for match in glob.glob(place, recursive=True)]
        files = [path for path in matches if os.path.isfile(path) or path.is_symlink()]
        shards = list(filter(_is_tar, files)) or [path for path in files if not _is_ours(path)]
        passed_over = [path for path in files if path not in set(shards) and not _is_ours(path)]
        if passed_over:
            notes.append(f"passed over of {pattern}: {count_suffixes(passed_over)}")
        if shards:
            return sorted(path for shard in shards for path in _in_file(shard, pattern, notes))
        found = [_in_folder(path, pattern, notes) for path in sorted(matches) if path.is_dir()]
        if found:
            return [path for paths in found for path in paths]
    return []


def _expanded(text: str, pattern: str) -> list[str]:
    """Expand braces as a shell does; names with leading zeros keep their width."""
    pieces: list[list[str]] = []
    number, end = 1, 0
    for match in _BRACES.finditer(text):
        options = list(_options(match))
        number *= len(options)
        if number > _MAX_EXPANDED:
            break
        pieces += [[text[end : match.start()]], options]
        end = match.end()
    if number > _MAX_EXPANDED:
        raise _none(pattern, f"its braces name more than {_MAX_EXPANDED:,} shards")
    return ["".join(parts) for parts in product(*pieces, [text[end:]])]


def _options(match: "re.Match[str]") -> Iterator[str]:
    first, last, step, words = match.groups()
    if words is not None:
        yield from words.split(",")
        return
    start, stop, width = int(first), int(last), 0
    if any(len(item.lstrip("-")) > 1 and item.lstrip("-")[0] == "0" for item in (first, last)):
        width = max(len(first), len(last))
    stride = max(1, int(step or 1))
    numbers = range(start, stop + 1, stride) if start <= stop else range(start, stop - 1, -stride)
    for number in numbers[: _MAX_EXPANDED + 1]:
        yield f"{number:0{width}d}"


def _is_tar(path: Path) -> bool:
    return path.suffix.lower() == ".tar"


def _is_ours(path: Path) -> bool:
    """Tell whether a file is one that we put beside shards."""
    return path.name.endswith(".tar.index.jsonl") or path.name == "classes.txt"


def _about_address(text: str) -> str:
    if text.lstrip().startswith("|") or text.lower().startswith("pipe:"):
        return "it is a command, and nothing is run; write what it gives to a file and name that"
    if text.lower().startswith("file:"):
        return "it is an address; write the path alone"
    how = "`aws s3 cp --recursive`" if text.lower().startswith("s3") else "its own tool"
    return (
        "it is an address, and shards are read from disks alone; copy them to one, for instance "
        f"with {how}, and name that folder"
    )


def _about_nothing(text: str) -> str:
    if glob.has_magic(text):
        return "no file matches"
    try:
        os.stat(text)
    except (OSError, ValueError) as error:
        if not isinstance(error, FileNotFoundError):
            return reason_of(error)
    where = "" if os.path.isabs(text) else f" in {printable(os.getcwd())}"
    return f"there is no such file or folder{where}"


def _about_folder(folder: Path, tree: Tree) -> tuple[str, str]:
    packed = [path for path in tree.files if path.suffix.lower() in {*_UNPACK, *_ARCHIVES}]
    if packed:
        return _about_packed(packed, folder)
    if images := tree.images:
        command = f"radio-distill shards {shlex.quote(printable(folder))} OUT"
        return f"the folder holds {len(images)} images and no .tar", f"make shards with `{command}`"
    rest = tree.describe_rest([])
    return "the folder holds no .tar" + (f" but {rest}" if rest else ""), _MAKE_THEM


def _about_packed(packed: list[Path], place: Path) -> tuple[str, str]:
    """Say what compressed files are, and what unpacks them."""
    suffix = packed[0].suffix.lower()
    files = shlex.quote(printable(packed[0])) if len(packed) == 1 else ""
    if suffix in _ARCHIVES:
        what = "an archive that is no tar" if files else f"{len(packed)} archives that are no tar"
        command = f"{_ARCHIVES[suffix]} {files or '*' + suffix}"
        return f"{what}", f"unpack with `{command}`, then `radio-distill shards SRC OUT`"
    what = "it is compressed" if files else f"{count_suffixes(packed)} are compressed"
    files = files or f"{shlex.quote(printable(place))}/*{suffix[-2:]}"
    return (
        f"{what}, and single images cannot be read out of that",
        f"unpack with `{_UNPACK[suffix]} {files}`",
    )


def _none(pattern: str, reason: str, hint: str = "") -> DataError:
    return DataError(f"no shards found for {pattern!r}: {reason}" + (f"; {hint}" if hint else ""))
