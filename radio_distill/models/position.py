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
        if draws is None:
            return _resize(self.table, grid)
        rows, columns = crop_axes(grid, draws)  # [B, h], [B, w]
        side = len(self.table)
        cells, weights = _corners(rows * (side - 1), columns * (side - 1), side)
        # Cells are rows of the table, read and added to side by side, and no gradient of the
        # batch's size is kept; a sampler of maps has one thread for all channels of a point, and
        # adds gradients on a GPU in no fixed order.
        positions = F.embedding_bag(
            rearrange(cells, "b h w k -> (b h w) k"),
            rearrange(self.table, "y x d -> (y x) d"),
            mode="sum",
            per_sample_weights=rearrange(weights, "b h w k -> (b h w) k").to(self.table.dtype),
        )
        positions = rearrange(positions, "(b h w) d -> b h w d", h=grid[0], w=grid[1])
        kept = draws[:, 0] >= self.dropout
        return positions * rearrange(kept, "b -> b 1 1 1")


def crop_axes(grid: Size, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return where a random crop of each image samples the table: ``[B, h]`` and ``[B, w]``.

    Rows and columns are in [0, 1], from the first cell of the table to the last. The crop covers
    (scale / aspect) x (scale * aspect) of a square table, scale ~ U[sqrt(0.1), 1] and log aspect
    ~ U[log 3/4, log 4/3]. A grid that is not square takes the crop's top left part of its own
    shape, as at evaluation.
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
    return rows, columns


def _corners(rows: Tensor, columns: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return the four cells around each point and their bilinear weights, ``[B, h, w, 4]`` each.

    Args:
        rows: of the points, ``[B, h]`` in cells of the table.
        columns: likewise, ``[B, w]``.
        side: cells a side of the table; cells are numbered row by row.
    """
    first = [axis.floor().clamp(0, side - 1)[..., None] for axis in (rows, columns)]
    pairs = [(cell.long() + torch.arange(2, device=cell.device)) for cell in first]
    seconds = [axis[..., None] - cell for axis, cell in zip((rows, columns), first, strict=True)]
    shares = [torch.cat((1 - second, second), dim=-1) for second in seconds]  # [B, h | w, 2]
    pairs = [pair.clamp(max=side - 1) for pair in pairs]  # behind the last cell, its share is 0
    cells = pairs[0][:, :, None, :, None] * side + pairs[1][:, None, :, None, :]
    weights = shares[0][:, :, None, :, None] * shares[1][:, None, :, None, :]  # [B, h, w, 2, 2]
    return cells.flatten(-2), weights.flatten(-2)


def _resize(table: Tensor, grid: Size) -> Tensor:
    """Resize to a square of the longer side and keep the top left: ``[1, h, w, D]``."""
    side = max(grid)
    table = rearrange(table, "y x d -> 1 d y x")
    square = F.interpolate(table, size=(side, side), mode="bilinear", align_corners=False)
    return rearrange(square[:, :, : grid[0], : grid[1]], "1 d h w -> 1 h w d")
