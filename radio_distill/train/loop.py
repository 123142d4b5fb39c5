"""The training loop of a stage.

::

    views ──► student ──► heads ──┐
      │                           ├─► align ─► loss ─► backward ─┐
      └──► teachers ─► targets ───┘            (each pass)       ├─► check ─► step

Everything random is a function of seed and step: the order and the crops of the images, and what
:mod:`.draws` draws. A run that was interrupted goes on with the same numbers.
"""

import logging
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import Recipe, StageConfig
from ..losses import KINDS, LossReport, distillation_loss
from ..models.distilled import Predictions
from ..models.ema import Ema
from ..models.reparametrize import begin_step
from ..partitions import Pass
from ..progress import Progress
from ..protocols import BatchSource, Engine
from ..targets import Seen, TargetMaker
from ..terms import mesa
from ..types import Features, ImageBatch, TeacherSpec
from ..views import AVERAGE, Views, follow
from . import checkpoint as checkpoints
from .distributed import World
from .draws import Draws
from .guard import check_gradient, check_loss, check_targets
from .meter import Meter
from .schedule import every, learning_rates
from .sinks import open_sinks
from .statistics import normalizer_tensors
from .weights import TermWeights
from .work import Work

logger = logging.getLogger(__name__)

MESA = "mesa"
"""Name of the term that compares with the averaged student; no teacher can be called that."""


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
    work: Work
    """This rank's micro-batches of each step."""
    draws: Draws
    weights: TermWeights
    ema: Ema | None = None
    """On rank 0, and on every rank where the averaged student teaches."""
    start_step: int = 0
    """Steps that were done before, in a resumed run."""
    last_checkpoint: Path | None = None
    """The newest whole one; named where the run has to stop."""

    @property
    def config(self) -> StageConfig:
        return self.recipe.stages[self.stage]

    @property
    def seed(self) -> int:
        return stage_seed(self.recipe, self.stage)

    @property
    def teachers(self) -> dict[str, TeacherSpec]:
        return {name: teacher.spec for name, teacher in self.targets.teachers.items()}


def stage_seed(recipe: Recipe, stage: str) -> int:
    """Derive the seed of a stage from the recipe's: each has an order and draws of its own."""
    return zlib.crc32(f"{recipe.seed}/{stage}".encode())


def train(run: StageRun) -> Path:
    """Train a stage from ``run.start_step`` to its end; returns the last checkpoint's folder.

    Raises:
        DivergedError: where a number is not finite; the message names the last good checkpoint.
        CheckpointError: where a checkpoint cannot be written.
    """
    config, log, total = run.config, run.recipe.log, run.config.steps
    images = run.work.images_per_step
    rates = learning_rates(config)
    meter = Meter(_term_names(run), run.engine.device)
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
            run.weights.end_step()
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
    # Stochastic depth draws from the global generator.
    torch.manual_seed(run.seed + step * 131 + run.world.rank)
    begin_step(run.engine.model, run.draws.noise(step))
    work = run.work.micro_batches(step)
    left = sum(len(micro.passes) for micro in work)
    total = torch.zeros((), device=run.engine.device)
    latest: dict[str, Tensor] = {}
    for micro, batch in zip(work, batches, strict=True):
        pixels = batch.pixels.to(run.engine.device, non_blocking=True)  # [B, 3, H, W]
        seen: Seen = {}
        for item in micro.passes:
            partition = item.partition.config
            views = run.draws.views(step, micro, item, pixels)
            targets = run.targets(views, partition, seen)
            check_targets(targets, batch.keys)
            predictions = run.engine.forward(
                views.of_student(),
                partition.teachers,
                draws=run.draws.positions(step, micro).to(pixels.device),
                freeze_body=step < run.config.frozen_steps,
                window_size=run.draws.window(step, item) or None,
            )
            report = _compare(run, predictions, targets, views)
            loss = report.total.sum() * item.image_weight
            left -= 1
            run.engine.backward(loss, last=left == 0)
            total = total + loss.detach()
            latest |= _note(run, meter, item, report.terms, micro.stop - micro.start)
    return total, latest


def _compare(
    run: StageRun, predictions: Predictions, targets: Mapping[str, Features], views: Views
) -> LossReport:
    """Return the loss of a pass, the distance to the averaged student included."""
    config = run.recipe.loss
    report = distillation_loss(
        predictions,
        targets,
        config,
        run.weights.now(),
        shifts={name: views.shift(name) for name in targets},
        log_variances=_log_variances(run, predictions),
    )
    if not config.mesa:
        return report
    assert run.ema is not None, "the averaged student teaches on every rank"
    with torch.no_grad(), run.engine.autocast():
        _, average = run.ema.model.get_submodule("student")(views.of_student(AVERAGE))
    shift, cells = views.shift(AVERAGE), None
    if shift is not None:
        average, cells = follow(average, shift)
    distance = mesa(predictions.spatial, average, cells)  # [B]
    terms = {**report.terms, MESA: distance.detach().mean()}
    return LossReport(report.total + config.mesa * distance, terms)


def _log_variances(run: StageRun, predictions: Predictions) -> dict[str, Tensor] | None:
    if predictions.log_variances is None:
        return None
    return {
        f"{name}/{kind}": predictions.log_variances[row, column]
        for row, name in enumerate(run.teachers)
        for column, kind in enumerate(KINDS)
    }


def _note(
    run: StageRun, meter: Meter, item: Pass, terms: Mapping[str, Tensor], images: int
) -> dict[str, Tensor]:
    """Take a pass's terms down, unless it only kept pace; returns them by partition."""
    named = {f"{item.partition.name}/{name}": value for name, value in terms.items()}
    if item.image_weight:
        meter.add(named, weight=images)
        run.weights.add({name: value for name, value in terms.items() if name != MESA}, images)
    return named


def save(run: StageRun, step: int) -> Path:
    """Write a checkpoint after ``step`` steps; every rank must call."""
    parts = {
        checkpoints.STUDENT: run.engine.model_tensors(),
        checkpoints.OPTIMIZER: run.engine.optimizer_tensors(),
        checkpoints.STATISTICS: normalizer_tensors(run.targets.normalizers),
    }
    if run.ema is not None:
        parts[checkpoints.EMA] = run.ema.state_dict()
    if weights := run.weights.state():
        parts[checkpoints.LOSS] = weights
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


def _term_names(run: StageRun) -> list[str]:
    kinds = [f"{teacher}/{kind}" for teacher in run.teachers for kind in KINDS]
    return [f"{item.name}/{kind}" for item in run.work.partitions for kind in [*kinds, MESA]]


def _log_values(
    meter: Meter, rates: Mapping[str, float], norm: float, seen: Progress, waited: float
) -> dict[str, float]:
    values = {f"loss/{name}": value for name, value in meter.means().items()}
    values |= {f"learning_rate/{group}": rate for group, rate in rates.items()}
    values["gradient_norm"] = norm
    values["images_per_second"] = seen.rate
    values["data_wait_share"] = waited / max(seen.seconds, 1e-9)
    return values
