"""How closely predicted features reproduce their targets."""

import torch
from einops import rearrange
from torch import Tensor

from ...errors import DataError
from .sums import Sums, check_finite


def tokens_of(maps: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the cells of ``[B, C, h, w]``, or those that are valid ``[B, h, w]``: ``[n, C]``."""
    tokens = rearrange(maps, "b c h w -> (b h w) c")
    return tokens if valid is None else tokens[rearrange(valid, "b h w -> (b h w)")]


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
