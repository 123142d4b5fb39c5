"""Cropped position embedding (CPE): one table of positions for every input size.

The table spans the largest image. A training image sees a random crop of it, so that the student
cannot tie content to a position or a size; at evaluation the table is resized to the grid. From
RADIO (arXiv 2312.06709), with the numbers of its published models.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..types import Size

NUM_DRAWS = 5
"""Uniform numbers in [0, 1) that one image takes: dropout, scale, aspect, vertical and horizontal
offset. The caller draws them, so that an image sees the same crop wherever it is processed."""

MIN_SCALE = math.sqrt(0.1)
MAX_LOG_ASPECT = math.log(4 / 3)


class CroppedPositions(nn.Module):
    """A learned ``[side, side, D]`` table of positions, cropped or resized to a grid.

    Args:
        embed_dim: width D.
        side: cells a side of the table.
        dropout: share of training images that see no position at all.
    """

    def __init__(self, embed_dim: int, side: int, dropout: float):
        super().__init__()
        self.table = nn.Parameter(torch.randn(side, side, embed_dim) * embed_dim**-0.5)
        self.dropout = dropout

    def forward(self, grid: Size, draws: Tensor | None = None) -> Tensor:
        """Return the positions of a grid, ``[B, h, w, D]``, or ``[1, h, w, D]`` without draws.

        Args:
            grid: (h, w).
            draws: ``[B, NUM_DRAWS]`` in [0, 1) for a random crop an image; None resizes the table.
        """
        table = rearrange(self.table, "y x d -> 1 d y x")
        if draws is None:
            return rearrange(_resize(table, grid), "1 d h w -> 1 h w d")
        # The crops are laid out below each other in one image, because a table that is expanded
        # over the batch would get a gradient of the batch's size.
        points = rearrange(crop_points(grid, draws), "b h w xy -> 1 (b h) w xy")
        positions = F.grid_sample(table, points, mode="bilinear", align_corners=True)
        positions = rearrange(positions, "1 d (b h) w -> b h w d", h=grid[0])
        kept = draws[:, 0] >= self.dropout
        return positions * rearrange(kept, "b -> b 1 1 1")


def crop_points(grid: Size, draws: Tensor) -> Tensor:
    """Return where a random crop of each image samples the table: ``[B, h, w, (x, y)]`` in [-1, 1].

    The crop covers (scale / aspect) x (scale * aspect) of a square table, scale ~ U[sqrt(0.1), 1]
    and log aspect ~ U[log 3/4, log 4/3]. A grid that is not square takes the crop's top left part
    of its own shape, as at evaluation.
    """
    scale = MIN_SCALE + (1 - MIN_SCALE) * draws[:, 1]
    aspect = torch.exp(MAX_LOG_ASPECT * (2 * draws[:, 2] - 1))
    extents = torch.stack((scale / aspect, scale * aspect), dim=1).clamp(max=1)  # [B, (y, x)]
    offsets = draws[:, 3:5] * (1 - extents)
    steps = extents / max(max(grid) - 1, 1)
    rows, columns = (
        offsets[:, axis, None] + steps[:, axis, None] * torch.arange(length, device=draws.device)
        for axis, length in enumerate(grid)
    )
    rows, columns = torch.broadcast_tensors(rows[:, :, None], columns[:, None, :])  # [B, h, w]
    return 2 * torch.stack((columns, rows), dim=-1) - 1


def _resize(table: Tensor, grid: Size) -> Tensor:
    """Resize to a square of the longer side and keep the top left: ``[1, D, h, w]``."""
    side = max(grid)
    square = F.interpolate(table, size=(side, side), mode="bilinear", align_corners=False)
    return square[:, :, : grid[0], : grid[1]]
