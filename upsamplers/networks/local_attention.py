"""Local self-attention on a grid: each cell attends to the window of cells around it.

Cells beyond the border do not exist: the window is truncated there, not shifted (so unlike NATTEN).
Position may enter through ALiBi, by row distance in even heads and by column distance in odd ones,
as in FeatSharp's released code; the paper (arXiv 2502.16025, section 3.3) names no position term.
Left out: dilation, rotary embeddings, and masks kept from call to call.

A block of queries meets the keys of the block and its rim: linear in the cells, torch only, with a
backward pass on every device, which FlexAttention lacks on a CPU.
"""

from math import ceil
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from radio_distill.config.fields import Range
from radio_distill.types import Size

Window = Annotated[int, Range(1, 11, step=2)]
"""Cells a side that a cell attends to."""


class LocalSelfAttention(nn.Module):
    """Multi-head self-attention within a window, on ``[B, h, w, width]``.

    Args:
        width: of the tokens. The number of heads is its largest divisor up to 16.
        out: of the result.
        window: odd, 1 to 11.
        alibi: let attention fall off with distance.
        pad_heads: give queries and keys the next power of two dimensions a head.
    """

    def __init__(
        self,
        width: int,
        out: int,
        window: int,
        alibi: bool = False,
        pad_heads: bool = False,
    ):
        super().__init__()
        self.num_heads = max(heads for heads in range(1, 17) if width % heads == 0)
        head = width // self.num_heads
        key = 1 << (head - 1).bit_length() if pad_heads else head
        self.parts = [self.num_heads * size for size in (key, key, head)]
        self.scale = head**-0.5
        self.window, self.alibi = window, alibi
        self.qkv = nn.Linear(width, sum(self.parts), bias=False)
        self.proj = nn.Linear(width, out)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``[B, h, w, out]``."""
        parts = self.qkv(tokens).split(self.parts, dim=-1)
        heads = "b h w (heads d) -> b heads h w d"
        query, key, value = (rearrange(part, heads, heads=self.num_heads) for part in parts)
        seen = local_attention(query, key, value, self.window, self.alibi, self.scale)
        out: Tensor = self.proj(rearrange(seen, "b heads h w d -> b h w (heads d)"))
        return out


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    alibi: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attend to the ``window x window`` cells around each cell.

    Args:
        query: ``[B, heads, h, w, d]``; any strides, best where memory runs b, h, w, heads, d.
        key: like ``query``.
        value: ``[B, heads, h, w, e]``.
        window: odd, 1 to 11; it may exceed the grid.
        alibi: subtract ``slope * distance`` from the logits, see :func:`alibi_slopes`.
        scale: of the logits; ``d ** -0.5`` if None.

    Returns:
        ``[B, heads, h, w, e]``. A NaN shows in all cells whose window has it and may show in those
        of the blocks around, so up to ``window // 2`` cells and a block away; in no other image.
    """
    if window == 1:
        return value
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    return _blocks(query, key, value, window // 2, alibi)


def alibi_slopes(num_heads: int) -> Tensor:
    """Return ``[2, heads]``: what a row and a column of distance cost, 1/2, 1/2, 1/4, 1/4, ..."""
    head = torch.arange(num_heads)
    slopes = 2.0 ** -((head + 2) // 2)
    return torch.stack([slopes * (head % 2 == 0), slopes * (head % 2 == 1)])


def _slopes(query: Tensor, alibi: bool) -> Tensor:
    """Return ``[2, heads]``, or zeros ``[2, 1]``; powers of two are exact in 16 bits too."""
    slopes = alibi_slopes(query.shape[1]) if alibi else torch.zeros(2, 1)
    return slopes.to(query.device, query.dtype)


def _axis_bias(queries: Tensor, keys: Tensor, length: int, radius: int, slopes: Tensor) -> Tensor:
    """Return what one axis adds to the logits, ``[*, heads or 1, q, k]``, for places ``[*, q]``.

    The window is a square and ALiBi's distances add up, so the biases of both axes do.
    """
    distance = (queries[..., None, :, None] - keys[..., None, None, :]).abs()
    nowhere = ((keys < 0) | (keys >= length))[..., None, None, :]
    bias = -slopes[:, None, None] * distance
    return bias.masked_fill(nowhere | (distance > radius), -torch.inf)


def _blocks(q: Tensor, k: Tensor, v: Tensor, radius: int, alibi: bool) -> Tensor:
    height, width = q.shape[2:4]
    largest = _largest_side(q, radius)
    ny, nx = num = (ceil(height / largest), ceil(width / largest))
    side = (ceil(height / ny), ceil(width / nx))
    slopes = _slopes(q, alibi)
    rows = _block_bias(ny, side[0], height, radius, slopes[0])
    columns = _block_bias(nx, side[1], width, radius, slopes[1])
    # On a CPU one row of blocks at a time, whose copies stay in its cache.
    band = ny if q.is_cuda else 1
    queries, keys, values = (
        _cut(part, num, side, rim).split(band, dim=1)
        for part, rim in ((q, 0), (k, radius), (v, radius))
    )
    bands = zip(queries, keys, values, rows.split(band), strict=True)
    out = [_attend(*parts, columns) for parts in bands]
    return rearrange(torch.cat(out, dim=1)[:, :height, :width], "b h w heads d -> b heads h w d")


def _largest_side(query: Tensor, radius: int) -> int:
    """Return the most queries along a block: measured on a CPU, assumed for a GPU."""
    return 8 if query.is_cuda or radius > 3 else 6


def _block_bias(num: int, side: int, length: int, radius: int, slopes: Tensor) -> Tensor:
    """Return ``[num, heads or 1, side, side + 2 * radius]`` for the blocks along an axis."""
    starts = torch.arange(num, device=slopes.device)[:, None] * side
    # Queries beyond the border are cut off in the end. Counted as the last one they have keys, so
    # their softmax is finite; else its gradient would be NaN.
    queries = (starts + torch.arange(side, device=slopes.device)).clamp(max=length - 1)
    keys = starts + torch.arange(-radius, side + radius, device=slopes.device)
    return _axis_bias(queries, keys, length, radius, slopes)


def _cut(x: Tensor, num: Size, side: Size, rim: int) -> Tensor:
    """Pad and view ``[B, heads, h, w, d]`` as blocks with rims, ``[B, ny, nx, heads, d, y, x]``."""
    bottom, right = (n * s - length for n, s, length in zip(num, side, x.shape[2:4], strict=True))
    x = rearrange(x, "b heads h w d -> b h w heads d")
    x = F.pad(x, (0, 0, 0, 0, rim, rim + right, rim, rim + bottom))
    return x.unfold(1, side[0] + 2 * rim, side[0]).unfold(2, side[1] + 2 * rim, side[1])


def _attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Attend within blocks as :func:`_cut` makes them; returns cells ``[B, h, w, heads, d]``."""
    batch, ny, nx, _, _, height, _ = q.shape
    bias = rearrange(
        rows[:, None, :, :, None, :, None] + columns[None, :, :, None, :, None, :],
        "ny nx heads y x ky kx -> (ny nx) heads (y x) (ky kx)",
    )
    cells = "b ny nx heads d y x -> (b ny nx) heads (y x) d"
    q, k, v = (rearrange(part, cells) for part in (q, k, v))
    if q.is_cuda or q.dtype == torch.float16:  # fp16 logits could overflow; here they are fp32
        bias = bias.repeat(batch, 1, 1, 1)
        out = F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)
    else:  # torch's fused kernel for CPUs takes twice as long on blocks this small
        logits = (q @ k.transpose(-2, -1)).unflatten(0, (batch, -1))
        logits += bias
        out = logits.softmax(-1).flatten(0, 1) @ v
    return rearrange(
        out, "(b ny nx) heads (y x) d -> b (ny y) (nx x) heads d", ny=ny, nx=nx, y=height
    )
