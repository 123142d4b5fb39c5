"""Fits an upsampler to a frozen teacher, by the consistency of random views.

::

    image ─┬─► teacher (whole, tiles) ─► model ─► fine map ─► warp ─► downsample ─┐
             │                                                                     ├─► loss
             └─► render views ────────────► teacher ─► PHI-S, + bias ──────────────┘

A fine map is right where each view of it, made as coarse as the teacher, is what the teacher says
of that view of the image (FeatUp, arXiv 2403.10516, section 3; FeatSharp, arXiv 2502.16025,
section 3.1). Whole, tiles and views of a step are encoded in one batch. Every draw is a function of
seed and step, so an interrupted fit goes on with the same numbers, and the images and views of a
step do not depend on the number of processes.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from radio_distill.config import FitConfig, plain
from radio_distill.data.loader import StepSlice
from radio_distill.protocols import BatchSource, Teacher
from radio_distill.registry import nearest
from radio_distill.stage import Stage
from radio_distill.system.distributed import World, all_reduce_sum
from radio_distill.system.memory import explain_oom, lower
from radio_distill.system.precision import autocast
from radio_distill.system.progress import Progress
from radio_distill.train import checkpoint as checkpoints
from radio_distill.train.checkpoint import Checkpoint
from radio_distill.train.engine import on_host
from radio_distill.train.health import NonFiniteGuard
from radio_distill.train.lifeline import Lifeline
from radio_distill.train.optim import cosine, every, load_optimizer_tensors, optimizer_tensors
from radio_distill.train.run_dir import RunLock
from radio_distill.train.trackers import Sinks, open_sinks
from radio_distill.types import Features, Size

from ..fitted import TeacherOutput
from .consistency import Consistency
from .lessons import Clock, Lesson, lessons

logger = logging.getLogger(__name__)

MODULES = "upsampler"
"""Name of the checkpoint's file of weights."""


@dataclass
class FitRun:
    """Everything that one process needs to fit an upsampler."""

    stage: Stage
    world: World
    device: torch.device
    teacher: Teacher
    consistency: Consistency
    source: BatchSource
    """This process's images, ``factor`` times that size."""
    slices: Sequence[StepSlice]
    """Which images of a step they are."""
    resumed: Checkpoint | None = None
    """What the fit goes on from."""
    ownership: RunLock | None = None
    """Rank 0's claim on the folder."""
    pool: list[list[Lesson]] = field(default_factory=list)
    """What is kept with ``fit.pool``; fits of one teacher, size and factor can share one list,
    where the first of them looks at all tiles that any looks at."""

    @property
    def start_step(self) -> int:
        """Steps that were done before."""
        return self.resumed.step if self.resumed else 0

    @property
    def config(self) -> FitConfig:
        return self.stage.fit

    @property
    def seed(self) -> int:
        return self.stage.seed

    @property
    def folder(self) -> Path:
        return self.stage.folder

    @property
    def size(self) -> Size:
        """The teacher's input, in pixels."""
        return self.stage.partitions[0].sizes[0]


def fit(run: FitRun) -> None:
    """Fit from ``run.start_step`` to the end; the last checkpoint holds the result.

    Raises:
        DivergedError: where numbers stay not finite; the message names the last good checkpoint.
        CheckpointError: where a checkpoint cannot be written.
        InterruptedRunError: where a signal asked to stop; everything is saved.
    """
    config, log, total = run.config, run.stage.log, run.stage.steps
    modules = run.consistency.to(run.device).train()
    optimizer = torch.optim.NAdam(parameter_groups(modules, config))
    if run.resumed is not None:
        restore(modules, optimizer, run.resumed)
    rates = cosine(total, 1.0, 0.0, plain(config.warmup_steps))
    images = config.batch_size
    seen = Progress(run.folder.name, total, "steps", run.start_step, run.world.is_main, images)
    sinks = open_sinks(run.folder, log.tensorboard, run.world.is_main, run.start_step)
    clock = Clock()
    steps = lessons(run, clock)
    with open_lifeline(run) as life, seen, sinks:
        for step in range(run.start_step, total):
            clock.start(run.device)
            step_lessons = next(steps)
            terms, findings = accumulate(run, step, step_lessons)
            signs = life.agree(terms["loss"], findings)
            norm = _reduce_gradient(modules, config.gradient_clip)
            done = step + 1
            if math.isfinite(norm) and not signs.trouble:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * float(rates[step])
                optimizer.step()
                life.skips.reset()
            else:
                life.skip(done, findings.causes() if signs.trouble else findings.gradient())
            optimizer.zero_grad()
            clock.stop(run.device)
            seen.update(done, f"loss {signs.loss:.4f}")
            life.end_step(done, signs)
            if every(done, plain(log.every), total):
                values = {name: float(all_reduce_sum(value)) for name, value in terms.items()}
                values |= {
                    "learning_rate": config.learning_rate * float(rates[step]),
                    "gradient_norm": norm,
                }
                values["teacher_share"] = clock.teacher_share
                values |= life.end_log(done * images, 0.0)
                with life.writing("its metrics"):
                    sinks.write(done, values)
            if every(done, config.images_every, total) and run.world.is_main:
                _write_images(run, done, step_lessons[0].seen, sinks)
            if life.due(done, signs):
                life.save(done, lambda: _tensors(modules, optimizer))
            if signs.signal and done < total:
                life.stop(signs.signal)
        life.finish()
    logger.info("%s: %.0f %% of a step is the teacher", run.folder.name, 100 * clock.teacher_share)


def open_lifeline(run: FitRun) -> Lifeline:
    """Make what keeps the fit alive."""
    return Lifeline(
        run.stage,
        {run.teacher.spec.name: run.teacher.spec},
        run.world,
        run.ownership,
        run.resumed,
        run.source.fingerprint,
    )


def parameter_groups(modules: nn.Module, config: FitConfig) -> list[dict[str, Any]]:
    """Group parameters by learning rate: ``fit.rates`` by a part of the name, else the common one.

    A recipe may serve several networks, so a part that this one does not have is only warned of.
    """
    names = [name for name, _ in modules.named_parameters()]
    known = sorted({piece for name in names for piece in name.split(".")})
    for part in config.rates:
        if part not in known:
            logger.warning(
                "fit.rates: no parameter of %s is part of %r (%s)",
                config.upsampler, part, nearest(part, known),
            )  # fmt: skip
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in modules.named_parameters():
        parts = name.split(".")
        own = [rate for part, rate in config.rates.items() if part in parts]
        groups.setdefault(own[0] if own else config.learning_rate, []).append(parameter)
    return [{"params": members, "lr": peak, "peak": peak} for peak, members in groups.items()]


def accumulate(
    run: FitRun, step: int, step_lessons: Sequence[Lesson]
) -> tuple[dict[str, Tensor], NonFiniteGuard]:
    """Run forward and backward on this process's part of a step.

    Returns this process's part of the step's loss and of its terms, which add up over processes,
    and which images gave numbers that are not finite.
    """
    # Dropout of the networks and of the downsampler draws from the global generator.
    torch.manual_seed(run.seed * 7919 + step * 131 + run.world.rank)
    totals: dict[str, Tensor] = {}
    findings = NonFiniteGuard()
    for lesson in step_lessons:
        generator = torch.Generator().manual_seed(run.seed + step)
        for maps, keys in lesson.maps():
            findings.add_targets({run.teacher.spec.name: Features(None, maps)}, keys)
        images = len(lesson.keys)
        hint = lower("engine.micro_batch", run.stage.engine.micro_batch, images, "lower fit.size")
        size = f"{run.size[0]}x{run.size[1]} px, {images} images, {run.config.views} views"
        with explain_oom(f"the fit of {run.config.upsampler}", size, hint), _autocast(run):
            loss, terms = run.consistency(lesson.seen, lesson.homographies, generator)
        means = {name: value.detach().mean() for name, value in terms.items()}
        findings.add_loss(loss, means, lesson.keys)
        (loss.sum() / run.config.batch_size).backward()
        for name, value in {"loss": loss, **terms}.items():
            part = value.detach().sum() / run.config.batch_size
            totals[name] = totals.get(name, torch.zeros_like(part)) + part
    return totals, findings


def restore(modules: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Load weights and optimizer state of a fit's checkpoint."""
    modules.load_state_dict(checkpoint.tensors(MODULES))
    load_optimizer_tensors(optimizer, modules, checkpoint.tensors(checkpoints.OPTIMIZER))


def _autocast(run: FitRun) -> torch.autocast:
    return autocast(run.stage.engine.precision, run.device)


def _reduce_gradient(modules: nn.Module, clip: float) -> float:
    """Sum gradients over processes and clip them; returns the norm before clipping."""
    gradients = [item.grad for item in modules.parameters() if item.grad is not None]
    for gradient in gradients:
        gradient.copy_(all_reduce_sum(gradient))
    limit = clip or float("inf")
    return float(nn.utils.clip_grad_norm_(modules.parameters(), limit))


def _tensors(modules: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    return {
        MODULES: on_host(modules.state_dict()),
        checkpoints.OPTIMIZER: on_host(optimizer_tensors(optimizer, modules)),
    }


@torch.no_grad()
def _write_images(run: FitRun, step: int, seen: TeacherOutput, sinks: Sinks) -> None:
    """Show images, coarse and fine maps side by side, in TensorBoard and as a file."""
    from PIL import Image

    from radio_distill.report.feature_images import image_grid, pca_images

    model = run.consistency.model.eval()
    with _autocast(run):
        fine = model(seen.observation).float()
    model.train()
    low = model.de_biased(seen.observation.low)
    photographs = rearrange((seen.observation.guidance * 255).byte().cpu(), "b c h w -> b h w c")
    rows = [
        [Image.fromarray(image.numpy()).resize((224, 224)), *pca_images(maps)]
        for image, *maps in zip(photographs[:4], low, fine, strict=False)
    ]
    sheet = image_grid(rows, [""] * len(rows), ["image", "teacher", "upsampled"])
    sinks.write_image(step, "features", np.asarray(sheet))
    folder = run.folder / "images"
    folder.mkdir(exist_ok=True)
    sheet.save(folder / f"step-{step:08d}.png")
