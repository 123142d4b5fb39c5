"""Distillation as a task: what the passes of one step compute.

::

    views ──► student ──► heads ──┐
      │                           ├─► align ─► loss ─► backward
      └──► teachers ─► targets ───┘            (each pass)

Everything random is a function of seed and step: the order and the crops of the images, and what
:mod:`.randomness` draws. A run that was interrupted goes on with the same numbers.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..data.device import on_device
from ..models.ema import Ema
from ..models.heads import Predictions
from ..models.spectral import begin_step, closing_loss, share_matrices
from ..protocols import BatchSource, Engine
from ..stage import Stage
from ..system.distributed import World, all_reduce_sum, run_on_main
from ..system.memory import explain_oom, lower
from ..system.transfer import to_device
from ..train import checkpoint as checkpoints
from ..train.engine import on_host
from ..train.health import Agree, Agreement, NonFiniteGuard
from ..train.meters import Meter
from ..train.optim import learning_rates
from ..train.trackers import WriteImage
from ..types import Features, ImageBatch, Score
from .distances import mesa
from .loss_weights import TermWeights
from .losses import KINDS, LossReport, distillation_loss
from .micro_batches import MicroBatch, MicroBatchSchedule, Pass
from .randomness import StepRandomness
from .targets import TargetCache, TargetMaker
from .views import EMA, Views, warp_to_student

MESA = "mesa"
"""Name of the term that compares with the EMA of the student; no teacher can be called that."""

Evaluate = Callable[[Mapping[str, Tensor], Callable[[], None]], list[Score]]
"""Scores the student of these weights; the second argument is called again and again."""


@dataclass
class Distillation:
    """One stage's student and teachers on one process; the :class:`~..protocols.Task` of stages."""

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
    """On rank 0, and on every rank where it teaches."""
    scores: Evaluate | None = None
    """Evaluates a student during training; None without ``evaluation.every``."""
    _terms: list[tuple[Pass, dict[str, Tensor], int]] = field(default_factory=list)
    """Of each pass of the step, as means over a number of images."""

    def __post_init__(self) -> None:
        kinds = [f"{teacher}/{kind}" for teacher in self.targets.teachers for kind in KINDS]
        names = [f"{part.name}/{kind}" for part in self.stage.partitions for kind in (*kinds, MESA)]
        self._meter = Meter(names, self.engine.device)
        self._rates = learning_rates(self.stage.config)
        self._step_rates: dict[str, float] = {}

    @property
    def evaluate_every(self) -> int:
        return self.stage.evaluation.every if self.scores is not None else 0

    def batches(self, start_step: int) -> Iterator[list[ImageBatch]]:
        """Yield this rank's micro-batches of each step."""
        return self.source.batches(start_step)

    def learning_rates(self, step: int) -> dict[str, float]:
        """Return the rates of body and heads in a step."""
        self._step_rates = {group: float(rates[step]) for group, rates in self._rates.items()}
        return self._step_rates

    def forward_backward(
        self, step: int, batches: Sequence[ImageBatch], guard: NonFiniteGuard, agree: Agree
    ) -> Agreement:
        """Run forward and backward of one step's micro-batches on this rank."""
        self._seed_generators(step)
        model = self.engine.model
        begin_step(model, self.draws.noise(step), self.engine.whole)
        is_shared = not self.engine.cuts_weights and share_matrices(model)
        closing = partial(closing_loss, model) if is_shared else None
        micro_batches = self.schedule.micro_batches(step)
        left = sum(len(micro.passes) for micro in micro_batches)
        total, agreement = torch.zeros((), device=self.engine.device), None
        self._terms.clear()
        arrived = on_device(batches, self.engine.device)
        for micro, batch in zip(micro_batches, arrived, strict=True):
            cache: TargetCache = {}
            pixels = self.draws.recoloured(step, micro.start, micro.stop, micro.size, batch.views)
            for one in micro.passes:
                views = self.draws.views(step, micro, one, pixels)
                if one.is_padding:
                    loss = self._zero(step, micro, one, views)
                else:
                    targets = self.targets(views, one.views.values(), cache)
                    guard.add_targets(targets, batch.keys)
                    report = self._losses(step, micro, one, views, targets)
                    guard.add_loss(report.total, report.terms, batch.keys)
                    self._terms.append((one, report.terms, micro.stop - micro.start))
                    loss = report.total.sum() * one.image_weight
                total = total + loss.detach()
                left -= 1
                if left == 0:
                    agreement = agree(total, guard)
                with self._explain_oom(one, micro, "the backward pass of the student"):
                    skip = agreement.is_bad if agreement else None
                    self.engine.backward(loss, left == 0, skip, closing)
        assert agreement is not None, "a rank always has a pass, if only one of padding"
        return agreement

    def end_step(self, is_taken: bool) -> None:
        """Let a step that was taken count for the log, the loss's weights and the EMA."""
        if not is_taken:
            self.weights.forget_step()
            return
        for one, terms, images in self._terms:
            named = {f"{one.partition.name}/{name}": value for name, value in terms.items()}
            self._meter.add(named, weight=images)
            self.weights.add({name: terms[name] for name in terms if name != MESA}, images)
        self.weights.end_step()
        if self.ema is not None:
            self.ema.update(self.engine.model, self.stage.ema_decay)

    def log_values(self) -> dict[str, float]:
        """Return mean terms, learning rates, and the number of bad images."""
        values = {f"loss/{name}": value for name, value in self._meter.means().items()}
        values |= {f"learning_rate/{group}": rate for group, rate in self._step_rates.items()}
        bad = torch.tensor([sum(self.source.bad.values())], device=self.engine.device)
        return {**values, "bad_images": float(all_reduce_sum(bad))}

    def evaluate(self, step: int, beat: Callable[[], None], write_image: WriteImage) -> list[Score]:
        """Score the student, or its EMA, on rank 0; the others wait."""
        del write_image
        if self.stage.evaluation.of == "ema" and self.stage.ema_decay:
            tensors = {} if self.ema is None else self.ema.state_dict()
        else:
            tensors = self.engine.model_tensors()  # every rank gathers
        return run_on_main(self.world, lambda: self._score(step, tensors, beat), beat)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Gather what a checkpoint holds, on the host of rank 0; every rank must call."""
        parts = {
            checkpoints.STUDENT: self.engine.model_tensors(),
            checkpoints.OPTIMIZER: self.engine.optimizer_tensors(),
        }
        if self.world.is_main:
            statistics = {
                f"{name}/{key}": value
                for name, normalizer in self.targets.normalizers.items()
                for key, value in normalizer.state().items()
            }
            parts[checkpoints.STATISTICS] = on_host(statistics)
            if self.ema is not None:
                parts[checkpoints.EMA] = on_host(self.ema.state_dict())
            if weights := self.weights.state():
                parts[checkpoints.LOSS] = on_host(weights)
        return parts

    def _score(
        self, step: int, tensors: Mapping[str, Tensor], beat: Callable[[], None]
    ) -> list[Score]:
        assert self.scores is not None
        hint = "lower evaluation.size and evaluation.dense_size"
        with explain_oom("the evaluation", f"step {step}", hint):
            return self.scores(tensors, beat)

    def _seed_generators(self, step: int) -> None:
        """Let every global generator begin at a function of seed, step and rank.

        Stochastic depth draws from torch's; a teacher or an upsampler of the user's may from any.
        """
        seed = self.stage.seed + step * 131 + self.world.rank
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def _losses(
        self,
        step: int,
        micro: MicroBatch,
        one: Pass,
        views: Views,
        targets: Mapping[str, Features],
    ) -> LossReport:
        """Return the loss of each image of a pass, the distance to the EMA included."""
        config = self.stage.loss
        with self._explain_oom(one, micro, "the forward pass of the student"):
            predictions = self._predict(step, micro, one, views)
            report = distillation_loss(
                predictions.features,
                targets,
                self.stage.losses,
                self.weights.now(),
                shifts={name: views.shift(name) for name in targets},
                log_variances=self._log_variances(predictions),
            )
        if not config.mesa:
            return report
        assert self.ema is not None, "it teaches on every rank"
        size = f"{views.size[0]}x{views.size[1]} px"
        hint = "lower engine.micro_batch, or set loss.mesa to 0"
        explained = explain_oom("the EMA of the student", size, hint)
        with explained, torch.no_grad(), self.engine.autocast():
            _, average = self.ema.model.get_submodule("student")(views.of_student(EMA))
        shift, cells = views.shift(EMA), None
        if shift is not None:
            average, cells = warp_to_student(average, shift)
        distance = mesa(predictions.spatial, average, cells)  # [B]
        terms = {**report.terms, MESA: distance.detach().mean()}
        return LossReport(report.total + config.mesa * distance, terms)

    def _predict(self, step: int, micro: MicroBatch, one: Pass, views: Views) -> Predictions:
        predictions: Predictions = self.engine.forward(
            views.of_student(),
            one.partition.teachers,
            draws=to_device(self.draws.positions(step, micro), self.engine.device),
            freeze_body=step < self.stage.frozen_steps,
            window_size=self.draws.window(step, one) or None,
        )
        return predictions

    def _zero(self, step: int, micro: MicroBatch, one: Pass, views: Views) -> Tensor:
        """Return zero, whose backward pass is a padding pass: it adds zeros to all gradients.

        Where the engine cannot say in which order, the student runs.
        """
        zero = self.engine.zero()
        if zero is not None:
            return zero
        with self._explain_oom(one, micro, "a padding pass of the student"):
            predictions = self._predict(step, micro, one, views)
        return 0.0 * predictions.spatial.sum(dtype=torch.float32)  # tied to all other outputs

    def _log_variances(self, predictions: Predictions) -> dict[str, Tensor] | None:
        if predictions.log_variances is None:
            return None
        return {
            f"{name}/{kind}": predictions.log_variances[row, column]
            for row, name in enumerate(self.targets.teachers)
            for column, kind in enumerate(KINDS)
        }

    def _explain_oom(self, one: Pass, micro: MicroBatch, part: str) -> AbstractContextManager[None]:
        height, width = one.size
        images, stage = micro.stop - micro.start, self.stage
        other = "set student.gradient_checkpointing to true"
        if stage.student.gradient_checkpointing:
            other = "take a smaller student, or lower the sizes of the partitions"
        limit = stage.micro_batch(one.partition.name, one.size)
        hint = lower("engine.micro_batch", limit, images, other)
        return explain_oom(part, f"{height}x{width} px, {images} images", hint)
