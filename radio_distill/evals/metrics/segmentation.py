"""Counts of pixels: by class, for mIoU and accuracy, and of what is salient, for the best F."""

from typing import Literal

import torch
from torch import Tensor

from . import IGNORED
from .sums import Sums

Counted = Literal["shown", "met", "all"]
THRESHOLDS = tuple(step / 20 for step in range(1, 20))
BETA_SQUARED = 0.3
"""Weight of recall in F (Achanta et al. 2009)."""


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Count pixels by (target, prediction), ``[K, K]``, without those whose target is IGNORED."""
    known = target != IGNORED
    code = target[known] * num_classes + prediction[known]
    return code.bincount(minlength=num_classes**2).view(num_classes, num_classes)


class Confusion(Sums):
    """The confusion matrix of a whole set.

    Args:
        num_classes: K.
        device: where the sums live.
    """

    def __init__(self, num_classes: int, device: torch.device | str | None = None):
        super().__init__(num_classes**2, device)
        self.num_classes = num_classes

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add maps of classes, of any equal shape."""
        self.sums += confusion_matrix(prediction, target, self.num_classes).flatten()

    def compute(self) -> Tensor:
        """Return the matrix, ``[K, K]``, on the host."""
        return self.sums.view(self.num_classes, self.num_classes).cpu()


def mean_iou(confusion: Tensor, counted: Counted = "shown") -> float:
    """Return the mean intersection over union, in [0, 1], of some classes.

    On a full validation split the three agree, since every class occurs; on a part of one they can
    be points apart.

    Args:
        confusion: ``[K, K]``, of the whole set.
        counted: ``shown``: classes that the targets show. ``met``: those that targets or
            predictions show (the `nanmean` of mmsegmentation and DINOv3). ``all``: every class, one
            that nobody shows with IoU 0 (the meters of Multi-Task-Transformer and MLoRE).
    """
    overlap = confusion.diagonal().double()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - confusion.diagonal()
    iou = overlap / union.clamp(min=1)
    if counted == "shown":
        iou = iou[confusion.sum(dim=1) > 0]
    elif counted == "met":
        iou = iou[union > 0]
    return iou.mean().item()


def num_shown(confusion: Tensor) -> int:
    """Return how many classes the targets show: those that :func:`mean_iou` is the mean of."""
    return int((confusion.sum(dim=1) > 0).sum())


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
