"""What a fit learns from in each step: images, views of them, and the teacher's features of both.

Whole images, tiles and views of a pass are encoded in one batch. Images and views of a step are
a function of seed and step alone: they depend neither on the number of processes nor on where a run
was interrupted.
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from radio_distill.config import FitConfig
from radio_distill.data.loader import StepSlice
from radio_distill.errors import ConfigError
from radio_distill.system.distributed import World
from radio_distill.train.health import check_targets
from radio_distill.types import Features, Size

from ..fitted import TeacherOutput
from ..networks import Observation
from .views import VIEWS, draw_homographies

T = TypeVar("T")


class FitBatch(NamedTuple):
    """Images of one pass as the teacher sees them, and the views of them that must be met."""

    output: TeacherOutput
    homographies: Tensor
    """``[B, V, 3, 3]``; V is 0 where images are halved in place of views."""
    keys: tuple[str, ...]
    """Names of the images."""

    def maps(self) -> Iterator[tuple[Tensor, list[str]]]:
        """Yield all of the teacher's maps, with the name of each map's image."""
        observation = self.output.observation
        output = self.output
        for maps in (observation.low, *observation.tiles.values(), output.further, *output.halves):
            each = len(maps) // len(self.keys)
            yield maps, [key for key in self.keys for _ in range(each)]

    def to(self, dtype: torch.dtype) -> "FitBatch":
        """Return the batch with features and guidance in another type."""
        guidance, low, tiles = self.output.observation
        observation = Observation(
            guidance.to(dtype),
            low.to(dtype),
            {level: maps.to(dtype) for level, maps in tiles.items()},
        )
        further = self.output.further.to(dtype)
        halves = tuple(maps.to(dtype) for maps in self.output.halves)
        output = TeacherOutput(self.output.summary, observation, further, halves)
        return self._replace(output=output)


class TeacherTimer:
    """Measures which share of the time since the first call is the teacher's.

    A GPU notes its own times, and is waited for where the share is read alone.
    """

    def __init__(self) -> None:
        self._teacher, self._begin = 0.0, 0.0
        self._noted: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def share(self) -> float:
        """The teacher's share, 0 to 1; 0 before the first call."""
        for begin, end in self._noted:
            end.synchronize()
            self._teacher += begin.elapsed_time(end) / 1000
        self._noted.clear()
        total = time.monotonic() - self._begin
        return self._teacher / max(total, 1e-9) if self._begin else 0.0

    def time(self, encode: Callable[[], T], device: torch.device) -> T:
        """Call a function, and count its time as the teacher's."""
        now = time.monotonic()
        self._begin = self._begin or now
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = encode()
            end.record()
            self._noted.append((begin, end))
        else:
            result = encode()
            self._teacher += time.monotonic() - now
        return result


def halved(batch: FitBatch, teacher: str) -> FitBatch:
    """Convert to half precision for the pool, whose batches are met again and again.

    Raises:
        DivergedError: where the teacher's numbers are not finite.
        ConfigError: where features overflow half precision.
    """
    for maps, keys in batch.maps():
        check_targets({teacher: Features(None, maps)}, keys)
    half = batch.to(torch.float16)
    if not all(bool(maps.isfinite().all()) for maps, _ in half.maps()):
        raise ConfigError(
            f"fit.pool is kept in half precision, which features of {teacher!r} overflow; set "
            "normalizer.name to phi_s, or fit.pool to 0"
        )
    return half


def assign_images(config: FitConfig, world: World, micro_batch: int, size: Size) -> list[StepSlice]:
    """Return which images of a step this process works on, a slice for each pass.

    Raises ConfigError where there are more processes than images.
    """
    if world.world_size > config.batch_size:
        raise ConfigError(
            f"fit.batch_size: {config.batch_size} images cannot be shared out to "
            f"{world.world_size} processes; raise it or start fewer"
        )
    first = world.rank * config.batch_size // world.world_size
    last = (world.rank + 1) * config.batch_size // world.world_size
    step = micro_batch or last - first
    return [StepSlice(at, min(at + step, last), size) for at in range(first, last, step)]


def step_homographies(seed: int, step: int, config: FitConfig) -> Tensor:
    """Return the views of a whole step ``[batch_size, views, 3, 3]``: of seed and step alone."""
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    flat = draw_homographies(config.batch_size * config.views, VIEWS[config.view_range], generator)
    return rearrange(flat, "(b v) i j -> b v i j", v=config.views)
