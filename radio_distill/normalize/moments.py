"""Mean and covariance of a teacher's tokens, in one pass over any number of images.

Sums are kept in float64 and of centred tokens (Chan, Golub and LeVeque 1979), so that a mean that
is large against the spread costs no digits: mean and covariance agree with a two-pass computation
to about 1e-15 of the largest entry. The price is a float64 matrix product of 2·N·C² operations for
N tokens, small beside an encoder wherever float64 is not emulated. Summaries are left out: only
spatial features are normalised.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from ..errors import DataError

CHUNK = 8192
"""Tokens that are centred at once: at 1536 channels a float64 copy of 100 MB."""


class Moments:
    """Streaming mean and covariance of ``[B, C, h, w]`` features over their tokens.

    Args:
        channels: C.
        device: where the sums live and the products run.
    """

    def __init__(self, channels: int, device: torch.device | str | None = None):
        self.count = 0
        """Tokens seen."""
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)  # [C]
        self._scatter = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    @property
    def covariance(self) -> Tensor:
        """``[C, C]`` float64, the sum divided by ``count``; raises DataError without tokens."""
        if self.count == 0:
            raise DataError("no tokens to take statistics of: no image was usable")
        return self._scatter / self.count

    @torch.no_grad()
    def update(self, spatial: Tensor, valid: Tensor | None = None) -> None:
        """Add the tokens of ``[B, C, h, w]``, or those where ``valid`` ``[B, h, w]`` is True."""
        channels = len(self.mean)
        assert spatial.shape[1] == channels, f"{spatial.shape[1]} channels, not {channels}"
        tokens = rearrange(spatial, "b c h w -> (b h w) c")
        if valid is not None:
            tokens = tokens[rearrange(valid, "b h w -> (b h w)")]
        for chunk in tokens.split(CHUNK):
            chunk = chunk.to(self.mean)  # [n, C]
            mean = chunk.sum(0) / max(len(chunk), 1)
            centred = chunk - mean
            self._add(len(chunk), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> None:
        """Add the tokens that ``other`` has seen."""
        self._add(other.count, other.mean.to(self.mean), other._scatter.to(self.mean))

    def all_reduce(self) -> None:
        """Merge over all processes, which end with equal numbers; alone, do nothing."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        count = self.mean.new_tensor([self.count])
        dist.all_reduce(count)
        total = int(count.item())
        mean = self.mean * (self.count / max(total, 1))
        dist.all_reduce(mean)
        offset = self.mean - mean
        scatter = self._scatter + self.count * torch.outer(offset, offset)
        dist.all_reduce(scatter)
        self.count, self.mean, self._scatter = total, mean, scatter

    def state(self) -> dict[str, Tensor]:
        """Return tensors that make equal moments through :meth:`from_state`."""
        return {
            "count": torch.tensor(self.count),
            "mean": self.mean.cpu(),
            "scatter": self._scatter.cpu(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "Moments":
        """Make moments, on the CPU, of what :meth:`state` returned."""
        moments = cls(len(state["mean"]))
        moments._add(int(state["count"]), state["mean"], state["scatter"])
        return moments

    @classmethod
    def standard(cls, channels: int) -> "Moments":
        """Make moments of mean 0 and covariance 1, for a teacher of which nothing is known."""
        moments = cls(channels)
        moments.count, moments._scatter = 1, torch.eye(channels, dtype=torch.float64)
        return moments

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if count == 0:
            return
        total = self.count + count
        offset = mean - self.mean
        between = torch.outer(offset, offset) * (self.count * count / total)
        self._scatter = self._scatter + scatter + between
        self.mean = self.mean + offset * (count / total)
        self.count = total
