"""Weights: find the file, read it without executing it, and load it without a gap.

Files are read by :mod:`radio_distill.weights.files`. Nothing is loaded "as far as it fits": a
key that is missing, left over or of another shape is an error that names it.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from radio_distill.config import TeacherConfig
from radio_distill.errors import ConfigError, WeightsError
from radio_distill.system.files import refuse_unreadable, write_text
from radio_distill.system.trust import check_sha256
from radio_distill.weights.files import FOLDER, HUB, checksummed_files

from .presets import Preset

_HALF = (torch.float16, torch.bfloat16)
SETTLED = 10.0
"""Seconds since a file's last change from which on its times tell a further one."""
_LIBRARIES = ("torch", "timm", "open_clip_torch", "transformers")


def local_path(weights: str) -> Path:
    """Return the file or folder that a recipe names.

    Raises:
        WeightsError: where there is none, or one that may not be read.
    """
    for word, option in ((HUB, "it"), (FOLDER, "its path alone here, or it")):
        if weights.startswith(word):
            raise WeightsError(f"weights: {weights} is no path; name {option} in options.model")
    path = Path(os.path.expanduser(weights))  # pathlib's fails where there is no home
    refuse_unreadable(path, WeightsError)
    if not path.exists():
        raise WeightsError(f"no weights at {weights}; correct `weights` or leave it empty")
    return path


def check_local(config: TeacherConfig) -> None:
    """Raise WeightsError where the weights that a recipe names have another checksum than it says.

    Weights that it does not name are checked where they are located.
    """
    if config.weights and config.sha256:
        check_sha256(checksummed_files(local_path(config.weights)), config.sha256, "sha256")


def load_strict(
    module: nn.Module, state: Mapping[str, Tensor], where: str, take: bool = False
) -> None:
    """Load ``state``, read from ``where``; raises WeightsError unless keys and shapes agree.

    With ``take`` the module gets the tensors themselves, so what was mapped from a file stays there
    until it is read, and matrices in half precision stay so; else they are copied.
    """
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    mismatched = [
        f"{key}: {tuple(state[key].shape)} for {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    refuse_gaps(where, missing, unexpected, mismatched)
    if take:
        matrices = matrix_names(module)
        state = {
            key: (
                state[key]
                if key in matrices and state[key].dtype in _HALF
                else state[key].to(value.dtype)
            ).contiguous()
            for key, value in wanted.items()
        }
    module.load_state_dict(state, assign=take)


def widen(module: nn.Module) -> None:
    """Make a module float32 in place, but for matrices in half precision, which stay so."""
    matrices = matrix_names(module)
    for name, value in (*module.named_parameters(remove_duplicate=False), *module.named_buffers()):
        if value.is_floating_point() and not (name in matrices and value.dtype in _HALF):
            value.data = value.data.float()


def matrix_names(module: nn.Module) -> set[str]:
    """Return the names of the parameters of matrix products and convolutions, biases included."""
    names = set()
    for prefix, layer in module.named_modules():
        for name, _ in layer.named_parameters(prefix, recurse=False):
            # The products of Q, K and V of a MultiheadAttention are no Linear.
            is_product = isinstance(layer, nn.MultiheadAttention) and "proj" in name[len(prefix) :]
            if is_product or isinstance(layer, (nn.Linear, nn.Conv2d)):
                names.add(name)
    return names


class WithoutValues(TorchFunctionMode):
    """A context in which modules are built whose parameters are left as they are allocated.

    Nothing draws or writes them, so they take address space and no memory until they are loaded.
    Buffers are computed as ever, for no file has those that a state leaves out (indices of
    positions, rotary tables); on the meta device they would be lost.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave out what works in place on a parameter."""
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("tensor")
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place and isinstance(first, nn.Parameter) and name != "requires_grad_":
            return first
        return func(*args, **kwargs)


def refuse_gaps(
    where: str, missing: list[str], unexpected: list[str], mismatched: list[str]
) -> None:
    """Raise WeightsError naming the first key and the count of each kind of disagreement."""
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    gaps = [f"{len(keys)} {kind} (first {keys[0]})" for kind, keys in kinds.items() if keys]
    if gaps:
        raise WeightsError(f"{where} holds weights of another model: {', '.join(gaps)}")


def fingerprint(module: nn.Module) -> str:
    """Return the sha256 of a module's tensors: equal weights have it equal in any file format.

    Half precision counts as the float32 that it is exactly.
    """
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        value = value.float() if value.dtype in _HALF else value
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


logger = logging.getLogger(__name__)


class FingerprintNote:
    """The sha256 of a teacher's tensors, kept beside its files: a start need not compute it.

    A note ``.NAME.DIGEST.fingerprint`` lies in the folder of the weights; DIGEST stands for what
    the tensors depend on beside the file: the preset and the versions of the libraries. It counts
    only as long as every file has the path, size, inode and times that it says. The time of change
    of an inode (ctime) is among them, which no program can set, so a file that was replaced by one
    of equal size and equal mtime is hashed again. Where the folder cannot be written, every start
    hashes. Make the note before the files are read.

    Args:
        preset: what the files are read as.
        files: all that are read; the note lies beside the first.
    """

    def __init__(self, preset: Preset, files: Sequence[Path]):
        versions = {name: _version(name) for name in _LIBRARIES}
        digest = hashlib.sha256(json.dumps([repr(preset), versions]).encode()).hexdigest()
        self.path = files[0].parent / f".{files[0].name}.{digest[:12]}.fingerprint"
        self._files = files
        self._started = time.time()
        self._state = _state(files)

    def fingerprint(self, compute: Callable[[], str]) -> str:
        """Return what is noted, else what ``compute`` hashes of the tensors, which is then noted.

        Files that changed since the note was made are neither believed nor noted.
        """
        is_same = _state(self._files) == self._state
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            if is_same and kept["files"] == self._state and len(kept["fingerprint"]) == 64:
                return str(kept["fingerprint"])
        fingerprint = compute()
        # A change within one tick of the file system's clock would leave the times as they are.
        changed = max(
            time_ns for *_, modified, inode in self._state for time_ns in (modified, inode)
        )
        if _state(self._files) == self._state and self._started - changed / 1e9 > SETTLED:
            try:
                text = json.dumps({"fingerprint": fingerprint, "files": self._state})
                write_text(self.path, text)
            except ConfigError as error:
                logger.info("the fingerprint is computed at every start: %s", error)
        return fingerprint


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def _state(files: Sequence[Path]) -> list[list[Any]]:
    """Return what tells a change of files without reading them, as JSON has it."""
    states = [(str(path.resolve()), path.stat()) for path in files]
    return [
        [path, state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns]
        for path, state in states
    ]
