"""The bounded folder of local copies of shards that lie elsewhere.

All processes of a machine share it, and locks of the operating system (``flock``), which end with
their process however it ends, keep them apart:

* a reader holds a shared lock on the open copy, so what can be locked alone is not in use, and the
  copy of which the last use is longest ago is removed first;
* who fetches holds the lock of the shard, so that it is fetched once, and a lock on the unfinished
  copy, which stands in the folder with its full size: copies, unfinished ones included, never take
  more than the bound and those in use.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..config import DataConfig
from ..errors import DataError
from ..system.files import make_private, reason_of


class CacheError(DataError):
    """Nothing can be fetched at all: no room, no folder, no package."""


@dataclass(frozen=True)
class Cache:
    """The folder of local copies."""

    folder: Path
    max_bytes: int
    timeout: float
    """Seconds in which something must come."""
    commands: bool
    """Whether ``pipe:`` may run a shell."""


def cache_of(config: DataConfig) -> Cache | None:
    """Return the cache that a recipe names, or None."""
    if not config.cache:
        return None
    folder = Path(config.cache).expanduser()
    return Cache(folder, int(config.cache_gb * 1e9), config.read_timeout, config.commands)


def reserve(cache: Cache, part: Path, size: int, must: bool) -> BinaryIO | None:
    """Open an unfinished copy that takes its room at once."""
    with locked_file(cache.folder / ".lock"):
        if not _make_room(cache, size) and not must:
            return None
        file = part.open("w+b")
        flock(file, fcntl.LOCK_EX)
        file.truncate(size)  # without blocks on the disk, but counted by whoever looks
        return file


def make_room(cache: Cache) -> None:
    """Remove the copies that are longest not in use, as far as they are above the bound."""
    with locked_file(cache.folder / ".lock"):
        _make_room(cache, 0)


def _make_room(cache: Cache, size: int) -> bool:
    """Remove them under the lock; returns whether ``size`` bytes more fit now."""
    files = []
    for entry in os.scandir(cache.folder):
        if entry.name.endswith((".tar", ".part")):
            with suppress(FileNotFoundError):  # renamed meanwhile
                status = entry.stat()
                files.append((status.st_mtime_ns, status.st_size, entry.path))
    total = size + sum(num_bytes for _, num_bytes, _ in files)
    for _, num_bytes, path in sorted(files):
        if total <= cache.max_bytes:
            break
        total -= num_bytes if _remove_unused(path) else 0
    return total <= cache.max_bytes


def _remove_unused(path: str) -> bool:
    with suppress(FileNotFoundError), open(path, "rb") as file:
        if not flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
        os.unlink(path)
    return True


@contextmanager
def locked_file(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock between processes and threads; tells whether it was got."""
    try:
        make_private(path.parent)
        file = path.open("ab")
    except OSError as error:
        reason = f"{path.parent} cannot be written: {reason_of(error)}"
        raise CacheError(f"data.cache: {reason}") from error
    with file:
        yield flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def flock(file: BinaryIO, operation: int) -> bool:
    """Lock an open file as ``fcntl.flock`` does; False where another has it."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        reason = f"{reason_of(error)}; name a folder on a local disk"
        raise CacheError(f"data.cache: files there cannot be locked: {reason}") from error
    return True
