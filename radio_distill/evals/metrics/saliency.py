"""Saliency: the best F-measure over thresholds."""

import torch
from torch import Tensor

from . import IGNORED
from .sums import Sums

THRESHOLDS = tuple(step / 20 for step in range(1, 20))
BETA_SQUARED = 0.3
"""Weight of recall in F (Achanta et al. 2009)."""


class MaxF(Sums):
    """Largest F over thresholds .05, .10 … .95; precision and recall are of the whole set.

    Args:
        as_published: pass the probabilities through a sigmoid once more, as the meters of InvPT and
            MLoRE do, so that all lie in [.5, .73] and only thresholds .5 to .7 tell them apart.
            Published Pascal Context numbers are made so; the right number is another.
        device: where the sums live.
    """

    def __init__(self, as_published: bool = False, device: torch.device | str | None = None):
        super().__init__(2 * len(THRESHOLDS) + 1, device)
        self.as_published = as_published

    def update(self, probability: Tensor, target: Tensor) -> None:
        """Add maps of any equal shape: probabilities of saliency, and 1, 0 or IGNORED."""
        known = target != IGNORED
        probability, salient = probability[known], target[known] == 1
        if self.as_published:
            probability = probability.sigmoid()
        chosen = [probability > threshold for threshold in THRESHOLDS]
        counts = [(mask & salient).sum() for mask in chosen] + [mask.sum() for mask in chosen]
        self.sums += torch.stack([*counts, salient.sum()])

    def compute(self) -> float:
        """Return maxF in [0, 1]."""
        right, chosen = self.sums[:-1].view(2, -1)
        precision, recall = right / chosen.clamp(min=1), right / self.sums[-1].clamp(min=1)
        weighted = BETA_SQUARED * precision + recall
        f = (1 + BETA_SQUARED) * precision * recall / weighted.where(weighted > 0, 1.0)
        return f.max().item()
