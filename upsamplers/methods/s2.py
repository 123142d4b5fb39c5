"""S2: the mean of what the whole image says and what its tiles say.

``beta * bilinear(low) + (1 - beta) * tiles``, after "When do we not need larger vision models?"
(S2, arXiv 2403.13043), in the form that FeatSharp (arXiv 2502.16025, section 4.5) compares with:
mixed, not concatenated, so the teacher's channels stay as they are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from radio_distill.errors import ConfigError
from radio_distill.protocols import Teacher
from radio_distill.types import Features, Size

from . import tiling
from .interpolate import enlarge


@dataclass(frozen=True)
class S2:
    """Mix the interpolated map of the whole image with the stitched map of its tiles."""

    factor: int
    micro_batch: int = 0
    """Teacher images in one call, tiles counted; 0 for the teacher's own setting."""
    beta: float = 0.5
    """Share of the interpolated map, 0 to 1."""

    def __post_init__(self) -> None:
        if not isinstance(self.beta, (int, float)) or not 0 <= self.beta <= 1:
            raise ConfigError(f"upsampler option beta: {self.beta!r} is not a number from 0 to 1")

    def __call__(self, teacher: Teacher, pixels: Tensor, grid: Size) -> Features:
        """Return features with spatial ``[B, C, *grid]``; ConfigError for a grid that cannot be."""
        low, tiles, *_ = tiling.encode_with_tiles(
            teacher, pixels, grid, self.factor, (self.factor,), self.micro_batch
        )
        mixed = self.beta * enlarge(low.spatial, grid) + (1 - self.beta) * tiles[self.factor]
        return Features(low.summary, mixed.contiguous(memory_format=torch.channels_last))

    def cost(self, grid: Size) -> int:
        """Return ``1 + factor ** 2``: the whole image and the tiles."""
        return 1 if self.factor == 1 else 1 + self.factor**2
