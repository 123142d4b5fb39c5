"""Measures of a whole set, fed batch by batch: each adds up in float64, over batches and processes.

They are ratios of sums, not means of ratios of batches, which a single flat image would ruin.
"""

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from ..errors import DataError

IGNORED = -1
"""Index of pixels that are of no class."""


def check_finite(values: Tensor, measure: str, name: str) -> None:
    """Raise DataError, with the name of the input, for a value that is NaN or infinite."""
    bad = values.numel() - int(values.isfinite().sum())
    if bad:
        raise DataError(
            f"{measure}: {bad} of {values.numel()} values of {name} are NaN or infinite; "
            "compute it in float32, or find the layer that overflows"
        )


def tokens_of(maps: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the cells of ``[B, C, h, w]``, or those that are valid ``[B, h, w]``: ``[n, C]``."""
    tokens = rearrange(maps, "b c h w -> (b h w) c")
    return tokens if valid is None else tokens[rearrange(valid, "b h w -> (b h w)")]


class Sums:
    """Float64 sums that add up over batches, parts of a set, and processes."""

    def __init__(self, num_sums: int, device: torch.device | str | None = None):
        self.sums = torch.zeros(num_sums, dtype=torch.float64, device=device)

    def merge(self, other: "Sums") -> None:
        """Add what ``other``, of the same kind, was fed."""
        self.sums += other.sums.to(self.sums)

    def all_reduce(self) -> None:
        """Merge over all processes, once, at the end; alone, do nothing."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sums)


class Fidelity(Sums):
    """MSE(target, mean of targets) / MSE(prediction, target): FeatSharp's eq. 7 (arXiv 2502.16025).

    The mean is that of the whole set, channel by channel: 1 for a prediction that only knows the
    mean. PHI-S is a similarity, so the value is the same in its space as in the teacher's own; it
    is not under normalizers that scale channels one by one.

    Args:
        channels: C.
        device: where the sums live.
    """

    def __init__(self, channels: int, device: torch.device | str | None = None):
        super().__init__(2 + 2 * channels, device)
        self.channels = channels

    @torch.no_grad()
    def update(self, prediction: Tensor, target: Tensor, valid: Tensor | None = None) -> None:
        """Add maps ``[B, C, h, w]``, of cells that are ``valid`` ``[B, h, w]``.

        Raises:
            DataError: a value that counts is not finite.
        """
        prediction, target = tokens_of(prediction, valid), tokens_of(target, valid)  # [n, C]
        check_finite(prediction, "fidelity", "the prediction")
        check_finite(target, "fidelity", "the target")
        target = target.to(self.sums)
        error = (prediction.to(self.sums) - target).square().sum()
        count = torch.full_like(error, len(target))
        sums = torch.stack([count, error])
        self.sums += torch.cat([sums, target.sum(dim=0), target.square().sum(dim=0)])

    def compute(self) -> float:
        """Return the fidelity, infinite without error; raises DataError without a valid cell."""
        count, error = self.sums[:2].tolist()
        if not count:
            raise DataError("fidelity: no cell of any view is valid; use milder views")
        total, squared = self.sums[2:].split(self.channels)
        spread = (squared - total.square() / count).sum().item()
        return spread / error if error else float("inf")

    @property
    def mse(self) -> float:
        """Mean squared error per channel."""
        count, error = self.sums[:2].tolist()
        return error / (count * self.channels)


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Count pixels by (target, prediction), ``[K, K]``, without those whose target is IGNORED."""
    known = target != IGNORED
    code = target[known] * num_classes + prediction[known]
    return code.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def mean_iou(confusion: Tensor) -> float:
    """Return the mean intersection over union, in [0, 1], of the classes that the targets show."""
    overlap = confusion.diagonal().double()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - confusion.diagonal()
    present = confusion.sum(dim=1) > 0
    return (overlap[present] / union[present]).mean().item()


def num_shown(confusion: Tensor) -> int:
    """Return how many classes the targets show: those that :func:`mean_iou` is the mean of."""
    return int((confusion.sum(dim=1) > 0).sum())


def macro_accuracy(correct: Tensor, labels: Tensor) -> float:
    """Return the mean over classes of the share of images that are right, in [0, 1].

    Args:
        correct: ``[Q]`` bool.
        labels: ``[Q]`` class indices; a class that does not occur does not count.
    """
    shares = [correct[labels == label].double().mean() for label in labels.unique()]
    return torch.stack(shares).mean().item()
