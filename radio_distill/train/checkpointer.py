"""Writes checkpoints, whole or not at all, while the next steps run.

The state is copied in the training loop, which is short. Hashing, writing, flushing and reading
back take long and happen in a thread. A checkpoint is written to a hidden folder, flushed to the
disk, read back and compared with what was in memory, and renamed; only then are older ones deleted.
A crash or a full disk leaves the former ones as they were.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..config import dump
from ..errors import CheckpointError
from ..system.files import flush, reason_of, sha256_of
from .checkpoint import (
    BEST,
    META,
    Checkpoint,
    checkpoint_folders,
    folder_of,
    sealed,
    step_of,
    versions,
)

logger = logging.getLogger(__name__)


class AsyncCheckpointer:
    """Writes one checkpoint after the other in a thread of rank 0.

    At most one is under way, so that memory holds one copy of the state and checkpoints appear in
    order.

    Attributes:
        newest: the last checkpoint that was written whole.
        error: why one could not be written; the run must end.
    """

    def __init__(self, newest: Path | None = None):
        self.newest = newest
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self, write: Callable[[], Path]) -> None:
        """Write in the background; call :meth:`wait` first."""
        assert self._thread is None, "one checkpoint at a time"
        # A daemon, for whoever aborts a run does not wait; in all other ends the trainer does.
        self._thread = threading.Thread(
            target=self._run, args=(write,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until nothing is under way, or for so many seconds."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = None

    def _run(self, write: Callable[[], Path]) -> None:
        try:
            self.newest = write()
        except Exception as error:  # a thread would lose it
            self.error = error


def save(
    checkpoint: Checkpoint,
    parts: Mapping[str, Mapping[str, Tensor]],
    keep_last: int,
    keep_every: int = 0,
    may_write: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint, then delete the oldest; returns its folder.

    Args:
        checkpoint: everything but its checksums and versions, which are of what is written now.
        parts: tensors of each file, on the host.
        keep_last: newest checkpoints that are kept.
        keep_every: those of its multiples are kept too; 0 for none.
        may_write: called before the checkpoint appears; raises where it must not.

    Raises:
        CheckpointError: where it cannot be written; former checkpoints are untouched.
    """
    final, root = checkpoint.folder, checkpoint.folder.parent
    temporary = root / f".{final.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        checksums = {}
        for part, tensors in parts.items():
            name = f"{part}.safetensors"
            checksums[name] = write_tensors(temporary / name, tensors)
        meta = {
            "step": checkpoint.step,
            "stage": checkpoint.stage,
            "recipe": dump(checkpoint.recipe),
            "teachers": {name: asdict(spec) for name, spec in checkpoint.teachers.items()},
            "shards": checkpoint.shards,
            "counts": checkpoint.counts,
            "versions": versions(),
            "world_size": checkpoint.world_size,
            "origin": asdict(checkpoint.origin),
            "best": asdict(checkpoint.best) if checkpoint.best else None,
            "sha256": checksums,
        }
        (temporary / META).write_text(json.dumps(sealed(meta), indent=1), encoding="utf-8")
        flush(temporary / META)
        for name, expected in checksums.items():
            verify(temporary / name, expected)
        flush(temporary)
        may_write()
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        if checkpoint.best is not None:
            _link_best(root, checkpoint.best.step)
        flush(root)
        _drop_old(checkpoint, keep_last, keep_every)
    except OSError as error:
        may_write()  # a new owner of the folder deletes what an old one has begun
        raise CheckpointError(
            f"cannot write checkpoint {final}: {reason_of(error)}; former checkpoints are whole: "
            "make room, or choose another --output, and go on with --resume"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def clear_unfinished(root: Path) -> None:
    """Delete what a killed process has begun to write; only the owner of the folder may call."""
    for folder in root.glob(".step-*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)
    for link in root.glob(f".{BEST}.*.tmp"):
        link.unlink(missing_ok=True)


def _link_best(root: Path, step: int) -> None:
    """Let ``best`` point at the checkpoint of a step, where the file system knows links."""
    temporary = root / f".{BEST}.{os.getpid()}.tmp"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder_of(root, step).name)
        temporary.replace(root / BEST)
    except OSError:  # meta.json says it too
        temporary.unlink(missing_ok=True)


def _drop_old(checkpoint: Checkpoint, keep_last: int, keep_every: int) -> None:
    """Delete what is older than the newest up to a step; later ones are not this run's.

    What cannot be deleted, for instance since another process reads it on a network's disk, is
    warned of and tried again with the next: the new one is whole.
    """
    step, best = checkpoint.step, checkpoint.best
    folders = checkpoint_folders(checkpoint.folder.parent)
    upto = [path for path in folders if path.is_dir() and step_of(path) <= step]
    for folder in upto[keep_last:]:
        is_best = best is not None and step_of(folder) == best.step
        if not is_best and (not keep_every or step_of(folder) % keep_every):
            try:
                shutil.rmtree(folder)
            except OSError as error:
                logger.warning("cannot delete %s: %s", folder, reason_of(error))


_CHUNK = 16 << 20
_DTYPES = {  # in the order that safetensors gives them
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = {dtype: place for place, dtype in enumerate(_DTYPES)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file while other threads go on, flushed to the disk.

    safetensors' own writer holds Python's lock while a file of gigabytes is written, and its file
    can only be summed up by reading it back, when a bad disk has had its chance. The format is a
    length, a JSON header and the bytes of the tensors; this file is the same, byte for byte.

    Returns:
        sha256 of the bytes in memory, so that :func:`verify` compares the disk with it.
    """
    # Widest types first, as in the library's files: each tensor begins at a multiple of its width.
    names = sorted(tensors, key=lambda name: (-_ORDER[tensors[name].dtype], name))
    header, offset = {}, 0
    for name in names:
        tensor, start = tensors[name], offset
        offset += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, offset],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for head in (len(text).to_bytes(8, "little"), text):
            digest.update(head)
            file.write(head)
        for name in names:
            content = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(content), _CHUNK):
                chunk = content[start : start + _CHUNK].data
                digest.update(chunk)
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def verify(path: Path, sha256: str) -> None:
    """Read a file back from the disk; raises CheckpointError where it is not what was meant."""
    with path.open("rb") as file:
        # What the system still holds in memory would tell nothing of the disk.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if sha256_of(path) != sha256:
        raise CheckpointError(
            f"{path} does not hold what was written to it; the disk or its memory is damaged"
        )
