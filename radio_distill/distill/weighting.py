"""Weights of loss terms that adapt while training: AdaLoss and learned uncertainty.

AM-RADIO (arXiv 2312.06709), section 3.4.1 and appendix E, compared both with equal weights, saw
little advantage, and kept equal weights; PHI-S (arXiv 2410.01680) found the same beside its
normalisation. AMTML-KD, the third of that comparison, is left out: it gave all weight to one
teacher. A term is named ``teacher/summary`` or ``teacher/features``.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 1e-8
"""Mean loss below which a weight grows no further. Ours: about float32's rounding of a cosine."""


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


def uncertain(loss: Tensor, log_variance: Tensor) -> Tensor:
    """Return losses ``[B]`` weighted by a learned ``log_variance`` b: e^-b · loss + softplus(b).

    :class:`..models.heads.Uncertainty` learns b.

    AM-RADIO, equation 6. Kendall et al. have b in place of softplus(b), and half of both parts;
    softplus stops rewarding b well below 0, so that weights above 1 grow more slowly.
    """
    log_variance = log_variance.to(loss)
    return torch.exp(-log_variance) * loss + F.softplus(log_variance)
