"""What a fit learns from in each step: images and views, and what the teacher says of them.

Whole images, tiles and views of a pass are encoded in one batch. Images and views of a step are
a function of seed and step alone: they depend neither on the number of processes nor on where a run
was interrupted.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from radio_distill.config import FitConfig
from radio_distill.data.loader import StepSlice
from radio_distill.distill.targets import check_targets
from radio_distill.errors import ConfigError
from radio_distill.protocols import Teacher
from radio_distill.system.distributed import World
from radio_distill.types import Features, ImageBatch, Size

from ..fitted import TeacherOutput
from ..networks import Observation
from .views import VIEWS, draw_homographies, render

if TYPE_CHECKING:
    from .task import FitRun


class Lesson(NamedTuple):
    """Images of one pass as the teacher sees them, and the views of them that must be met."""

    seen: TeacherOutput
    homographies: Tensor
    """``[B, V, 3, 3]``."""
    keys: tuple[str, ...]
    """Names of the images."""

    def maps(self) -> Iterator[tuple[Tensor, list[str]]]:
        """Yield everything that the teacher said, with the name of each map's image."""
        observation = self.seen.observation
        for maps in (observation.low, *observation.tiles.values(), self.seen.further):
            each = len(maps) // len(self.keys)
            yield maps, [key for key in self.keys for _ in range(each)]


class Clock:
    """How much of the steps' time the teacher takes."""

    def __init__(self) -> None:
        self._teacher = self._total = self._begin = 0.0

    @property
    def teacher_share(self) -> float:
        return self._teacher / max(self._total, 1e-9)

    def start(self, device: torch.device) -> None:
        self._begin = now(device)

    def stop(self, device: torch.device) -> None:
        self._total += now(device) - self._begin

    def teach(self, encode: Callable[[], Lesson], device: torch.device) -> Lesson:
        begin = now(device)
        lesson = encode()
        self._teacher += now(device) - begin
        return lesson


def now(device: torch.device) -> float:
    """Return the time in seconds, once the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def lessons(run: "FitRun", clock: Clock) -> Iterator[list[Lesson]]:
    """Yield for each step, from ``run.start_step`` and without end, one lesson a pass.

    With ``fit.pool`` the first steps' lessons are kept in memory, in half precision, and come
    again; a resumed run makes them once more.
    """
    kept = run.config.pool // run.config.batch_size
    if not kept:
        for step, batches in zip(
            count(run.start_step), run.source.batches(run.start_step), strict=False
        ):
            yield _encoded(run, step, batches, clock)
        return
    new = run.source.batches(len(run.pool))
    for step in count():
        if step == len(run.pool) < kept:
            encoded = _encoded(run, step, next(new), clock)
            run.pool.append([_halved(lesson, run.teacher.spec.name) for lesson in encoded])
        if step >= run.start_step:
            yield [_converted(lesson, torch.float32) for lesson in run.pool[step % kept]]


def _encoded(run: "FitRun", step: int, batches: Sequence[ImageBatch], clock: Clock) -> list[Lesson]:
    return [
        clock.teach(partial(_lesson, run, step, item, batch), run.device)
        for item, batch in zip(run.slices, batches, strict=True)
    ]


def _lesson(run: "FitRun", step: int, item: StepSlice, batch: ImageBatch) -> Lesson:
    """Encode images, their tiles and their views in one batch."""
    pixels = batch.pixels.to(run.device, non_blocking=True)  # [B, 3, H, W]
    drawn = step_homographies(run.seed, step, run.config)[item.start : item.stop].to(run.device)
    views = render(pixels, drawn.flatten(0, 1), run.size)  # [(B V), 3, H', W']
    grid = fine_grid(run.teacher, run.size, run.config.factor)
    seen = run.consistency.model.encode(run.teacher, pixels, grid, run.config.factor, further=views)
    return Lesson(seen, drawn, batch.keys)


def _halved(lesson: Lesson, teacher: str) -> Lesson:
    """Convert for the pool, where each lesson is met again and again.

    Raises:
        DivergedError: where the teacher's numbers are not finite.
        ConfigError: where features overflow half precision.
    """
    for maps, keys in lesson.maps():
        check_targets({teacher: Features(None, maps)}, keys)
    half = _converted(lesson, torch.float16)
    if not all(bool(maps.isfinite().all()) for maps, _ in half.maps()):
        raise ConfigError(
            f"fit.pool is kept in half precision, which features of {teacher!r} overflow; set "
            "normalizer.name to phi_s, or fit.pool to 0"
        )
    return half


def _converted(lesson: Lesson, dtype: torch.dtype) -> Lesson:
    guidance, low, tiles = lesson.seen.observation
    observation = Observation(
        guidance.to(dtype), low.to(dtype), {level: maps.to(dtype) for level, maps in tiles.items()}
    )
    seen = TeacherOutput(lesson.seen.summary, observation, lesson.seen.further.to(dtype))
    return lesson._replace(seen=seen)


def fine_grid(teacher: Teacher, size: Size, factor: int) -> Size:
    """Return the grid of an upsampler's map where the teacher's input measures ``size``."""
    height, width = teacher.spec.grid(size)
    return height * factor, width * factor


def share_of(config: FitConfig, world: World, micro_batch: int, size: Size) -> list[StepSlice]:
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
