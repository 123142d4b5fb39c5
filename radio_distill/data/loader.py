"""Batches of views for one process, from any step on, equal for every number of workers.

Image j of step s is the sample at position ``s * images_per_step + j`` of ``order.SampleOrder``,
cut by a generator that depends on seed and position alone. So the batches of a step are the same
whoever makes them: this process or a worker, one training process or many, after a resume or not.

A bad image is counted, logged and replaced by another of the same source, which depends on seed,
position and attempt alone; dropping it instead would shift every later batch.
"""

import atexit
import itertools
import logging
import math
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..config import DataConfig, plain
from ..errors import DataError, RadioDistillError
from ..system.signals import SIGNALS
from ..types import ImageBatch, Size, View, ViewOrigin
from .ahead import Ahead
from .bands import decode
from .images import FIELD_OF_KIND, BadImageError
from .order import SampleOrder, StepLayout, view_generator
from .remote import Remote
from .rendering import random_origin, render
from .sources import open_sources
from .tar_reader import ShardReader

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 50
"""Images that are tried for one position; when all of them are bad, the data is."""
_MAX_OPEN = 256
_MIN_READS = 50  # before that, the share of bad images says nothing
_LOGGED_SINGLY = 20
_SUMMARY_EVERY = 1000
_GRACE = 2.0  # seconds that workers have to end by themselves; one may wait for a disk for longer


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
"""The slices of a step, counted from 0, that one process makes; one at least."""


def in_every_step(slices: Sequence[StepSlice]) -> Slices:
    """Return slices that are the same in every step."""
    return lambda step: slices


class WorkerDiedError(DataError):
    """A process that was ended from outside, for instance because memory was short."""

    exit_status = 1
    """It may go well the next time."""


class BadImage(NamedTuple):
    """One image that could not be used."""

    key: str
    kind: str
    reason: str


class BadImageCounter:
    """Counts the bad images that one process has read, names them in the log, and limits them.

    Args:
        max_share: the share of bad images that is too much.
    """

    def __init__(self, max_share: float):
        self._max_share = max_share
        self._last: BadImage | None = None
        self.num_reads = 0
        self.bad: Counter[str] = Counter()

    def add(self, num_good: int, bad: Iterable[BadImage]) -> None:
        """Count what was read; the first bad images are logged one by one, then summaries."""
        self.num_reads += num_good
        for image in bad:
            self.num_reads += 1
            self.bad[image.kind] += 1
            self._last = image
            total = self.bad.total()
            if total <= _LOGGED_SINGLY:
                logger.warning("bad image %s (%s): %s", *image)
            if total == _LOGGED_SINGLY:
                logger.warning("further bad images are summed up every %d", _SUMMARY_EVERY)
            if total % _SUMMARY_EVERY == 0:
                logger.warning("bad images: %s", self.verdict())

    def check(self) -> None:
        """Raise DataError when clearly more images are bad than may be."""
        if too_many_bad(self.bad.total(), self.num_reads, self._max_share):
            raise DataError(f"too many bad images: {self.verdict()}")

    def verdict(self) -> str:
        """Return how many are bad, of which kinds, what the limit is, and how to find them."""
        assert self._last is not None, "a verdict needs a bad image"
        kinds = ", ".join(
            f"{count} {kind}" + (f" by {FIELD_OF_KIND[kind]}" if kind in FIELD_OF_KIND else "")
            for kind, count in self.bad.most_common()
        )
        return (
            f"{self.bad.total()} of {self.num_reads} read ({kinds}; data.max_bad_share is "
            f"{self._max_share:g}), the last was {self._last.key}: {self._last.reason}; list all "
            "of them with `radio-distill shards --check`"
        )


def too_many_bad(num_bad: int, num_reads: int, max_share: float) -> bool:
    """Tell whether the share of bad images is above the limit by more than chance explains.

    Chance is four standard deviations of a Poisson count, so that a long run with a share below the
    limit is not stopped by an unlucky start.
    """
    expected = max_share * num_reads
    return num_reads >= _MIN_READS and num_bad > expected + 4 * math.sqrt(expected)


class ShardBatches:
    """Views out of tar shards; satisfies ``protocols.BatchSource``.

    What is left out at the start is not part of the order, see ``sources``; what turns out bad when
    it is read stands in ``bad``.

    Args:
        config: the shards, and what is done to their images.
        seed: of order and views.
        images_per_step: images of one step, over all processes.
        slices: the images that this process makes in a step, one micro-batch each.
        own: images [start, stop) of each step that come from one named entry of the shards.

    Raises:
        DataError: no shards, or more of them damaged, or of their samples unfit, than may be.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        images_per_step: int,
        slices: Slices,
        own: Sequence[tuple[int, int, str]] = (),
    ):
        self._config, self._slices, self._images_per_step = config, slices, images_per_step
        self._sources = open_sources(config)
        self._order = SampleOrder(
            [[shard.num_samples for shard in source] for source in self._sources.by_source],
            weights=config.weights,
            seed=seed,
            window=config.shuffle_shards,
            layout=StepLayout(
                images_per_step,
                tuple((start, stop, config.names.index(name)) for start, stop, name in own),
                tuple((config.names.index(name), x) for name, x in config.homogeneous.items()),
            ),
        )
        max_open = min(_MAX_OPEN, 2 * config.shuffle_shards * len(self._sources.by_source))
        reader = ShardReader(
            self._sources.shards, max_open, config.read_timeout, config.max_bad_shards
        )
        self._views = _Views(reader, self._order, config, seed)
        self._counter = BadImageCounter(config.max_bad_share)

    @property
    def fingerprint(self) -> str:
        """sha256 of all that the order depends on besides the recipe; see ``Sources``."""
        return self._sources.fingerprint

    @property
    def bad(self) -> dict[str, int]:
        """Number of images read for this process, since it started, that were bad, by kind."""
        return dict(self._counter.bad)

    def batches(self, start_step: int) -> Iterator[list[ImageBatch]]:
        """Yield for each step, from ``start_step`` on and without end, one batch a slice.

        Raises:
            DataError: clearly more than ``max_bad_share`` of the images read are bad, the disk does
                not answer any more, or a worker died.
        """
        workers = plain(self._config.workers)
        in_a_step = len(self._slices(start_step))
        # A whole step is made ahead, whatever the number of its micro-batches.
        ahead = max(2, math.ceil(in_a_step / workers)) if workers else 2
        tasks = _tasks(self._slices, self._images_per_step, start_step)
        with made_by_workers(self._views.batch, tasks, workers, ahead) as stream:
            for step in itertools.count(start_step):
                yield [self._receive(next(stream)) for _ in self._slices(step)]

    def _receive(self, batch: "_Batch") -> ImageBatch:
        self._counter.add(len(batch.keys), batch.bad)
        if batch.views is None:
            verdict = self._counter.verdict()
            raise DataError(f"{MAX_ATTEMPTS} images in a row are bad: {verdict}")
        self._counter.check()
        return ImageBatch(batch.views, batch.keys, batch.origins)


class _Batch(NamedTuple):
    """One micro-batch on its way from a worker."""

    views: dict[View, Tensor] | None
    """uint8, channels last; None when a position met only bad images."""
    keys: tuple[str, ...]
    origins: tuple[ViewOrigin, ...]
    bad: tuple[BadImage, ...]


def _tasks(slices: Slices, images_per_step: int, start_step: int) -> Iterator[StepSlice]:
    """Yield one micro-batch after the other, without end, counted since the start of training."""
    for step in itertools.count(start_step):
        first = step * images_per_step
        for piece in slices(step):
            assert 0 <= piece.start < piece.stop <= images_per_step, str(piece)
            yield replace(piece, start=first + piece.start, stop=first + piece.stop)


class _Views:
    """Makes micro-batches, in whichever process."""

    def __init__(self, reader: ShardReader, order: SampleOrder, config: DataConfig, seed: int):
        self._reader, self._order, self._config, self._seed = reader, order, config, seed
        self._has_remote = any(isinstance(shard.path, Remote) for shard in reader.shards)
        self._ahead: Ahead | None = None

    def _fetch_ahead(self, position: int) -> None:
        """Let the first worker fill the cache of remote shards, in threads of its own."""
        worker = get_worker_info()
        if not self._has_remote or (worker is not None and worker.id > 0):
            return
        if self._ahead is None:  # here, for threads do not go from process to process
            self._ahead = Ahead(self._reader.shards, self._order)
        self._ahead.move(position)

    def batch(self, task: StepSlice) -> _Batch:
        """Make one micro-batch, of images counted since the start of training."""
        self._fetch_ahead(task.start)
        views = task.views or {View(task.size): None}
        pixels = {
            view: torch.empty(
                (task.stop - task.start, self._config.bands, *view.size),
                dtype=torch.uint8,
                memory_format=torch.channels_last,
            )
            for view in views
        }
        keys: list[str] = []
        origins: list[ViewOrigin] = []
        bad: list[BadImage] = []
        for row, position in enumerate(range(task.start, task.stop)):
            readable = self._readable(position, bad)
            if readable is None:
                return _Batch(None, tuple(keys), tuple(origins), tuple(bad))
            key, image = readable
            generator = view_generator(self._seed, position)
            source = image.shape[1], image.shape[2]
            origin = random_origin(source, task.size, self._config, generator)
            for view, crops in views.items():
                crop = None if crops is None else crops[row]
                render(image, origin, view.size, crop, out=pixels[view][row])
            keys.append(key)
            origins.append(origin)
        return _Batch(pixels, tuple(keys), tuple(origins), tuple(bad))

    def _readable(self, position: int, bad: list[BadImage]) -> tuple[str, Tensor] | None:
        """Return key and pixels of a position, or of its first good substitute."""
        config, place = self._config, self._order.at(position)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            key = self._reader.key(*place)  # by number, as the index may not be readable
            try:
                sample = self._reader.sample(*place)
                key = self._reader.key(place.shard, sample)
                data = self._reader.image_bytes(place.shard, sample)
                return key, decode(data, config)
            except BadImageError as error:
                bad.append(BadImage(key, error.kind, str(error)))
            place = self._order.substitute(position, attempt)
        return None


class _Made(Dataset[Any]):
    """What a function makes, in whichever process."""

    def __init__(self, make: Callable[[Any], Any]):
        self._make = make

    def __getitem__(self, task: Any) -> Any:
        try:
            return self._make(task)
        except (
            RadioDistillError
        ) as error:  # as a value, for DataLoader would wrap it in a stack trace
            return error


def _as_is(item: Any) -> Any:
    return item


def _or_raised(item: Any) -> Any:
    if isinstance(item, RadioDistillError):
        raise item
    return item


def _prepare_worker(worker: int) -> None:
    """Make a new process ready to decode.

    Slurm sends its signals to every process of a job; a worker would run the handler of its parent,
    or die before the parent has saved.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")  # what matters is counted as a bad image


@contextmanager
def made_by_workers(
    make: Callable[[Any], Any], tasks: Iterable[Any], workers: int, ahead: int
) -> Iterator[Iterator[Any]]:
    """Give ``make(task)`` for each of ``tasks`` in turn, made by processes of its own.

    Their tensors lie in pinned memory where there is a GPU. The processes end with the block in any
    case; as they ignore SIGTERM, multiprocessing would wait for them for ever at the end of the
    program.

    Args:
        make: may raise an error of ours, which is raised here too.
        tasks: may be endless.
        workers: processes; 0 for this one.
        ahead: items that each of them makes before they are asked for.

    Raises:
        WorkerDiedError: from within the block, where one of them died.
    """
    loader: DataLoader[Any] = DataLoader(
        _Made(make),
        sampler=tasks,
        batch_size=None,  # an item is whole
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        pin_memory=torch.cuda.is_available(),
        collate_fn=_as_is,
        worker_init_fn=_prepare_worker,
        generator=torch.Generator(),  # else it draws from the global one
    )
    # Workers inherit the mask, so that no signal can reach one while it starts.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    stream = iter(loader)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    end = partial(_end, stream)
    atexit.register(end)
    try:
        yield map(_or_raised, stream)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise WorkerDiedError(
            "a decoding process died; if memory or /dev/shm is short, lower data.workers"
        ) from error
    finally:
        atexit.unregister(end)
        end()


def _end(stream: Any) -> None:
    workers = getattr(stream, "_workers", [])  # there are none with workers=0
    timer = threading.Timer(_GRACE, _kill, [workers])
    if any(worker.is_alive() for worker in workers):  # not when called again after atexit
        with suppress(RuntimeError):  # at the end of a program no thread may start any more
            timer.start()
    with suppress(RuntimeError):  # torch tells again of a worker that died
        getattr(stream, "_shutdown_workers", lambda: None)()
    timer.cancel()
    _kill(workers)
    for worker in workers:
        worker.join(_GRACE)


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()  # does nothing where a worker has ended
