"""What lies below a folder: one rule for images, shards, held-out and labelled sets.

Links to folders and files are followed, but not back to a folder that one comes from. Hidden files
and folders are passed over, see :func:`.names.is_hidden`. What is passed over, leads nowhere or
cannot be read is counted, so that it can be said.
"""

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ..errors import DataError
from ..system.files import check_readable, unreadable
from .images import readable_suffixes, what_reads
from .names import is_hidden, printable

logger = logging.getLogger(__name__)

_SUFFIXES_SHOWN = 8


@dataclass
class Tree:
    """The files below a folder."""

    files: list[Path] = field(default_factory=list)
    """All but hidden ones, sorted; also links that lead nowhere, and what is no plain file."""
    num_hidden: int = 0
    """Hidden files, and hidden folders, which are not looked into."""
    loops: list[Path] = field(default_factory=list)
    """Links back to a folder above them."""
    unreadable: list[Path] = field(default_factory=list)
    """Folders that cannot be listed."""

    @property
    def images(self) -> list[Path]:
        """Files whose suffix says that they are images, and that this installation decodes."""
        return [path for path in self.files if _suffix(path).lstrip(".") in readable_suffixes()]

    def describe_rest(self, used: Collection[Path]) -> str:
        """Return in words what is passed over where ``used`` are the files in use, or nothing."""
        used = set(used)
        rest = [path for path in self.files if path not in used]
        broken = {path for path in rest if path.is_symlink() and not os.path.exists(path)}
        parts = [count_suffixes(path for path in rest if path not in broken)]
        if self.num_hidden:
            parts.append(f"{self.num_hidden} hidden")
        for paths, what in (
            (sorted(broken), "links to nothing"),
            (self.loops, "links back to a folder above"),
            (self.unreadable, "folders that cannot be read"),
        ):
            if paths:
                parts.append(f"{len(paths)} {what} ({printable(paths[0])})")
        return ", ".join(filter(None, parts))


def refuse_unreadable(path: Path) -> None:
    """Raise DataError where a file or folder is there and may not be read."""
    try:
        check_readable(path)
    except PermissionError as error:
        raise DataError(unreadable(error)) from error


def list_tree(folder: Path) -> Tree:
    """List what lies below a folder; a folder that is not there is one that cannot be read.

    Raises:
        DataError: the folder itself may not be looked into.
    """
    refuse_unreadable(folder)
    tree = Tree()
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


def count_suffixes(paths: Iterable[Path]) -> str:
    """Return how many files there are of each suffix, in words."""
    counts = Counter(map(_suffix, paths)).most_common()
    words = [
        f"{number} {printable(suffix) or 'without suffix'}"
        + (f" (which {needs})" if (needs := _needs(suffix)) else "")
        for suffix, number in counts[:_SUFFIXES_SHOWN]
    ]
    if others := sum(number for _, number in counts[_SUFFIXES_SHOWN:]):
        words.append(f"{others} others")
    return ", ".join(words)


@cache
def say_once(line: str, level: int = logging.WARNING) -> None:
    """Log a line, once in a process, for folders and shards are looked at again and again."""
    logger.log(level, "%s", line)


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _needs(suffix: str) -> str:
    package = what_reads(suffix)
    return f"need {package}" if package else ""
