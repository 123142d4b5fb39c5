"""The training loop of a stage.

::

    views ──► student ──► heads ──┐
      │                           ├─► align ─► loss ─► backward ─┐
      └──► teachers ─► targets ───┘            (each pass)       ├─► check ─► step

Everything random is a function of seed and step: the order and the crops of the images, and what
:mod:`.draws` draws. A run that was interrupted goes on with the same numbers.
"""

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from ..config import EngineConfig, StageConfig, plain
from ..distill.loss_weights import TermWeights
from ..distill.losses import KINDS, LossReport, distillation_loss
from ..distill.micro_batches import MicroBatch, MicroBatchSchedule, Pass
from ..distill.randomness import StepRandomness
from ..distill.targets import TargetCache, TargetMaker
from ..distill.terms import mesa
from ..distill.views import AVERAGE, Views, follow
from ..models.ema import Ema
from ..models.heads import Predictions
from ..models.spectral import begin_step
from ..normalize.normalizers import normalizer_tensors
from ..protocols import BatchSource, Engine
from ..stage import Stage
from ..system.distributed import World, all_reduce_sum
from ..system.memory import explain_oom, lower
from ..system.progress import Progress
from ..types import Features, ImageBatch, TeacherSpec, View
from . import checkpoint as checkpoints
from .checkpoint import Checkpoint, Origin
from .engine import on_host
from .health import NonFinite, NonFiniteGuard
from .lifeline import Lifeline, Signs
from .optim import every, learning_rates
from .run_dir import RunLock
from .trackers import Meter, open_sinks

MESA = "mesa"
"""Name of the term that compares with the averaged student; no teacher can be called that."""


@dataclass
class StageRun:
    """Everything that one process needs to train one stage."""

    stage: Stage
    world: World
    engine: Engine
    targets: TargetMaker
    source: BatchSource
    schedule: MicroBatchSchedule
    """This rank's micro-batches of each step."""
    draws: StepRandomness
    weights: TermWeights
    ema: Ema | None = None
    """On rank 0, and on every rank where the averaged student teaches."""
    resumed: Checkpoint | None = None
    """What the run goes on from."""
    ownership: RunLock | None = None
    """Rank 0's claim on the folder."""
    origin: Origin = field(default_factory=Origin)

    @property
    def config(self) -> StageConfig:
        return self.stage.config

    @property
    def start_step(self) -> int:
        """Steps that were done before."""
        return self.resumed.step if self.resumed else 0

    @property
    def teachers(self) -> dict[str, TeacherSpec]:
        return {name: teacher.spec for name, teacher in self.targets.teachers.items()}


@dataclass
class StepReport:
    """What the passes of one step gave on this process."""

    loss: Tensor
    """This process's part of the step's."""
    findings: NonFiniteGuard
    signs: Signs
    """What all processes know of the step."""
    notes: list[tuple[Pass, dict[str, Tensor], int]]
    """Terms of each pass, as means over a number of images."""

    def found(self) -> list[NonFinite]:
        """Return what this process knows of why the step cannot be taken."""
        return self.findings.causes() if self.signs.trouble else self.findings.gradient()


def train(run: StageRun) -> Path:
    """Train a stage from ``run.start_step`` to its end; returns the last checkpoint's folder.

    Raises:
        DivergedError: where numbers stay not finite; the message names the last good checkpoint.
        CheckpointError: where a checkpoint cannot be written.
        InterruptedRunError: where a signal asked to stop; everything is saved.
        TakenOverError: where a process started later has the folder.
    """
    config, log, total = run.config, run.stage.log, run.stage.steps
    images, folder = run.stage.images_per_step, run.stage.folder
    rates = learning_rates(config)
    meter = Meter(_term_names(run), run.engine.device)
    seen = Progress(folder.name, total, "steps", run.start_step, run.world.is_main, images)
    sinks = open_sinks(folder, log.tensorboard, run.world.is_main, run.start_step)
    batches = run.source.batches(run.start_step)
    with open_lifeline(run) as life, seen, sinks:
        waited, losses = 0.0, list[float]()
        for step in range(run.start_step, total):
            asked = time.monotonic()
            step_batches = next(batches)
            waited += time.monotonic() - asked
            report = accumulate(run, step, step_batches, life.agree)
            step_rates = {group: float(values[step]) for group, values in rates.items()}
            with explain_oom("the update", f"step {step + 1}", zero_hint(run.stage.engine)):
                norm = run.engine.step(step_rates)
            done = step + 1
            if math.isfinite(norm) and not report.signs.trouble:
                take_in(run, report, meter)
                losses.append(report.signs.loss)
                life.skips.reset()
            else:
                run.weights.forget_step()
                life.skip(done, report.found())
            seen.update(done, f"loss {report.signs.loss:.4f}")
            life.end_step(done, report.signs)
            if every(done, plain(log.every), total):
                values = {"loss/total": fmean(losses)} if losses else {}
                losses.clear()
                values |= _log_values(run, meter, step_rates, norm)
                values |= life.end_log(done * images, waited)
                with life.writing("its metrics"):
                    sinks.write(done, values)
            if life.due(done, report.signs):
                life.save(done, lambda: _tensors(run))
            if report.signs.signal and done < total:
                life.stop(report.signs.signal)
        return life.finish()


def open_lifeline(run: StageRun) -> Lifeline:
    """Make what keeps the stage alive."""
    return Lifeline(
        run.stage,
        run.teachers,
        run.world,
        run.ownership,
        run.resumed,
        run.source.fingerprint,
        run.origin,
    )


def accumulate(
    run: StageRun,
    step: int,
    batches: Sequence[ImageBatch],
    agree: Callable[[Tensor, NonFiniteGuard], Signs],
) -> StepReport:
    """Run forward and backward of one step's micro-batches on this rank.

    ``agree`` is called once on every rank, before the last backward pass. Where it tells of numbers
    that are not finite, on any rank, the whole gradient is made so: then no engine takes the step,
    and each clears up as it always does.
    """
    _seed_generators(run, step)
    begin_step(run.engine.model, run.draws.noise(step))
    work = run.schedule.micro_batches(step)
    left = sum(len(micro.passes) for micro in work)
    findings, notes = NonFiniteGuard(), []
    total, signs = torch.zeros((), device=run.engine.device), None
    for micro, batch in zip(work, batches, strict=True):
        pixels = {
            view: tensor.to(run.engine.device, non_blocking=True)  # [B, 3, H, W]
            for view, tensor in batch.views.items()
        }
        cache: TargetCache = {}
        for item in micro.passes:
            report = _forward(run, step, micro, item, pixels, cache, findings, batch.keys)
            loss = report.total.sum() * item.image_weight
            total = total + loss.detach()
            left -= 1
            if left == 0:
                signs = agree(total, findings)
                loss = loss * math.nan if signs.trouble else loss
            with _student_part(run, item, micro, "the backward pass of the student"):
                run.engine.backward(loss, last=left == 0)
            notes.append((item, report.terms, micro.stop - micro.start))
    assert signs is not None, "a rank always has work, or keeps pace"
    return StepReport(total, findings, signs, notes)


def _seed_generators(run: StageRun, step: int) -> None:
    """Let every global generator begin at a function of seed, step and rank.

    Stochastic depth draws from torch's; a teacher or an upsampler of the user's may from any.
    """
    seed = run.stage.seed + step * 131 + run.world.rank
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _forward(
    run: StageRun,
    step: int,
    micro: MicroBatch,
    item: Pass,
    pixels: Mapping[View, Tensor],
    cache: TargetCache,
    findings: NonFiniteGuard,
    keys: Sequence[str],
) -> LossReport:
    """Return the loss of one pass over a micro-batch."""
    views = run.draws.views(step, micro, item, pixels)
    targets = run.targets(views, item.views.values(), cache)
    findings.add_targets(targets, keys)
    with _student_part(run, item, micro, "the forward pass of the student"):
        predictions = run.engine.forward(
            views.of_student(),
            item.partition.teachers,
            draws=run.draws.positions(step, micro).to(run.engine.device),
            freeze_body=step < run.stage.frozen_steps,
            window_size=run.draws.window(step, item) or None,
        )
        report = _compare(run, predictions, targets, views)
    findings.add_loss(report.total, report.terms, keys)
    return report


def zero_hint(engine: EngineConfig) -> str:
    """Say what makes the student's weights, gradients and moments take less memory."""
    return f"raise engine.zero_stage (now: {engine.zero_stage}), or take a smaller student"


def _student_part(
    run: StageRun, item: Pass, micro: MicroBatch, part: str
) -> AbstractContextManager[None]:
    height, width = item.size
    images, stage = micro.stop - micro.start, run.stage
    other = "set student.gradient_checkpointing to true"
    if stage.student.gradient_checkpointing:
        other = "take a smaller student, or lower the sizes of the partitions"
    hint = lower("engine.micro_batch", stage.engine.micro_batch, images, other)
    return explain_oom(part, f"{height}x{width} px, {images} images", hint)


def take_in(run: StageRun, report: StepReport, meter: Meter) -> None:
    """Let a step that was taken count: for the logs, the loss's weights, and the average."""
    for item, terms, images in report.notes:
        if item.image_weight:  # else the pass only kept pace
            named = {f"{item.partition.name}/{name}": value for name, value in terms.items()}
            meter.add(named, weight=images)
            run.weights.add({name: terms[name] for name in terms if name != MESA}, images)
    run.weights.end_step()
    if run.ema is not None:
        run.ema.update(run.engine.model, run.config.ema_decay)


def _compare(
    run: StageRun, predictions: Predictions, targets: Mapping[str, Features], views: Views
) -> LossReport:
    """Return the loss of a pass, the distance to the averaged student included."""
    config = run.stage.loss
    report = distillation_loss(
        predictions.features,
        targets,
        config,
        run.weights.now(),
        shifts={name: views.shift(name) for name in targets},
        log_variances=_log_variances(run, predictions),
    )
    if not config.mesa:
        return report
    assert run.ema is not None, "the averaged student teaches on every rank"
    size = f"{views.size[0]}x{views.size[1]} px"
    name = explain_oom(
        "the averaged student", size, "lower engine.micro_batch, or set loss.mesa to 0"
    )
    with name, torch.no_grad(), run.engine.autocast():
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


def _tensors(run: StageRun) -> dict[str, dict[str, Tensor]]:
    """Gather what a checkpoint holds, on the host of rank 0; every rank must call."""
    parts = {
        checkpoints.STUDENT: run.engine.model_tensors(),
        checkpoints.OPTIMIZER: run.engine.optimizer_tensors(),
    }
    if run.world.is_main:
        parts[checkpoints.STATISTICS] = on_host(normalizer_tensors(run.targets.normalizers))
        if run.ema is not None:
            parts[checkpoints.EMA] = on_host(run.ema.state_dict())
        if weights := run.weights.state():
            parts[checkpoints.LOSS] = on_host(weights)
    return parts


def _term_names(run: StageRun) -> list[str]:
    kinds = [f"{teacher}/{kind}" for teacher in run.teachers for kind in KINDS]
    return [f"{item.name}/{kind}" for item in run.stage.partitions for kind in [*kinds, MESA]]


def _log_values(
    run: StageRun, meter: Meter, rates: Mapping[str, float], norm: float
) -> dict[str, float]:
    values = {f"loss/{name}": value for name, value in meter.means().items()}
    values |= {f"learning_rate/{group}": rate for group, rate in rates.items()}
    values["gradient_norm"] = norm
    bad = torch.tensor([sum(run.source.bad.values())], device=run.engine.device)
    values["bad_images"] = float(all_reduce_sum(bad))
    return values
