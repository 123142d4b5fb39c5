"""Tiling: each of ``factor x factor`` tiles is encoded alone at the teacher's own size.

Tiles show detail that the whole image hides from a low-resolution teacher, and lose the context:
features jump at tile borders (FeatSharp, arXiv 2502.16025, Figures 4 and 5 and appendix). The
summary is that of the whole image, as everywhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from radio_distill.protocols import Teacher
from radio_distill.types import Features, Size

from . import tiling


@dataclass(frozen=True)
class Tile:
    """Encode the whole image for its summary and the tiles for the map."""

    factor: int
    micro_batch: int = 0
    """Teacher images in one call, tiles counted; 0 for the teacher's own setting."""

    def __call__(self, teacher: Teacher, pixels: Tensor, grid: Size) -> Features:
        """Return features with spatial ``[B, C, *grid]``; ConfigError for a grid that cannot be."""
        low, tiles, *_ = tiling.encode_with_tiles(
            teacher, pixels, grid, self.factor, (self.factor,), self.micro_batch
        )
        return Features(
            low.summary, tiles[self.factor].contiguous(memory_format=torch.channels_last)
        )

    def cost(self, grid: Size) -> int:
        """Return ``1 + factor ** 2``: the whole image (for its summary) and the tiles."""
        return 1 if self.factor == 1 else 1 + self.factor**2
