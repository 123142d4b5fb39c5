"""Files that are written whole or not at all, and the sums that prove it."""

import hashlib
import itertools
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CHUNK = 1 << 20


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as a hexadecimal string."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; renamed over it when the block succeeds.

    Nothing is left behind, and an earlier file stays as it was, when the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes on several machines may have one number and one folder.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_there(path: Path) -> bool:
    """Return whether a path exists; one that cannot, for its name is too long, does not."""
    try:
        return path.exists()
    except OSError:
        return False


def make_private(folder: Path) -> None:
    """Make a folder, and its parents, that nobody but its user can look into.

    One that is there already keeps the rights that its user gave it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def flush(path: Path) -> None:
    """Ask the operating system to put a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason_of(error: BaseException) -> str:
    """Return one line that says why something failed, without path or stack."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def move_aside(folder: Path) -> Path:
    """Give a folder the first free name with a number behind it; returns that."""
    names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
    aside = next(path for path in names if not path.exists())
    return folder.rename(aside)
