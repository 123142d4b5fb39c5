"""What one teacher says of every image of some shards: a unit vector each, kept shard by shard.

    FOLDER/ENCODER/SHARD.safetensors    "vectors" [n, S] half, "pixels" [n] int64

Names are digests, of the teacher and how it is asked, and of the shard's contents. A pass that is
stopped goes on where it was, and shards that are added later are all that is encoded then.

What all summaries have in common, their mean, is taken out when they are read: with it the median
cosine of two photographs is 0.77 for DINOv2 ViT-S and 0.21 for EfficientNet-Lite0, and a threshold
for one teacher means nothing for another.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ..config import DataConfig, plain
from ..data.bands import decode
from ..data.images import BadImageError
from ..data.loader import made_by_workers
from ..data.rendering import centre_origin, render, to_float
from ..data.tar_index import Shard
from ..data.tar_reader import ShardReader
from ..errors import DataError
from ..evals.encoder import Encoder, unit_summaries
from ..system.distributed import World
from ..system.files import printable, replacing
from ..system.progress import Progress
from ..types import Size

_NAMES = ("vectors", "pixels")
_PASSING = ("unreadable", "stalled")
"""Kinds of bad images that say nothing of the image: the pass stops, and can be started again."""


@dataclass(frozen=True)
class Summaries:
    """The images of some shards, one after the other."""

    vectors: Tensor
    """``[N, S]`` half, on the CPU: without the mean, of length 1; 0 for an image that cannot be
    used."""
    pixels: np.ndarray
    """Height times width of each image as it is stored; 0 for one that cannot be used."""
    mean: Tensor
    """``[S]`` float32, of all unit vectors."""
    digest: str
    """Of the teacher and the shards."""


def encode_shards(
    shards: Sequence[Shard],
    encoder: Encoder,
    size: Size,
    config: DataConfig,
    folder: Path,
    batch_size: int = 32,
    world: World | None = None,
) -> None:
    """Encode the images of shards, but for those whose summaries are kept.

    Each is resized to cover ``size``, and its centre is cropped. Several processes take turns at
    the shards; what others do is to be waited for.

    Args:
        shards: whose images they are.
        encoder: that is asked.
        size: one that it takes, in pixels.
        config: limits of images, and workers.
        folder: where summaries of this encoder, asked so, are kept.
        batch_size: images that are encoded at once.
        world: this process's place; None for all there is.

    Raises:
        DataError: a shard cannot be read any more.
    """
    rank, processes = (world.rank, world.world_size) if world else (0, 1)
    mine = dict(list(enumerate(shards))[rank::processes])
    tasks = {
        number: _tasks(number, shard.num_samples, batch_size)
        for number, shard in mine.items()
        if not _is_kept(_path(folder, shard), shard)
    }
    total = sum(shard.num_samples for shard in mine.values())
    done = total - sum(shards[number].num_samples for number in tasks)
    flat = [task for of_shard in tasks.values() for task in of_shard]
    centres = _Centres(shards, size, config)
    with (
        Progress("summaries", total, start=done, visible=rank == 0) as bar,
        made_by_workers(centres.batch, flat, plain(config.workers), 2) as stream,
    ):
        for number, of_shard in tasks.items():
            parts = []
            for task in of_shard:
                parts.append(_encoded(next(stream), encoder))
                done += task.stop - task.start
                bar.update(done)
            piece = {name: torch.cat([part[name] for part in parts]) for name in _NAMES}
            with replacing(_path(folder, shards[number])) as draft:
                save_file(piece, draft)


def read_summaries(shards: Sequence[Shard], folder: Path) -> Summaries:
    """Read what :func:`encode_shards` has kept; raises DataError where it is not there."""
    pieces = []
    for shard in shards:
        if not _is_kept(_path(folder, shard), shard):
            raise DataError(
                f"no summaries of {printable(shard.path)} in {folder}; let all processes write to "
                "one folder, and start again"
            )
        pieces.append(load_file(_path(folder, shard)))
    names = [folder.name, *(shard.digest for shard in shards)]
    pixels = torch.cat([piece["pixels"] for piece in pieces])
    good = max(1, int((pixels > 0).sum()))
    mean = sum(piece["vectors"].sum(dim=0, dtype=torch.float64) for piece in pieces) / good
    centre = torch.as_tensor(mean).float()
    return Summaries(
        torch.cat([without_mean(piece["vectors"], centre) for piece in pieces]),
        pixels.numpy(),
        centre,
        hashlib.sha256(" ".join(names).encode()).hexdigest(),
    )


def without_mean(vectors: Tensor, mean: Tensor) -> Tensor:
    """Return unit vectors ``[B, S]`` less a mean ``[S]``, of length 1 again; 0 stays 0.

    What equals the mean stays too: where all images are copies of one, they are alike.
    """
    apart = vectors.float() - mean
    apart = F.normalize(torch.where(apart.any(dim=1, keepdim=True), apart, vectors), dim=1)
    return (apart * vectors.any(dim=1, keepdim=True)).half()


def _path(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.digest[:32]}.safetensors"


def _is_kept(path: Path, shard: Shard) -> bool:
    """Return whether the summaries of a shard are there, whole."""
    try:
        with safe_open(path, "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in _NAMES]
    except (OSError, SafetensorError):
        return False
    return all(shape[0] == shard.num_samples for shape in shapes)


def _encoded(batch: "_Batch", encoder: Encoder) -> dict[str, Tensor]:
    pixels = to_float(batch.views.to(encoder.device, non_blocking=True))
    vectors = unit_summaries(encoder(pixels))
    return {"vectors": vectors * (batch.pixels > 0)[:, None], "pixels": batch.pixels}


class _Task(NamedTuple):
    """Samples [start, stop) of a shard."""

    shard: int
    start: int
    stop: int


def _tasks(shard: int, samples: int, batch_size: int) -> list[_Task]:
    starts = range(0, samples, batch_size)
    return [_Task(shard, start, min(start + batch_size, samples)) for start in starts]


class _Batch(NamedTuple):
    """Images on their way from a worker."""

    views: Tensor
    """``[B, bands, H, W]`` uint8, channels last; black where an image cannot be used."""
    pixels: Tensor
    """``[B]`` int64, as in :class:`Summaries`."""


class _Centres:
    """Decodes images and cuts out their centres, in whichever process."""

    def __init__(self, shards: Sequence[Shard], size: Size, config: DataConfig):
        self._reader = ShardReader(shards, timeout=config.read_timeout)
        self._size, self._config = size, config

    def batch(self, task: _Task) -> _Batch:
        """Decode some samples."""
        shape = (task.stop - task.start, self._config.bands, *self._size)
        views = torch.zeros(shape, dtype=torch.uint8).to(memory_format=torch.channels_last)
        pixels = torch.zeros(len(views), dtype=torch.int64)
        for row, image in enumerate(self._images(task)):
            if image is not None:
                source = image.shape[1], image.shape[2]
                render(image, centre_origin(source, self._size), self._size, out=views[row])
                pixels[row] = source[0] * source[1]
        return _Batch(views, pixels)

    def _images(self, task: _Task) -> Iterator[Tensor | None]:
        """Yield the images, None for one that training would replace."""
        for number in range(task.start, task.stop):
            try:
                sample = self._reader.sample(task.shard, number)
                yield decode(self._reader.image_bytes(task.shard, sample), self._config)
            except BadImageError as error:
                if error.kind in _PASSING:
                    raise DataError(f"{error}; start again to go on") from error
                yield None
