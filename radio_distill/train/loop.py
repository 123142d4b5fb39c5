"""The training loop of a stage.

::

    views ──► student ──► heads ──┐
      │                           ├─► align ─► loss ─► backward ─┐
      └──► teachers ─► targets ───┘        (each micro-batch)    ├─► check ─► step

Everything random is a function of seed and step: the order and the crops of the images, and the
draws of the position augmentation. A run that was interrupted goes on with the same numbers.
"""

import logging
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import Recipe, StageConfig
from ..losses import distillation_loss
from ..models.ema import Ema
from ..models.position import NUM_DRAWS
from ..partitions import MicroBatch, images_per_step
from ..progress import Progress
from ..protocols import BatchSource, Engine
from ..targets import TargetMaker
from ..types import ImageBatch, TeacherSpec
from . import checkpoint as checkpoints
from .distributed import World
from .guard import check_gradient, check_loss, check_targets
from .meter import Meter
from .schedule import every, learning_rates
from .sinks import open_sinks
from .statistics import normalizer_tensors

logger = logging.getLogger(__name__)


@dataclass
class StageRun:
    """Everything that one process needs to train one stage."""

    recipe: Recipe
    stage: str
    folder: Path
    """Folder of the stage inside the run folder."""
    world: World
    engine: Engine
    targets: TargetMaker
    source: BatchSource
    micro_batches: Sequence[MicroBatch]
    """This rank's micro-batches, in every step."""
    ema: Ema | None = None
    start_step: int = 0
    """Steps that were done before, in a resumed run."""
    last_checkpoint: Path | None = None
    """The newest whole one; named where the run has to stop."""

    @property
    def config(self) -> StageConfig:
        return self.recipe.stages[self.stage]

    @property
    def seed(self) -> int:
        """Seed of the stage: each stage has an order of images and draws of its own."""
        return stage_seed(self.recipe, self.stage)

    @property
    def teachers(self) -> dict[str, TeacherSpec]:
        return {name: teacher.spec for name, teacher in self.targets.teachers.items()}


def stage_seed(recipe: Recipe, stage: str) -> int:
    """Derive the seed of a stage from the recipe's."""
    return zlib.crc32(f"{recipe.seed}/{stage}".encode())


def train(run: StageRun) -> Path:
    """Train a stage from ``run.start_step`` to its end; returns the last checkpoint's folder.

    Raises:
        DivergedError: where a number is not finite; the message names the last good checkpoint.
        CheckpointError: where a checkpoint cannot be written.
    """
    config, log, total = run.config, run.recipe.log, run.config.steps
    images = images_per_step(config)
    rates = learning_rates(config)
    meter = Meter(_term_names(config), run.engine.device)
    seen = Progress(
        run.folder.name, total * images, "img", run.start_step * images, run.world.is_main
    )
    sinks = open_sinks(run.folder, log.tensorboard, run.world.is_main, run.start_step)
    batches = run.source.batches(run.start_step)
    with seen, sinks:
        waited = 0.0
        for step in range(run.start_step, total):
            asked = time.monotonic()
            step_batches = next(batches)
            waited += time.monotonic() - asked
            loss, terms = accumulate(run, step, step_batches, meter)
            check_loss(loss, terms, step + 1, run.last_checkpoint)
            step_rates = {group: float(values[step]) for group, values in rates.items()}
            norm = run.engine.step(step_rates)
            check_gradient(norm, step + 1, run.last_checkpoint)
            if run.ema is not None:
                run.ema.update(run.engine.model, config.ema_decay)
            done = step + 1
            seen.update(done * images, f"loss {float(loss):.4f}")
            if every(done, log.every, total):
                values = _log_values(meter, step_rates, norm, seen, waited)
                sinks.write(done, values)
            if every(done, log.save_every, total):
                run.last_checkpoint = save(run, done)
    assert run.last_checkpoint is not None, "a stage always ends with a checkpoint"
    return run.last_checkpoint


def accumulate(
    run: StageRun, step: int, batches: Sequence[ImageBatch], meter: Meter
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run forward and backward of one step's micro-batches on this rank.

    Returns this rank's part of the step's loss, and the latest value of each of its terms.
    """
    recipe, config = run.recipe, run.config
    # Stochastic depth draws from the global generator.
    torch.manual_seed(run.seed + step * 131 + run.world.rank)
    frozen = step < config.freeze_body_steps
    draws = position_draws(run.seed, step, images_per_step(config))
    total = torch.zeros((), device=run.engine.device)
    latest: dict[str, Tensor] = {}
    for index, (micro, batch) in enumerate(zip(run.micro_batches, batches, strict=True)):
        partition = micro.partition.config
        pixels = batch.pixels.to(run.engine.device, non_blocking=True)  # [B, 3, H, W]
        targets = run.targets(pixels, partition)
        check_targets(targets, batch.keys)
        predictions = run.engine.forward(
            pixels,
            partition.teachers,
            draws=draws[micro.start : micro.stop].to(pixels.device),
            freeze_body=frozen,
        )
        report = distillation_loss(predictions, targets, recipe.loss, recipe.teachers, batch.valid)
        loss = report.total.sum() * micro.image_weight
        run.engine.backward(loss, last=index == len(run.micro_batches) - 1)
        total = total + loss.detach()
        terms = {f"{partition.name}/{name}": value for name, value in report.terms.items()}
        latest |= terms
        if micro.image_weight:
            meter.add(terms, weight=micro.stop - micro.start)
    return total, latest


def position_draws(seed: int, step: int, images: int) -> Tensor:
    """Return ``[images, NUM_DRAWS]`` uniform numbers, a function of seed and step alone."""
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    return torch.from_numpy(generator.random((images, NUM_DRAWS), dtype=np.float32))


def save(run: StageRun, step: int) -> Path:
    """Write a checkpoint after ``step`` steps; every rank must call."""
    parts = {
        checkpoints.STUDENT: run.engine.model_tensors(),
        checkpoints.OPTIMIZER: run.engine.optimizer_tensors(),
        checkpoints.STATISTICS: normalizer_tensors(run.targets.normalizers),
    }
    if run.ema is not None:
        parts[checkpoints.EMA] = run.ema.state_dict()
    return checkpoints.save_from_main(
        run.world,
        run.folder / "checkpoints",
        step,
        parts,
        stage=run.stage,
        recipe=run.recipe,
        teachers=run.teachers,
        keep_last=run.recipe.log.keep_last,
    )


def _term_names(config: StageConfig) -> list[str]:
    return [
        f"{partition.name}/{teacher}/{kind}"
        for partition in config.partitions
        for teacher in partition.teachers
        for kind in ("summary", "features")
    ]


def _log_values(
    meter: Meter, rates: Mapping[str, float], norm: float, seen: Progress, waited: float
) -> dict[str, float]:
    values = {f"loss/{name}": value for name, value in meter.means().items()}
    values |= {f"learning_rate/{group}": rate for group, rate in rates.items()}
    values["gradient_norm"] = norm
    values["images_per_second"] = seen.rate
    values["data_wait_share"] = waited / max(seen.seconds, 1e-9)
    return values
