"""Bilinear and bicubic interpolation of the low-resolution map: the baseline of every comparison.

RADIOv2.5's stage 3 went the other way, student down to the teacher's grid; FeatSharp's "Baseline"
(arXiv 2502.16025, section 4.5) is ``bilinear``. One teacher image for an image at any factor.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from radio_distill.protocols import Teacher
from radio_distill.types import Features, Size

from . import tiling


@dataclass(frozen=True)
class Bilinear:
    """Interpolate the teacher's map ``factor`` times finer."""

    factor: int
    micro_batch: int = 0
    """Teacher images in one call; 0 for the teacher's own setting."""
    mode: ClassVar[str] = "bilinear"

    def __call__(self, teacher: Teacher, pixels: Tensor, grid: Size) -> Features:
        """Return features with spatial ``[B, C, *grid]``; ConfigError for a grid that cannot be."""
        low = tiling.encode_low(teacher, pixels, grid, self.factor, self.micro_batch)
        return Features(low.summary, enlarge(low.spatial, grid, self.mode))

    def cost(self, grid: Size) -> int:
        """Return 1: the whole image."""
        return 1


class Bicubic(Bilinear):
    """Interpolate with a bicubic kernel; it overshoots at edges, by a tenth of the step."""

    mode: ClassVar[str] = "bicubic"


def enlarge(spatial: Tensor, grid: Size, mode: str = "bilinear") -> Tensor:
    """Interpolate a map ``[B, C, h, w]`` to ``[B, C, *grid]``, cell centres aligned."""
    fine = F.interpolate(spatial, grid, mode=mode, align_corners=False)
    return fine.contiguous(memory_format=torch.channels_last)
