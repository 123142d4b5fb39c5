"""Batches of views for one process, from any step on, equal for every number of workers.

Image j of step s is the sample at position ``s * images_per_step + j`` of ``position.SampleOrder``,
cut by a generator that depends on seed and position alone. So the batches of a step are the same
whoever makes them: this process or a worker, one training process or many, after a resume or not.

A bad image is counted, logged and replaced by another of the same source, which depends on seed,
position and attempt alone; dropping it instead would shift every later batch.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import DataConfig, plain
from ..errors import DataError
from ..types import ImageBatch, Size, View, ViewOrigin
from .images import BadImageError, cut, decode_image, random_origin, render, to_float
from .order import SampleOrder, view_generator
from .reader import ShardReader
from .sources import open_sources
from .tally import Bad, Tally
from .workers import WorkerDiedError, prepare_worker, running

MAX_ATTEMPTS = 50
"""Images that are tried for one position; when all of them are bad, the data is."""
_MAX_OPEN = 256


@dataclass(frozen=True)
class StepSlice:
    """Images [start, stop) of each step's global batch, and how they are rendered."""

    start: int
    stop: int
    size: Size
    """Its aspect ratio is cropped out of the photographs, (height, width) in pixels."""
    views: Mapping[View, np.ndarray | None] | None = None
    """Where each view lies within that crop: shares of its height and width, ``[B, 4]`` of (top,
    left, height, width); None for all of it. Without views, one of ``size`` pixels."""


Slices = Callable[[int], Sequence[StepSlice]]
"""The slices of a step, counted from 0, that one process makes."""


def in_every_step(slices: Sequence[StepSlice]) -> Slices:
    """Return slices that are the same in every step."""
    return lambda step: slices


class ShardBatches:
    """Views out of tar shards; satisfies ``protocols.BatchSource``.

    What is left out at the start is not part of the order, and stands in ``left_out`` and
    ``damaged``; what turns out bad when it is read stands in ``bad``.

    Args:
        config: the shards, and what is done to their images.
        seed: of order and views.
        images_per_step: images of one step, over all processes.
        slices: the images that this process makes in a step, one micro-batch each.

    Raises:
        DataError: no shards, or more of them damaged, or of their samples unfit, than may be.
    """

    def __init__(self, config: DataConfig, *, seed: int, images_per_step: int, slices: Slices):
        self._config = config
        self._images_per_step = images_per_step
        self._slices = slices
        self._sources = open_sources(config)
        self._order = SampleOrder(
            [[shard.num_samples for shard in source] for source in self._sources.by_source],
            weights=config.weights,
            seed=seed,
            window=config.shuffle_shards,
        )
        max_open = min(_MAX_OPEN, 2 * config.shuffle_shards * len(self._sources.by_source))
        reader = ShardReader(self._sources.shards, max_open, config.read_timeout)
        self._views = _Views(reader, self._order, config, seed)
        self._tally = Tally(config.max_bad_share)

    @property
    def num_images(self) -> int:
        """Images in all shards that are in use."""
        return self._order.num_samples

    @property
    def fingerprint(self) -> str:
        """sha256 of all that the order depends on besides the recipe; see ``Sources``."""
        return self._sources.fingerprint

    @property
    def num_reads(self) -> int:
        """Images read for this process since it started, substitutes included."""
        return self._tally.num_reads

    @property
    def bad(self) -> dict[str, int]:
        """Those of ``num_reads`` that were bad, by kind."""
        return dict(self._tally.bad)

    @property
    def left_out(self) -> dict[str, int]:
        """Samples of the shards in use that are no part of the order, by kind; see ``walk``."""
        return self._sources.left_out

    @property
    def damaged(self) -> tuple[str, ...]:
        """One line for each shard that is not in use."""
        return self._sources.damaged

    def batches(self, start_step: int) -> Iterator[list[ImageBatch]]:
        """Yield for each step, from ``start_step`` on and without end, one batch a slice.

        Raises:
            DataError: clearly more than ``max_bad_share`` of the images read are bad, the disk does
                not answer any more, or a worker died.
        """
        try:
            with running(self._loader(start_step)) as stream:
                for step in itertools.count(start_step):
                    yield [self._receive(next(stream)) for _ in self._slices(step)]
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise WorkerDiedError(
                "a decoding process died; if memory or /dev/shm is short, lower data.workers"
            ) from error

    def _loader(self, start_step: int) -> "DataLoader[Any]":
        return DataLoader(
            self._views,
            sampler=_Tasks(self._slices, self._images_per_step, start_step),
            batch_size=None,  # a task is a whole micro-batch
            num_workers=plain(self._config.workers),
            collate_fn=_as_is,
            worker_init_fn=prepare_worker,
            generator=torch.Generator(),  # else it draws from the global one
        )

    def _receive(self, batch: "_Batch | DataError") -> ImageBatch:
        if isinstance(batch, DataError):
            raise batch
        self._tally.add(len(batch.keys), batch.bad)
        if batch.views is None:
            verdict = self._tally.verdict()
            raise DataError(f"{MAX_ATTEMPTS} images in a row are bad: {verdict}")
        self._tally.check()
        views = {view: to_float(pixels) for view, pixels in batch.views.items()}
        return ImageBatch(views, batch.keys, batch.origins)


class _Task(NamedTuple):
    """One micro-batch to make: the views at [start, stop), counted since the start of training."""

    start: int
    stop: int
    size: Size
    views: Mapping[View, np.ndarray | None]


class _Batch(NamedTuple):
    """One micro-batch on its way from a worker."""

    views: dict[View, Tensor] | None
    """uint8, a quarter of the bytes of float32; None when a position met only bad images."""
    keys: tuple[str, ...]
    origins: tuple[ViewOrigin, ...]
    bad: tuple[Bad, ...]


class _Tasks:
    """One micro-batch after the other, without end."""

    def __init__(self, slices: Slices, images_per_step: int, start_step: int):
        self._slices, self._images_per_step, self._start = slices, images_per_step, start_step

    def __iter__(self) -> Iterator[_Task]:
        for step in itertools.count(self._start):
            first = step * self._images_per_step
            for item in self._slices(step):
                assert 0 <= item.start < item.stop <= self._images_per_step, str(item)
                views = item.views or {View(item.size): None}
                yield _Task(first + item.start, first + item.stop, item.size, views)


class _Views(Dataset[Any]):
    """Makes micro-batches, in whichever process."""

    def __init__(self, reader: ShardReader, order: SampleOrder, config: DataConfig, seed: int):
        self._reader, self._order, self._config, self._seed = reader, order, config, seed

    def __getitem__(self, task: _Task) -> "_Batch | DataError":
        try:
            return self._batch(task)
        except DataError as error:  # as a value, for DataLoader would wrap it in a stack trace
            return error

    def _batch(self, task: _Task) -> _Batch:
        pixels: dict[View, list[Tensor]] = {view: [] for view in task.views}
        keys: list[str] = []
        origins: list[ViewOrigin] = []
        bad: list[Bad] = []
        for position in range(task.start, task.stop):
            found = self._find(position, bad)
            if found is None:
                return _Batch(None, tuple(keys), tuple(origins), tuple(bad))
            key, image = found
            generator = view_generator(self._seed, position)
            origin = random_origin(image, task.size, self._config, generator)
            whole = cut(image, origin)
            for view, crops in task.views.items():
                crop = None if crops is None else crops[position - task.start]
                pixels[view].append(render(whole, view.size, crop))
            keys.append(key)
            origins.append(origin)
        views = {view: torch.stack(rows) for view, rows in pixels.items()}
        return _Batch(views, tuple(keys), tuple(origins), tuple(bad))

    def _find(self, position: int, bad: list[Bad]) -> tuple[str, Image] | None:
        """Return key and image of a position, or of its first good substitute."""
        place = self._order.at(position)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            key = self._reader.key(*place)  # by number, as the index may not be readable
            try:
                sample = self._reader.sample(*place)
                key = self._reader.key(place.shard, sample)
                return key, self._decode(self._reader.image_bytes(place.shard, sample))
            except BadImageError as error:
                bad.append(Bad(key, error.kind, str(error)))
            place = self._order.substitute(position, attempt)
        return None

    def _decode(self, data: bytes) -> Image:
        config = self._config
        return decode_image(data, max_pixels=config.max_pixels, min_size=config.min_size)


def _as_is(batch: Any) -> Any:
    return batch
