"""Distillation as a task: what the passes of one step compute.

::

    views ──► student ──► heads ──┐
      │                           ├─► align ─► loss ─► backward
      └──► teachers ─► targets ───┘            (each pass)

Everything random is a function of seed and step: the order and the crops of the images, and what
:mod:`.randomness` draws. A run that was interrupted goes on with the same numbers.
"""

import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.device import on_device
from ..models.ema import Ema
from ..models.heads import Predictions
from ..models.spectral import begin_step, closing_loss, share_matrices
from ..protocols import BatchSource
from ..stage import Stage
from ..system.distributed import World, all_reduce_sum, run_on_main
from ..system.memory import explain_oom, lower
from ..system.transfer import to_device
from ..train import checkpoint as checkpoints
from ..train.engine import Engine, on_host
from ..train.health import Agree, Agreement, NonFiniteGuard
from ..train.meters import Meter
from ..train.optim import learning_rates
from ..train.trackers import WriteImage
from ..types import Features, ImageBatch, Score
from .distances import mesa
from .loss_weights import TermWeights
from .losses import (
    INNER,
    KINDS,
    LossReport,
    Survivors,
    distillation_loss,
    weighted_inner,
)
from .micro_batches import MicroBatch, MicroBatchSchedule, Pass
from .randomness import StepRandomness
from .relations import RELATION, Relation, Summaries, teachers_related
from .targets import TargetCache, TargetMaker
from .views import EMA, STUDENT, Views, warp_to_student

MESA = "mesa"
"""Name of the term that compares with the EMA of the student; no teacher can be called that."""
ANCHOR = "anchor"
"""Name of the term that compares with the student at its start."""

Evaluate = Callable[[int, Mapping[str, Tensor], Callable[[], None]], list[Score]]
"""Scores the student of a step's weights; the last argument is called again and again."""


class _Look(NamedTuple):
    """A pass, and what its encoders see."""

    micro: MicroBatch
    one: Pass
    views: Views
    keys: tuple[str, ...]
    cache: TargetCache
    targets: Mapping[str, Features] | None = None
    """Where the student has run ahead, or the targets of a step are normalised by themselves."""
    predictions: Predictions | None = None
    """Where that was its only pass."""


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
    anchor: Ema | None = None
    """The student as the stage starts, on every rank, where its features are anchored to it; it
    never moves."""
    scores: Evaluate | None = None
    """Evaluates a student during training; None without ``evaluation.every``."""
    _mean_cells: dict[str, float] | None = None
    """Of this step, where each cell counts alike."""
    _terms: list[tuple[Pass, dict[str, Tensor], int]] = field(default_factory=list)
    """Of each pass of the step, as means over a number of images."""

    def __post_init__(self) -> None:
        kinds = [f"{teacher}/{kind}" for teacher in self.targets.teachers for kind in KINDS]
        kinds += [
            f"{teacher}/{it}" for teacher in self.targets.teachers for it in (RELATION, INNER)
        ]
        kinds += [MESA, ANCHOR]
        names = [f"{part.name}/{kind}" for part in self.stage.partitions for kind in kinds]
        self._is_related = any(teachers_related(self.stage, it) for it in self.stage.partitions)
        self._meter = Meter(names, self.engine.device)
        self._rates = learning_rates(self.stage.config)
        self._step_rates: dict[str, float] = {}
        self._progress = 0.0

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
        relations: Mapping[tuple[str, str], Relation] = {}
        looks: Iterable[_Look] = self._looks(
            step, micro_batches, on_device(batches, self.engine.device)
        )
        self._progress = step / self.stage.steps
        if self.stage.loss.reduction == "token":
            self._mean_cells = self.schedule.mean_cells(step)
        if self.targets.needs_whole_step:
            looks = self._encoded_whole(list(looks))
        if self._is_related:
            looks, relations = self._ahead(step, list(looks))
        for look in looks:
            one, keys = look.one, look.keys
            if one.is_padding:
                loss = self._zero(step, look)
            else:
                targets = look.targets or self.targets(look.views, one.views.values(), look.cache)
                guard.add_targets(targets, keys)
                report = self._losses(step, look, targets, relations)
                guard.add_loss(report.total, report.terms, keys)
                self._terms.append((one, report.terms, len(keys)))
                loss = report.total.sum() * one.image_weight
            left -= 1
            total = total + loss.detach()
            if left == 0:
                agreement = agree(total, guard)
            with self._explain_oom(look, "the backward pass of the student"):
                skip = agreement.is_bad if agreement else None
                self.engine.backward(loss, left == 0, skip, closing)
        assert agreement is not None, "a rank always has a pass, if only one of padding"
        return agreement

    def end_step(self, is_taken: bool) -> None:
        """Let a step that was taken count for the log, the loss's weights and the EMA."""
        self.targets.end_step(self._progress if is_taken else None, self.engine.device)
        if not is_taken:
            self.weights.forget_step()
            return
        for one, terms, images in self._terms:
            named = {f"{one.partition.name}/{name}": value for name, value in terms.items()}
            self._meter.add(named, weight=images)
            adapting = {name: terms[name] for name in terms if name.endswith(KINDS)}
            self.weights.add(adapting, images)
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
            if self.anchor is not None:
                parts[checkpoints.ANCHOR] = on_host(self.anchor.state_dict())
            if weights := self.weights.state():
                parts[checkpoints.LOSS] = on_host(weights)
        return parts

    def _score(
        self, step: int, tensors: Mapping[str, Tensor], beat: Callable[[], None]
    ) -> list[Score]:
        assert self.scores is not None
        hint = "lower evaluation.size and evaluation.dense_size"
        with explain_oom("the evaluation", f"step {step}", hint):
            return self.scores(step, tensors, beat)

    def _seed_generators(self, step: int, images: str = "") -> None:
        """Let every global generator begin at a function of seed, step, and rank or images.

        Stochastic depth draws from torch's; a teacher or an upsampler of the user's may from any.
        """
        own = zlib.crc32(images.encode()) if images else self.world.rank
        seed = self.stage.seed + step * 131 + own
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def _looks(
        self, step: int, micro_batches: Sequence[MicroBatch], batches: Iterable[ImageBatch]
    ) -> "Iterator[_Look]":
        """Yield the passes of a step with what their encoders see."""
        for micro, batch in zip(micro_batches, batches, strict=True):
            cache: TargetCache = {}
            pixels = self.draws.recoloured(step, micro.start, micro.stop, micro.size, batch.views)
            for one in micro.passes:
                views = self.draws.views(step, micro, one, pixels)
                yield _Look(micro, one, views, batch.keys, cache)

    def _encoded_whole(self, looks: "Sequence[_Look]") -> "list[_Look]":
        """Normalise a step's targets by their own statistics; every rank must call."""
        encoded = [
            {} if look.one.is_padding else self.targets.encoded(look.views, look.one.views.values())
            for look in looks
        ]
        self.targets.begin_step(self.engine.device)
        return [
            look._replace(targets=self.targets.normalised(features))
            for look, features in zip(looks, encoded, strict=True)
        ]

    def _ahead(
        self, step: int, looks: "Sequence[_Look]"
    ) -> "tuple[list[_Look], dict[tuple[str, str], Relation]]":
        """Find the relations of a step's images, see :mod:`.relations`; every rank must call."""
        dtype = next(self.engine.model.parameters()).dtype
        summaries, seen = Summaries(self.stage, self.engine.device, dtype), []
        only = len(looks) == 1  # then its graph may wait
        for look in looks:
            one = look.one
            if not one.is_padding and teachers_related(self.stage, one.partition):
                targets = look.targets or self.targets(look.views, one.views.values(), look.cache)
                explained = self._explain_oom(look, "the student's pass ahead, for loss.relation")
                with explained, torch.set_grad_enabled(only):
                    predictions = self._predict(step, look)
                summaries.add(one.partition, look.micro.start, predictions.features, targets)
                look = look._replace(targets=targets, predictions=predictions if only else None)
            seen.append(look)
        return seen, summaries.relations()

    def _losses(
        self,
        step: int,
        look: "_Look",
        targets: Mapping[str, Features],
        relations: Mapping[tuple[str, str], Relation],
    ) -> LossReport:
        """Return the loss of each image of a pass, relations and other students included."""
        config, views = self.stage.loss, look.views
        with self._explain_oom(look, "the forward pass of the student"):
            predictions = look.predictions or self._predict(step, look)
            report = distillation_loss(
                predictions.features,
                targets,
                self.stage.losses,
                self.weights.now(),
                shifts={name: views.shift(name) for name in targets},
                log_variances=self._log_variances(predictions),
                survivors=self._survivors(step, look),
                mean_cells=self._mean_cells,
                inner=weighted_inner(predictions.inner, self.stage.student),
            )
        total, terms = report
        for name, features in predictions.features.items():
            if relation := relations.get((look.one.partition.name, name)):
                assert features.summary is not None
                first = look.micro.start - look.one.partition.start
                related = relation.of(features.summary, first)  # [B]
                total = total + self.stage.teachers[name].summary_weight * related
                terms[f"{name}/{RELATION}"] = relation.value
        for name, weight, other, encoder in (
            (MESA, config.mesa, self.ema, EMA),
            (ANCHOR, self.stage.anchor, self.anchor, STUDENT),
        ):
            if weight:
                assert other is not None, "it teaches on every rank"
                distance = self._apart(predictions, other, views, encoder)
                total, terms[name] = total + weight * distance, distance.detach().mean()
        return LossReport(total, terms)

    def _survivors(self, step: int, look: "_Look") -> Survivors | None:
        if not (share := self.stage.loss.drop_teachers):
            return None
        drawn = self.draws.survivors(step, look.micro, look.one, share)
        return drawn._replace(others=to_device(drawn.others, self.engine.device))

    def _apart(self, predictions: Predictions, other: Ema, views: Views, encoder: str) -> Tensor:
        """Return the distance of each image's features to those of a student that does not learn.

        ``[B]``; ``encoder`` names whose pixels that one sees.
        """
        size, is_ema = f"{views.size[0]}x{views.size[1]} px", encoder == EMA
        field = "loss.mesa" if is_ema else "the stage's anchor"
        hint = f"lower engine.micro_batch, or set {field} to 0"
        explained = explain_oom(f"the other student of {field}", size, hint)
        with explained, torch.no_grad(), self.engine.autocast():
            features: Tensor = other.model.get_submodule("student")(views.of_student(encoder))[1]
        shift, cells = views.shift(encoder) if is_ema else None, None
        if shift is not None:
            features, cells = warp_to_student(features, shift)
        return mesa(predictions.spatial, features, cells)

    def _predict(self, step: int, look: "_Look") -> Predictions:
        micro, one = look.micro, look.one
        if self._is_related:  # what is drawn inside is drawn alike ahead and in the pass
            self._seed_generators(step, f"{one.partition.name}/{micro.start}")
        predictions: Predictions = self.engine.forward(
            look.views.of_student(),
            one.partition.teachers,
            draws=to_device(self.draws.positions(step, micro), self.engine.device),
            freeze_body=step < self.stage.frozen_steps,
            window_size=self.draws.window(step, one) or None,
        )
        return predictions

    def _zero(self, step: int, look: "_Look") -> Tensor:
        """Return zero, whose backward pass is a padding pass: it adds zeros to all gradients.

        Where the engine cannot say in which order, the student runs.
        """
        zero = self.engine.zero()
        if zero is not None:
            return zero
        with self._explain_oom(look, "a padding pass of the student"):
            predictions = self._predict(step, look)
        return 0.0 * predictions.spatial.sum(dtype=torch.float32)  # tied to all other outputs

    def _log_variances(self, predictions: Predictions) -> dict[str, Tensor] | None:
        if predictions.log_variances is None:
            return None
        return {
            f"{name}/{kind}": predictions.log_variances[row, column]
            for row, name in enumerate(self.targets.teachers)
            for column, kind in enumerate(KINDS)
        }

    def _explain_oom(self, look: "_Look", part: str) -> AbstractContextManager[None]:
        one, (height, width) = look.one, look.one.size
        images, stage = len(look.views), self.stage
        other = "set student.gradient_checkpointing to true"
        if stage.student.gradient_checkpointing:
            other = "take a smaller student, or lower the sizes of the partitions"
        limit = stage.micro_batch(one.partition.name, one.size)
        hint = lower("engine.micro_batch", limit, images, other)
        return explain_oom(part, f"{height}x{width} px, {images} images", hint)
