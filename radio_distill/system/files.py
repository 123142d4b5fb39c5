"""Files that are written whole or not at all, their checksums, and names that are fit for a log."""

import fcntl
import hashlib
import itertools
import os
import stat
import tempfile
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import ConfigError, RadioDistillError

_CHUNK = 1 << 20
_SHOWN_LENGTH = 100  # characters of a name that a line shows


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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep out others that lock a folder too, processes and threads, while the block runs.

    The lock is the operating system's, on the folder itself: it ends with its process and leaves no
    file behind. Where a file system has none, nobody is kept out.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; raises ConfigError where it cannot be written."""
    try:
        with replacing(path) as draft:
            draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {reason_of(error)}") from error


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; raises OSError for a pipe, which could block for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("not a regular file")
    return os.fdopen(descriptor, "rb")


def is_there(path: Path) -> bool:
    """Return whether a path exists; one that cannot, for its name is too long, does not.

    Raises:
        PermissionError: where a folder on the way may not be looked into.
    """
    try:
        return path.exists()
    except PermissionError:
        raise
    except OSError:
        return False


def refuse_unreadable(path: Path, kind: type[RadioDistillError]) -> None:
    """Raise an error of ``kind`` where a file or folder is there and may not be read.

    Patterns and walks pass over what they may not see in silence, as if it were not there.
    """
    try:
        if path.is_dir():
            os.stat(path / ".")
            os.scandir(path).close()
        elif path.is_file():
            os.close(os.open(path, os.O_RDONLY))
        else:
            os.stat(path)
    except PermissionError as error:
        raise kind(unreadable(error)) from error
    except (OSError, ValueError):  # ValueError: no file can have such a name
        return  # whoever opens it says why it cannot be


def unreadable(error: PermissionError) -> str:
    """Say in one line what may not be read, and what to do."""
    return (
        f"{error.filename} cannot be read: permission denied; ask its owner to open it to you "
        "(chmod -R a+rX), or name another"
    )


def check_writable(folder: Path) -> None:
    """Check that files can be made in a folder, which need not be there yet; leaves none.

    Raises:
        OSError: where they cannot; its reason says what is in the way.
    """
    place = folder.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if place.is_symlink() and not place.exists():
        raise OSError(f"{place} is a link to {os.readlink(place)}, which is not there")
    if not place.is_dir():
        raise OSError(f"{place} is not a folder")
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        file.write(bytes(4096))


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


def printable(name: object) -> str:
    """Return a name with everything escaped that could harm a log."""
    text = str(name)
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def shortened(name: str) -> str:
    """Return a printable name of at most 100 characters."""
    text = printable(name[: _SHOWN_LENGTH + 1])
    return text if len(text) <= _SHOWN_LENGTH else text[: _SHOWN_LENGTH - 1] + "…"


def free_name(path: Path, taken: Collection[str] = ()) -> Path:
    """Return the first name with a number behind it that nothing has: ``stage1.1``.

    None of ``taken``, which are names of what may still come.
    """
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(it for it in names if it.name not in taken and not os.path.lexists(it))


def move_aside(folder: Path, taken: Collection[str] = ()) -> Path:
    """Give a folder the first free name with a number behind it, see :func:`free_name`."""
    return folder.rename(free_name(folder, taken))
