"""Fits an upsampler to a frozen teacher, by the consistency of random views.

::

    picture ─┬─► teacher (whole, tiles) ─► model ─► fine map ─► warp ─► downsample ─┐
             │                                                                     ├─► loss
             └─► render views ────────────► teacher ─► PHI-S, + bias ──────────────┘

A fine map is right where each view of it, made as coarse as the teacher, is what the teacher says
of that view of the picture (FeatUp, arXiv 2403.10516, section 3; FeatSharp, arXiv 2502.16025,
section 3.1). Whole, tiles and views of a step are encoded in one batch. Every draw is a function of
seed and step, so an interrupted fit goes on with the same numbers, and the pictures and views of a
step do not depend on the number of processes.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from radio_distill.config import FitConfig, Recipe
from radio_distill.data.loader import StepSlice
from radio_distill.errors import CheckpointError, ConfigError
from radio_distill.progress import Progress
from radio_distill.protocols import BatchSource, Teacher
from radio_distill.registry import nearest
from radio_distill.train import checkpoint as checkpoints
from radio_distill.train.checkpoint import Checkpoint
from radio_distill.train.distributed import World, from_main, sum_over_ranks
from radio_distill.train.guard import check_gradient, check_loss, check_targets
from radio_distill.train.optim import load_optimizer_tensors, optimizer_tensors
from radio_distill.train.schedule import cosine, every
from radio_distill.train.sinks import Sinks, open_sinks
from radio_distill.types import Features, ImageBatch, Size

from .downsamplers import build_downsampler
from .losses import UncertaintyNet, conditional_random_field, masked_mse, project, total_variation
from .model import Seen, UpsamplerModel
from .networks import Observation
from .views import VIEWS, draw_homographies, render, valid_mask, warp

logger = logging.getLogger(__name__)

MODULES = "upsampler"
"""Name of the checkpoint's file of weights."""
_CRF_CHANNELS = 128


class Consistency(nn.Module):
    """The loss of a fit, with everything that it trains.

    Args:
        model: what is fitted.
        config: the recipe's section ``fit``.
        channels: C of the teacher.
    """

    def __init__(self, model: UpsamplerModel, config: FitConfig, channels: int):
        super().__init__()
        self.model = model
        self.downsampler = build_downsampler(
            config.downsampler, channels, config.factor, config.downsampler_kernel
        )
        self.uncertainty = UncertaintyNet(channels) if config.uncertainty else None
        self._config = config

    def forward(
        self, seen: Seen, homographies: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each picture ``[B]`` and the terms it consists of, each ``[B]``.

        Args:
            seen: the pictures, with the views as its further pictures, in the order of
                ``homographies``.
            homographies: ``[B, V, 3, 3]``, see :mod:`upsamplers.views`.
            generator: of the pixels that the conditional random field looks at.
        """
        config, observation = self._config, seen.observation
        fine = self.model(observation).float()  # [B, C, H, W]
        prediction = self.reconstruct(fine, homographies)  # [(B V), C, h, w]
        target = self.model.de_biased(seen.further)
        grid = (target.shape[-2], target.shape[-1])
        valid = valid_mask(homographies.flatten(0, 1), grid)  # [(B V), h, w]
        log_scale = None if self.uncertainty is None else self.uncertainty(seen.further)
        views = masked_mse(prediction, target, valid, log_scale)
        terms = {"consistency": rearrange(views, "(b v) -> b v", b=len(fine)).mean(1)}
        loss = terms["consistency"]
        if config.total_variation:
            terms["total_variation"] = total_variation(fine)
            loss = loss + config.total_variation * terms["total_variation"]
        if config.crf:
            few = project(fine, _CRF_CHANNELS, generator)
            terms["crf"] = conditional_random_field(
                few, observation.guidance, "featup", generator=generator
            )
            loss = loss + config.crf * terms["crf"]
        return loss, terms

    def reconstruct(self, fine: Tensor, homographies: Tensor) -> Tensor:
        """Predict the teacher's maps of views ``[(B V), C, h, w]`` from fine maps."""
        size = (fine.shape[-2], fine.shape[-1])
        coarse: Tensor = self.downsampler(warp(fine, homographies.flatten(0, 1), size))
        return coarse


@dataclass
class FitRun:
    """Everything that one process needs to fit an upsampler."""

    recipe: Recipe
    folder: Path
    world: World
    device: torch.device
    teacher: Teacher
    consistency: Consistency
    size: Size
    """The teacher's input, in pixels."""
    source: BatchSource
    """This process's pictures, ``factor`` times that size."""
    slices: Sequence[StepSlice]
    """Which pictures of a step they are."""
    start_step: int = 0
    last_checkpoint: Path | None = None
    pool: "list[list[Lesson]]" = field(default_factory=list)
    """What is kept with ``fit.pool``; fits of one teacher, size and factor can share one list,
    where the first of them looks at all tiles that any looks at."""

    @property
    def config(self) -> FitConfig:
        return self.recipe.fit

    @property
    def seed(self) -> int:
        return self.recipe.seed


def share_of(config: FitConfig, world: World, micro_batch: int, size: Size) -> list[StepSlice]:
    """Return which pictures of a step this process works on, a slice for each pass.

    Raises ConfigError where there are more processes than pictures.
    """
    if world.world_size > config.batch_size:
        raise ConfigError(
            f"fit.batch_size: {config.batch_size} pictures cannot be shared out to "
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


def fit(run: FitRun) -> None:
    """Fit from ``run.start_step`` to the end; the last checkpoint holds the result.

    Raises:
        DivergedError: where a number is not finite; the message names the last good checkpoint.
        CheckpointError: where a checkpoint cannot be written.
    """
    config, log, total = run.config, run.recipe.log, run.config.steps
    modules = run.consistency.to(run.device).train()
    optimizer = torch.optim.NAdam(parameter_groups(modules, config))
    if run.last_checkpoint is not None:
        restore(modules, optimizer, checkpoints.read(run.last_checkpoint))
    rates = cosine(total, 1.0, 0.0, config.warmup_steps)
    images = config.batch_size
    seen = Progress(
        run.folder.name, total * images, "img", run.start_step * images, run.world.is_main
    )
    sinks = open_sinks(run.folder, log.tensorboard, run.world.is_main, run.start_step)
    clock = _Clock()
    steps = lessons(run, clock)
    with seen, sinks:
        for step in range(run.start_step, total):
            clock.start(run.device)
            step_lessons = next(steps)
            terms = accumulate(run, step, step_lessons)
            check_loss(terms["loss"], terms, step + 1, run.last_checkpoint)
            norm = _reduce_gradient(modules, config.gradient_clip)
            check_gradient(norm, step + 1, run.last_checkpoint)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * float(rates[step])
            optimizer.step()
            optimizer.zero_grad()
            clock.stop(run.device)
            done = step + 1
            seen.update(done * images, f"loss {float(terms['loss']):.4f}")
            if every(done, log.every, total):
                values = {name: float(sum_over_ranks(value)) for name, value in terms.items()}
                values |= {
                    "learning_rate": config.learning_rate * float(rates[step]),
                    "gradient_norm": norm,
                }
                values |= {"images_per_second": seen.rate, "teacher_share": clock.teacher_share}
                sinks.write(done, values)
            if every(done, config.pictures_every, total) and run.world.is_main:
                _write_pictures(run, done, step_lessons[0].seen, sinks)
            if every(done, log.save_every, total):
                run.last_checkpoint = _save(run, done, optimizer)
    logger.info("%s: %.0f %% of a step is the teacher", run.folder.name, 100 * clock.teacher_share)


def parameter_groups(modules: nn.Module, config: FitConfig) -> list[dict[str, Any]]:
    """Group parameters by learning rate: ``fit.rates`` by a part of the name, else the common one.

    Raises ConfigError where a part of ``fit.rates`` is in no parameter's name.
    """
    names = [name for name, _ in modules.named_parameters()]
    for part in config.rates:
        if not any(part in name.split(".") for name in names):
            known = sorted({piece for name in names for piece in name.split(".")})
            raise ConfigError(
                f"fit.rates: no parameter is part of {part!r} ({nearest(part, known)})"
            )
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in modules.named_parameters():
        parts = name.split(".")
        own = [rate for part, rate in config.rates.items() if part in parts]
        groups.setdefault(own[0] if own else config.learning_rate, []).append(parameter)
    return [{"params": members, "lr": peak, "peak": peak} for peak, members in groups.items()]


class Lesson(NamedTuple):
    """Pictures of one pass as the teacher sees them, and the views of them that must be met."""

    seen: Seen
    homographies: Tensor
    """``[B, V, 3, 3]``."""


def lessons(run: FitRun, clock: "_Clock") -> Iterator[list[Lesson]]:
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
            run.pool.append([_converted(lesson, torch.float16) for lesson in encoded])
        if step >= run.start_step:
            yield [_converted(lesson, torch.float32) for lesson in run.pool[step % kept]]


def _encoded(
    run: FitRun, step: int, batches: Sequence[ImageBatch], clock: "_Clock"
) -> list[Lesson]:
    return [
        clock.teach(partial(_lesson, run, step, item, batch), run.device)
        for item, batch in zip(run.slices, batches, strict=True)
    ]


def _lesson(run: FitRun, step: int, item: StepSlice, batch: ImageBatch) -> Lesson:
    """Encode pictures, their tiles and their views in one batch."""
    pixels = batch.pixels.to(run.device, non_blocking=True)  # [B, 3, H, W]
    drawn = step_homographies(run.seed, step, run.config)[item.start : item.stop].to(run.device)
    views = render(pixels, drawn.flatten(0, 1), run.size)  # [(B V), 3, H', W']
    grid = fine_grid(run.teacher, run.size, run.config.factor)
    seen = run.consistency.model.see(run.teacher, pixels, grid, run.config.factor, further=views)
    for maps in (seen.observation.low, *seen.observation.tiles.values(), seen.further):
        keys = [key for key in batch.keys for _ in range(len(maps) // len(pixels))]
        check_targets({run.teacher.spec.name: Features(None, maps)}, keys)
    return Lesson(seen, drawn)


def _converted(lesson: Lesson, dtype: torch.dtype) -> Lesson:
    guidance, low, tiles = lesson.seen.observation
    observation = Observation(
        guidance.to(dtype), low.to(dtype), {level: maps.to(dtype) for level, maps in tiles.items()}
    )
    seen = Seen(lesson.seen.summary, observation, lesson.seen.further.to(dtype))
    return Lesson(seen, lesson.homographies)


def fine_grid(teacher: Teacher, size: Size, factor: int) -> Size:
    """Return the grid of an upsampler's map where the teacher's input measures ``size``."""
    height, width = teacher.spec.grid(size)
    return height * factor, width * factor


def accumulate(run: FitRun, step: int, step_lessons: Sequence[Lesson]) -> dict[str, Tensor]:
    """Run forward and backward on this process's part of a step.

    Returns this process's part of the step's loss and of its terms; over processes they add up.
    """
    # Dropout of the networks and of the downsampler draws from the global generator.
    torch.manual_seed(run.seed * 7919 + step * 131 + run.world.rank)
    totals: dict[str, Tensor] = {}
    for lesson in step_lessons:
        generator = torch.Generator().manual_seed(run.seed + step)
        with _autocast(run):
            loss, terms = run.consistency(lesson.seen, lesson.homographies, generator)
        (loss.sum() / run.config.batch_size).backward()
        for name, value in {"loss": loss, **terms}.items():
            part = value.detach().sum() / run.config.batch_size
            totals[name] = totals.get(name, torch.zeros_like(part)) + part
    return totals


def restore(modules: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Load weights and optimizer state of a fit's checkpoint."""
    modules.load_state_dict(checkpoint.tensors(MODULES))
    load_optimizer_tensors(optimizer, modules, checkpoint.tensors(checkpoints.OPTIMIZER))


class _Clock:
    """How much of the steps' time the teacher takes."""

    def __init__(self) -> None:
        self._teacher = self._total = self._begin = 0.0

    @property
    def teacher_share(self) -> float:
        return self._teacher / max(self._total, 1e-9)

    def start(self, device: torch.device) -> None:
        self._begin = _now(device)

    def stop(self, device: torch.device) -> None:
        self._total += _now(device) - self._begin

    def teach(self, encode: Callable[[], Lesson], device: torch.device) -> Lesson:
        begin = _now(device)
        lesson = encode()
        self._teacher += _now(device) - begin
        return lesson


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def _autocast(run: FitRun) -> torch.autocast:
    reduced = run.recipe.engine.precision == "bfloat16"
    return torch.autocast(run.device.type, torch.bfloat16, enabled=reduced)


def _reduce_gradient(modules: nn.Module, clip: float) -> float:
    """Sum gradients over processes and clip them; returns the norm before clipping."""
    gradients = [item.grad for item in modules.parameters() if item.grad is not None]
    for gradient in gradients:
        gradient.copy_(sum_over_ranks(gradient))
    limit = clip or float("inf")
    return float(nn.utils.clip_grad_norm_(modules.parameters(), limit))


def _save(run: FitRun, step: int, optimizer: torch.optim.Optimizer) -> Path:
    folder, problem = Path(), ""
    if run.world.is_main:
        modules = run.consistency
        parts = {
            MODULES: {name: value.cpu() for name, value in modules.state_dict().items()},
            checkpoints.OPTIMIZER: {
                name: value.cpu() for name, value in optimizer_tensors(optimizer, modules).items()
            },
        }
        try:
            folder = checkpoints.save(
                run.folder / "checkpoints",
                step,
                parts,
                stage="fit",
                recipe=run.recipe,
                teachers={run.teacher.spec.name: run.teacher.spec},
                keep_last=run.recipe.log.keep_last,
            )
        except CheckpointError as error:
            problem = str(error)
    folder, problem = from_main((folder, problem))
    if problem:
        raise CheckpointError(problem)
    return folder


@torch.no_grad()
def _write_pictures(run: FitRun, step: int, seen: Seen, sinks: Sinks) -> None:
    """Show pictures, coarse and fine maps side by side, in TensorBoard and as a file."""
    from PIL import Image

    from radio_distill.evals.pictures import pca_pictures, picture_grid

    model = run.consistency.model.eval()
    with _autocast(run):
        fine = model(seen.observation).float()
    model.train()
    low = model.de_biased(seen.observation.low)
    photographs = rearrange((seen.observation.guidance * 255).byte().cpu(), "b c h w -> b h w c")
    rows = [
        [Image.fromarray(picture.numpy()).resize((224, 224)), *pca_pictures(maps)]
        for picture, *maps in zip(photographs[:4], low, fine, strict=False)
    ]
    sheet = picture_grid(rows, [""] * len(rows), ["picture", "teacher", "upsampled"])
    sinks.write_picture(step, "features", np.asarray(sheet))
    folder = run.folder / "pictures"
    folder.mkdir(exist_ok=True)
    sheet.save(folder / f"step-{step:08d}.png")
