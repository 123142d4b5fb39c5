"""Tiles: each of ``factor x factor`` tiles is encoded alone at the teacher's own size.

Tiles show detail that the whole image hides from a low-resolution teacher, and lose the context:
features jump at tile borders (FeatSharp, arXiv 2502.16025, Figures 4 and 5 and appendix). S2 mixes
them with the interpolated map of the whole image, after "When do we not need larger vision
models?" (arXiv 2403.13043), in the form that FeatSharp (section 4.5) compares with: mixed, not
concatenated, so the teacher's channels stay as they are. The summary is that of the whole image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from radio_distill.config.fields import Share
from radio_distill.protocols import Teacher
from radio_distill.types import Features, Size

from . import tiling
from .interpolate import enlarge


@dataclass(frozen=True)
class Tile(tiling.Method):
    """Encode the whole image for its summary and the tiles for the map."""

    def __call__(self, teacher: Teacher, pixels: Tensor, grid: Size) -> Features:
        """Return features with spatial ``[B, C, *grid]``; ConfigError for a grid that cannot be."""
        low, tiles, *_ = tiling.encode_with_tiles(
            teacher, pixels, grid, self.factor, (self.factor,), self.micro_batch
        )
        fine = tiles[self.factor].contiguous(memory_format=torch.channels_last)
        return Features(low.summary, fine)


@dataclass(frozen=True)
class S2(tiling.Method):
    """``beta * bilinear(low) + (1 - beta) * tiles``."""

    beta: Share = 0.5
    """Share of the interpolated map."""

    def __call__(self, teacher: Teacher, pixels: Tensor, grid: Size) -> Features:
        """Return features with spatial ``[B, C, *grid]``; ConfigError for a grid that cannot be."""
        low, tiles, *_ = tiling.encode_with_tiles(
            teacher, pixels, grid, self.factor, (self.factor,), self.micro_batch
        )
        mixed = self.beta * enlarge(low.spatial, grid) + (1 - self.beta) * tiles[self.factor]
        return Features(low.summary, mixed.contiguous(memory_format=torch.channels_last))
