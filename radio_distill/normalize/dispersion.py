"""How far a teacher's summaries spread around their mean direction.

Summaries of one teacher lie in a narrow cone, those of another all around the sphere, so that the
same angular error is worth more with the first. C-RADIOv4 (arXiv 2601.17237) divides the squared
angle between student and teacher by

    Disp = E[θ(y, μ)²],   μ = E[y] / ‖E[y]‖,   θ(x, y) = arccos(cos(x, y)),

and reports 0.694 for SigLIP2-g and 2.120 for DINOv3-H+. The angles can only be taken once μ is
known. TAO Toolkit's port therefore takes those of each batch to the mean so far; here μ is that of
all summaries and the angles are those of the first images, which are kept.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..distill.losses import angle
from ..errors import DataError

FLOOR = 1e-8
"""The least dispersion, as in TAO Toolkit: a loss can be divided by it."""

CHUNK = 1024
"""Kept summaries whose angles are taken at once, in float64."""


class SummaryMoments:
    """Streaming sum of a teacher's summaries ``[B, S]``, and the directions of the first images.

    Images are known by their position in the order of all processes' images, so that the result
    does not depend on how many processes there are.

    Args:
        channels: S.
        kept: directions of the images at positions below this are kept, in float32; 16,384 of 1536
            channels are 100 MB.
        device: where the sum and the directions live.
    """

    def __init__(self, channels: int, kept: int, device: torch.device | str | None = None):
        self.count = 0
        """Summaries seen."""
        self._sum = torch.zeros(channels, dtype=torch.float64, device=device)  # [S]
        self._directions = torch.zeros(kept, channels, device=device)  # [kept, S]
        self._times_seen = torch.zeros(kept, dtype=torch.int32, device=device)  # [kept]

    @torch.no_grad()
    def update(self, summary: Tensor, start: int) -> None:
        """Add ``[B, S]``; the first is that of the image at ``start``, the others follow it."""
        channels = len(self._sum)
        assert summary.shape[1] == channels, f"{summary.shape[1]} channels, not {channels}"
        summary = summary.to(self._sum)
        rows = slice(start, start + len(summary))
        first = summary[: max(len(self._directions) - start, 0)]
        self.count += len(summary)
        self._sum += summary.sum(0)
        self._directions[rows] = F.normalize(first, dim=1).float()
        self._times_seen[rows] += 1

    def merge(self, other: "SummaryMoments") -> None:
        """Add the summaries, of other images, that ``other`` has seen."""
        self.count += other.count
        self._sum += other._sum.to(self._sum)
        self._directions += other._directions.to(self._directions)
        self._times_seen += other._times_seen.to(self._times_seen)

    def all_reduce(self) -> None:
        """Merge over all processes, which end with equal numbers; alone, do nothing."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        count = self._sum.new_tensor([self.count])
        # A direction is zero everywhere but on the process that saw it, so a sum gathers it.
        for tensor in (count, self._sum, self._directions, self._times_seen):
            dist.all_reduce(tensor)
        self.count = int(count.item())

    def dispersion(self) -> float:
        """Return the mean squared angle to the mean direction, in rad², at least 1e-8.

        Raises:
            DataError: where no summary was seen.
        """
        if self.count == 0:
            raise DataError("no summaries to take the dispersion of: no image was usable")
        assert int(self._times_seen.max()) == 1, "an image counted twice, or none of the first seen"
        directions = self._directions[self._times_seen == 1]  # [n, S]
        mean = self._sum[None]  # the mean's length does not matter
        angles = [angle(chunk.double(), mean) for chunk in directions.split(CHUNK)]
        return max(float(torch.cat(angles).mean()), FLOOR)
