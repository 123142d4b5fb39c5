"""The one reader of torch files, and the one switch under which it may run what is in them.

A torch file is a pickle. Read with ``weights_only=True`` it gives tensors and plain values; what
else is in it must be imported and called, which runs what its author chose. That is refused, unless
the user has said on the command line (``--trust-checkpoint``) that its origin is trusted. The
switch belongs to the command and not to a recipe: a recipe travels, trust does not.

Checksums of files are compared here too, since that is what makes an origin certain.
"""

import logging
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

from ..errors import WeightsError
from .files import reason_of, sha256_of

logger = logging.getLogger(__name__)

FLAG = "--trust-checkpoint"
FLAG_HELP = "read weights that hold code too; it runs, so only where you trust them"

_TRUSTED = ContextVar("trusted", default=False)


@contextmanager
def trusting_pickles(trusted: bool = True) -> Iterator[None]:
    """Let torch files run code while the block lasts; with False they may not."""
    before = _TRUSTED.set(trusted)
    try:
        yield
    finally:
        _TRUSTED.reset(before)


def read_torch_file(path: Path, mapped: bool = False) -> Any:
    """Read a torch file on the host; what is in it runs only inside :func:`trusting_pickles`.

    With ``mapped``, tensors of a zip file, which all but the oldest are, stay in it until they are
    touched: for a caller that copies them before anyone could write the file anew. A whole module,
    which only a trusted file can hold, gives its state.

    Raises:
        WeightsError: missing, damaged, or not to be read without running what is in it.
    """
    import torch

    try:
        with torch.serialization.safe_globals([Namespace]):  # the arguments in RADIO's checkpoints
            mmap = mapped and is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file fails in a dozen ways
        needed = _refused(path, error)
        if needed is None:
            raise WeightsError(f"cannot read weights {path}: {_damage(error)}") from error
        if not _TRUSTED.get():
            raise WeightsError(
                f"cannot read weights {path}: it {needed}, which would run code when read; save "
                f"its tensors as safetensors, or add {FLAG} if you trust the file's origin"
            ) from error
    logger.warning("running the code in %s, as %s allows: it %s", path, FLAG, needed)
    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # the code's own errors, a package that is missing, no torch file
        raise WeightsError(f"cannot read weights {path}: {_damage(error)}") from error
    return content.state_dict() if isinstance(content, torch.nn.Module) else content


def _refused(path: Path, error: Exception) -> str | None:
    """Say what a file wants to do that was refused; None where it was not refused but damaged."""
    if "TorchScript" in str(error):
        return "is a TorchScript program"
    if not isinstance(error, UnpicklingError):
        return None
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
    if wanted:
        return f"wants to import {wanted[1]}"
    return "holds more than tensors and plain values" if is_zipfile(path) else None


def _damage(error: Exception) -> str:
    if isinstance(error, (OSError, ImportError)):
        return reason_of(error)
    # torch's own words about a pickle advise to run it
    known = isinstance(error, UnpicklingError)
    reason = "" if known else reason_of(error).partition(". ")[0][:200]
    return f"no torch file, or a damaged one ({type(error).__name__}{': ' * bool(reason)}{reason})"


def check_sha256(files: Sequence[Path], expected: str, field: str) -> None:
    """Raise WeightsError unless files have a checksum; an empty ``expected`` checks nothing.

    Args:
        files: one, whose sha256 is meant, or several: then that of the lines which ``sha256sum``
            prints of them in this order, so ``sha256sum FILES | sha256sum``.
        expected: checksum in hexadecimal digits.
        field: of the recipe, for the message.
    """
    if not expected:
        return
    assert files, "nothing to check would be a check that never fails"
    try:
        checksums = [_checksum(file, *_version(file)) for file in files]
    except OSError as error:
        raise WeightsError(f"cannot read {error.filename}: {reason_of(error)}") from error
    found = checksums[0]
    if len(files) > 1:
        lines = [f"{value}  {file.name}\n" for value, file in zip(checksums, files, strict=True)]
        found = sha256("".join(lines).encode()).hexdigest()
    if found != expected.strip().lower():
        names = ", ".join(str(path) for path in files[:1]) + (" …" if files[1:] else "")
        raise WeightsError(
            f"{field}: {names} has sha256 {found}, not {expected}; take the file that was "
            "meant, or correct the checksum where you trust this one"
        )


def _version(file: Path) -> tuple[int, int]:
    state = file.stat()
    return state.st_size, state.st_mtime_ns


@lru_cache(maxsize=256)
def _checksum(file: Path, size: int, modified: int) -> str:
    """Remember the checksum of a file, maybe of tens of gigabytes, as long as it is the same."""
    return sha256_of(file)
