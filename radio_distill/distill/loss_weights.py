"""The weight of each term of the loss, in each step.

A term's weight is the teacher's of the recipe; over the part of the step that shows the teacher
(``loss.rebalance``), so that a teacher of few images counts as one of all; over the dispersion of
its summaries (``loss.summary: angle``); times what adapts (``loss.weighting``).

AM-RADIO (arXiv 2312.06709), section 3.4.1 and appendix E, compared AdaLoss and learned uncertainty
with equal weights, saw little advantage, and kept equal weights; PHI-S (arXiv 2410.01680) found the
same beside its normalisation. AMTML-KD, the third of that comparison, is left out: it gave all
weight to one teacher.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..stage import Stage
from ..system.distributed import all_reduce_sum
from ..system.transfer import OnItsWay
from ..types import FEATURES, SUMMARY
from .losses import KINDS

_DISPERSION = "dispersion/"
SMALLEST = 1e-8
"""Mean loss below which a weight grows no further. Ours: about float32's rounding of a cosine."""


class TermWeights:
    """Weights of terms named ``teacher/summary`` and ``teacher/features``.

    Args:
        stage: its teachers, partitions and loss.
        dispersions: of the teachers' summaries; empty for another loss than the angle.
        device: where a step's sums live.
    """

    def __init__(self, stage: Stage, dispersions: Mapping[str, float], device: torch.device):
        self._stage = stage
        adapts = stage.loss.weighting == "adaloss"
        self._ada = AdaLoss(stage.loss.adaloss_momentum) if adapts else None
        self._dispersions = dict(dispersions)
        self._fixed = self._without_adapting(dispersions)
        self._terms = [f"{name}/{kind}" for name in stage.teachers for kind in KINDS]
        self._sums = torch.zeros(2, len(self._terms), dtype=torch.float64, device=device)
        self._last: OnItsWay | None = None
        """Sums of the last step over all processes, as long as nobody has asked for them."""

    def now(self) -> dict[str, float]:
        """Return the weights of this step."""
        if self._ada is None:
            return self._fixed
        self._adapt(self._ada)
        return {term: weight * self._ada.weight(term) for term, weight in self._fixed.items()}

    def add(self, terms: Mapping[str, Tensor], images: int) -> None:
        """Take in the means of terms over some images of this step."""
        if self._ada is not None:
            for term, value in terms.items():
                index = self._terms.index(term)
                self._sums[0, index] += value.double() * images
                self._sums[1, index] += images

    def end_step(self) -> None:
        """Adapt to the step's means over all processes; every rank must call."""
        if self._ada is None:
            return
        self._adapt(self._ada)
        self._last = OnItsWay(all_reduce_sum(self._sums.clone()))
        self._sums.zero_()

    def forget_step(self) -> None:
        """Drop what was taken in of a step that is skipped."""
        self._sums.zero_()

    def state(self) -> dict[str, Tensor]:
        """Return dispersions, and what has been adapted to, as named tensors."""
        state = {
            f"{_DISPERSION}{name}": torch.tensor(value, dtype=torch.float64)
            for name, value in self._dispersions.items()
        }
        if self._ada is None:
            return state
        self._adapt(self._ada)
        return {**state, **self._ada.state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state` returned."""
        self._dispersions = {
            name.removeprefix(_DISPERSION): float(value)
            for name, value in state.items()
            if name.startswith(_DISPERSION)
        }
        self._fixed = self._without_adapting(self._dispersions)
        if self._ada is not None:
            rest = {name: item for name, item in state.items() if not name.startswith(_DISPERSION)}
            self._ada.load_state(rest)

    def _adapt(self, ada: "AdaLoss") -> None:
        """Take in the last step, whose sums have had until now to arrive."""
        if self._last is None:
            return
        totals, images = self._last.tolist()
        self._last = None
        means = zip(self._terms, totals, images, strict=True)
        ada.update({term: total / count for term, total, count in means if count})

    def _without_adapting(self, dispersions: Mapping[str, float]) -> dict[str, float]:
        weights, shares = {}, self._stage.teacher_shares()
        for name, teacher in self._stage.teachers.items():
            share = shares.get(name, 1.0) if self._stage.loss.rebalance else 1.0
            # AdaLoss divides by a term's size itself.
            dispersion = 1.0 if self._ada else dispersions.get(name, 1.0)
            summary = teacher.summary_weight / dispersion
            weights[f"{name}/{SUMMARY}"] = summary / share
            weights[f"{name}/{FEATURES}"] = teacher.feature_weight / share
        return weights


class AdaLoss:
    """Weights that bring every term to about 1: the inverse of its mean over past steps.

    AM-RADIO, equation 7, after Hu et al. (arXiv 1708.06832). The mean is exponential and starts at
    a term's first value, so that it has no bias towards 0.

    Args:
        momentum: share of the past in a new mean, 0.99 in AM-RADIO.
    """

    def __init__(self, momentum: float):
        self.momentum = momentum
        self._means: dict[str, float] = {}

    def weight(self, term: str) -> float:
        """Return the term's weight: 1 before its first update, never above 1e8."""
        return 1 / max(self._means.get(term, 1.0), SMALLEST)

    def update(self, means: Mapping[str, float]) -> None:
        """Take the mean of each of a step's terms, over the images of all processes.

        A number that is not finite is left out: one such step would spoil all weights to come.
        Telling of it is the caller's part. Rounding below 0 counts as 0.
        """
        for term, mean in means.items():
            if math.isfinite(mean):
                past = self._means.get(term, mean)
                self._means[term] = max(past + (1 - self.momentum) * (mean - past), 0.0)

    def state(self) -> dict[str, Tensor]:
        """Return the means by term, in float64, for :meth:`load_state`."""
        return {
            term: torch.tensor(mean, dtype=torch.float64)
            for term, mean in sorted(self._means.items())
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` returned."""
        self._means = {term: float(mean) for term, mean in state.items()}
