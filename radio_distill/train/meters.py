"""Means of what the steps between two log lines gave, and how fast they were."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from ..system.distributed import all_reduce_sum

T = TypeVar("T")


class Meter:
    """Weighted means of named values, exact over ranks and micro-batches.

    A name may be absent from a micro-batch or from a rank.

    Args:
        names: all names that any rank will report, in the same order on every rank.
        device: where the values live; nothing is copied to the host before :meth:`means`.
    """

    def __init__(self, names: Sequence[str], device: torch.device):
        self._names = list(names)
        self._sums = torch.zeros(2, len(self._names), dtype=torch.float64, device=device)

    def add(self, values: Mapping[str, Tensor], weight: float) -> None:
        """Add scalar means that stand for ``weight`` images."""
        for name, value in values.items():
            index = self._names.index(name)
            self._sums[0, index] += value.detach().double() * weight
            self._sums[1, index] += weight

    def means(self) -> dict[str, float]:
        """Return the means over all ranks since the last call, and start anew."""
        totals, weights = all_reduce_sum(self._sums).tolist()
        self._sums.zero_()
        return {
            name: total / weight
            for name, total, weight in zip(self._names, totals, weights, strict=True)
            if weight
        }


class Throughput:
    """Rate of a run, and what its time is spent on, from one log line to the next.

    Args:
        images: of the stage, that were done before.
    """

    def __init__(self, images: int):
        self.rate = 0.0
        """Images a second of the last window."""
        self._images = images
        self._data = self._saving = 0.0  # seconds in this window
        self.start()

    def start(self) -> None:
        """Begin a window now."""
        self._begin = time.monotonic()

    def next(self, batches: Iterator[T]) -> T:
        """Wait for data."""
        begin = time.monotonic()
        batch = next(batches)
        self._data += time.monotonic() - begin
        return batch

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count the block as waiting for checkpoints."""
        begin = time.monotonic()
        yield
        self._saving += time.monotonic() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the block: no step is run in it."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._begin += time.monotonic() - begin

    def end_window(self, images: int, world_size: int) -> dict[str, float]:
        """Return rate and shares of this window, means over all ranks; every rank must call.

        Args:
            images: of the stage, that are done.
            world_size: processes of the run.
        """
        seconds = max(time.monotonic() - self._begin, 1e-9)
        shares = torch.tensor([self._data, self._saving]) / (seconds * world_size)
        data, saving = all_reduce_sum(shares).tolist()
        self.rate = (images - self._images) / seconds
        self._images, self._data, self._saving = images, 0.0, 0.0
        self.start()
        return {
            "images_per_second": self.rate,
            "data_wait_share": data,
            "checkpoint_wait_share": saving,
        }
