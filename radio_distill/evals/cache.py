"""Summaries of images kept on disk, so that benchmarks which share images encode them once.

    FOLDER/ENCODER/HEIGHTxWIDTH-KEY.safetensors      "summaries" [N, S], half, of N images in order
    FOLDER/ENCODER/texts-KEY.safetensors             the same of N classes, float32

An encoder is known by a digest of its weights and of how it computes, an image by its path, size
and time of change. A pass over many images is kept piece by piece, so one that was stopped goes on
where it was. Above ``LIMIT`` bytes the pieces that were not used for longest are removed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ConfigError
from ..system.files import reason_of, replacing
from ..types import Size, format_size

LIMIT = 50 * 10**9
"""Bytes of a cache folder: summaries of ImageNet by some fifteen encoders of 1,280 channels."""
_NAME = "summaries"


@dataclass(frozen=True, slots=True)
class SummaryCache:
    """Summaries of one encoder."""

    folder: Path
    encoder: str
    """Digest of its weights and of how it computes."""
    piece: int = 1024
    """Images of a file, which are encoded before it is written."""
    note: Callable[[Size], object] = lambda size: None
    """Called with the size of images that were found and so are not encoded."""

    def get(self, images: Sequence[Path], size: Size, encode: Callable[[], Tensor]) -> Tensor:
        """Return what is kept of some images at ``size``, else what ``encode`` gives, kept too.

        Raises:
            ConfigError: the folder cannot be written.
        """
        states = [(str(path.resolve()), path.stat()) for path in images]
        known = [[path, state.st_size, state.st_mtime_ns] for path, state in states]
        key = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]
        return self._kept(
            f"{format_size(size)}-{key}", len(images), encode, lambda: self.note(size)
        )

    def get_classes(
        self, sentences: Sequence[Sequence[str]], embed: Callable[[], Tensor]
    ) -> Tensor:
        """Return the vectors of classes that sentences describe; the same as :meth:`get`."""
        key = hashlib.sha256(json.dumps(sentences).encode()).hexdigest()[:32]
        return self._kept(f"texts-{key}", len(sentences), embed, lambda: None)

    def _kept(
        self,
        name: str,
        rows: int,
        encode: Callable[[], Tensor],
        found: Callable[[], object],
    ) -> Tensor:
        """Return what is kept under a name if it has so many rows, else what ``encode`` gives."""
        path = self.folder / self.encoder / f"{name}.safetensors"
        try:
            kept = load_file(path)[_NAME]
            os.utime(path)
        except (OSError, SafetensorError, KeyError):  # none, or one that is not whole
            kept = torch.empty(0)
        if len(kept) == rows:
            found()
            return kept
        summaries = encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as draft:
                save_file({_NAME: summaries.contiguous()}, draft)
            _remove_oldest(self.folder)
        except OSError as error:
            raise ConfigError(
                f"evaluation.cache: cannot write {path}: {reason_of(error)}; name another folder, "
                "or none"
            ) from error
        return summaries


def _remove_oldest(folder: Path) -> None:
    files = []
    for path in folder.glob("*/*.safetensors"):
        with suppress(FileNotFoundError):  # another process removed it
            status = path.stat()
            files.append((status.st_mtime_ns, status.st_size, path))
    excess = sum(size for _, size, _ in files) - LIMIT
    for _, size, path in sorted(files):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= size
