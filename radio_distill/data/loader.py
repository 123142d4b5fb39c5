"""Batches of views for one process, from any step on, equal for every number of workers.

Image j of step s is the sample at position ``s * images_per_step + j`` of ``position.SampleOrder``,
cut by a generator that depends on seed and position alone. So the batches of a step are the same
whoever makes them: this process or a worker, one training process or many, after a resume or not.

A bad image is counted, logged and replaced by another of the same source, which depends on seed,
position and attempt alone; dropping it instead would shift every later batch.
"""

import atexit
import hashlib
import itertools
import logging
import math
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import DataConfig
from ..errors import DataError
from ..types import ImageBatch, Size, ViewOrigin
from .images import BadImageError, decode_image, random_view, to_float
from .index import Shard, open_shards
from .position import SampleOrder, view_generator
from .reader import ShardReader
from .shards import find_shards

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 50
"""Images that are tried for one position; when all of them are bad, the data is."""
_MAX_OPEN = 256
_MIN_READS = 50  # before that, the share of bad images says nothing


@dataclass(frozen=True)
class StepSlice:
    """Images [start, stop) of each step's global batch, at one size in pixels."""

    start: int
    stop: int
    size: Size


Slices = Callable[[int], Sequence[StepSlice]]
"""The slices of a step, counted from 0, that one process makes."""


def in_every_step(slices: Sequence[StepSlice]) -> Slices:
    """Return slices that are the same in every step."""
    return lambda step: slices


class Bad(NamedTuple):
    """One image that could not be used."""

    key: str
    kind: str
    reason: str


class ShardBatches:
    """Views out of tar shards; satisfies ``protocols.BatchSource``.

    Args:
        config: the shards, and what is done to their images.
        seed: of order and views.
        images_per_step: images of one step, over all processes.
        slices: the images that this process makes in a step, one micro-batch each.

    Raises:
        DataError: no shards, or a damaged one.
    """

    def __init__(self, config: DataConfig, *, seed: int, images_per_step: int, slices: Slices):
        self._config = config
        self._images_per_step = images_per_step
        self._slices = slices
        sources = _open_sources(config)
        self._shards = [shard for source in sources for shard in source]
        self._order = SampleOrder(
            [[shard.num_samples for shard in source] for source in sources],
            weights=config.weights,
            seed=seed,
            window=config.shuffle_shards,
        )
        max_open = min(_MAX_OPEN, 2 * config.shuffle_shards * len(sources))
        reader = ShardReader(self._shards, max_open)
        self._views = _Views(reader, self._order, config, seed)
        self._num_reads = 0
        self._bad: Counter[str] = Counter()
        self._last_bad: Bad | None = None

    @property
    def num_images(self) -> int:
        """Images in all shards."""
        return self._order.num_samples

    @property
    def fingerprint(self) -> str:
        """sha256 over names, sizes and contents of the shards, wherever they lie."""
        facts = sorted(f"{shard.path.name} {shard.size} {shard.digest}" for shard in self._shards)
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    @property
    def bad(self) -> dict[str, int]:
        """Bad images met so far, by kind."""
        return dict(self._bad)

    def batches(self, start_step: int) -> Iterator[list[ImageBatch]]:
        """Yield for each step, from ``start_step`` on and without end, one batch a slice.

        Raises:
            DataError: clearly more than ``max_bad_share`` of the images read are bad, a shard
                cannot be read any more, or a worker died.
        """
        try:
            with _running(self._loader(start_step)) as stream:
                for step in itertools.count(start_step):
                    yield [self._receive(next(stream)) for _ in self._slices(step)]
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                "a decoding process died; if memory or /dev/shm is short, lower data.workers"
            ) from error

    def _loader(self, start_step: int) -> "DataLoader[Any]":
        return DataLoader(
            self._views,
            sampler=_Tasks(self._slices, self._images_per_step, start_step),
            batch_size=None,  # a task is a whole micro-batch
            num_workers=self._config.workers,
            collate_fn=_as_is,
            worker_init_fn=_prepare_worker,
            generator=torch.Generator(),  # else it draws from the global one
        )

    def _receive(self, batch: "_Batch | DataError") -> ImageBatch:
        if isinstance(batch, DataError):
            raise batch
        self._count(batch)
        if batch.pixels is None:
            raise DataError(f"{MAX_ATTEMPTS} images in a row are bad: {self._verdict()}")
        if too_many_bad(self._bad.total(), self._num_reads, self._config.max_bad_share):
            raise DataError(f"too many bad images: {self._verdict()}")
        return ImageBatch(to_float(batch.pixels), batch.keys, batch.origins)

    def _count(self, batch: "_Batch") -> None:
        self._num_reads += len(batch.keys) + len(batch.bad)
        for item in batch.bad:
            logger.warning("bad image %s (%s): %s", *item)
            self._bad[item.kind] += 1
            self._last_bad = item

    def _verdict(self) -> str:
        assert self._last_bad is not None, "a verdict needs a bad image"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self._bad.most_common())
        key, _, reason = self._last_bad
        return (
            f"{self._bad.total()} of {self._num_reads} read ({kinds}; data.max_bad_share is "
            f"{self._config.max_bad_share:g}), the last was {key}: {reason}; list all of them with "
            "`radio-distill shards --check`"
        )


def too_many_bad(num_bad: int, num_reads: int, max_share: float) -> bool:
    """Tell whether the share of bad images is above the limit by more than chance explains.

    Chance is four standard deviations of a Poisson count, so that a long run with a share below the
    limit is not stopped by an unlucky start.
    """
    expected = max_share * num_reads
    return num_reads >= _MIN_READS and num_bad > expected + 4 * math.sqrt(expected)


def _open_sources(config: DataConfig) -> list[list[Shard]]:
    if not config.weights:
        return [open_shards(find_shards(config.shards))]
    return [open_shards(find_shards([entry])) for entry in config.shards]


class _Task(NamedTuple):
    """One micro-batch to make: the views at [start, stop), counted since the start of training."""

    start: int
    stop: int
    size: Size


class _Batch(NamedTuple):
    """One micro-batch on its way from a worker."""

    pixels: Tensor | None
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
                yield _Task(first + item.start, first + item.stop, item.size)


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
        pixels: list[Tensor] = []
        keys: list[str] = []
        origins: list[ViewOrigin] = []
        bad: list[Bad] = []
        for position in range(task.start, task.stop):
            found = self._find(position, bad)
            if found is None:
                return _Batch(None, tuple(keys), tuple(origins), tuple(bad))
            key, image = found
            generator = view_generator(self._seed, position)
            view, origin = random_view(image, task.size, self._config, generator)
            pixels.append(view)
            keys.append(key)
            origins.append(origin)
        return _Batch(torch.stack(pixels), tuple(keys), tuple(origins), tuple(bad))

    def _find(self, position: int, bad: list[Bad]) -> tuple[str, Image] | None:
        """Return key and picture of a position, or of its first good substitute."""
        place = self._order.at(position)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            sample = self._reader.sample(*place)
            key = self._reader.key(place.shard, sample)
            try:
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


_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""Slurm sends them to every process of a job; a worker would run the handler of its parent, or die
before the parent has saved."""


def _prepare_worker(worker: int) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")  # what matters is counted as a bad image


@contextmanager
def _running(loader: "DataLoader[Any]") -> Iterator[Iterator["_Batch | DataError"]]:
    """Start the workers of a loader, and end them in any case.

    As they ignore SIGTERM, multiprocessing would wait for them for ever at the end of the program.
    """
    # Workers inherit the mask, so that no signal can reach one while it starts.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    stream = iter(loader)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    end = getattr(stream, "_shutdown_workers", lambda: None)  # there are none with workers=0
    atexit.register(end)
    try:
        yield stream
    finally:
        atexit.unregister(end)
        with suppress(RuntimeError):  # torch tells again of a worker that died
            end()
