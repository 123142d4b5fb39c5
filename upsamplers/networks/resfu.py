"""ReSFU: similarity of features refined by guided filtering, over directly enlarged cells.

ReSFU ("A refreshed similarity-based upsampler", arXiv 2407.02283), in the form that FeatSharp
compares itself with (arXiv 2502.16025, Table 9)::

    image ──► 1x1 ──► q ──► Gaussian ─────────────────► score of details ──┐
                      └───► guided filter ─┐                               ├─► softmax over 9
    low ────► 1x1 ──► k, interpolated ─────┴──────────► score of meaning ──┘        │
    low, interpolated ──► shifted by a low-resolution cell, 3 x 3 ways ──────────► mean

It starts at about the mean of the nine, a blur, as the paper's: with a bias that makes it bilinear
interpolation it stayed there, for all taps but one had next to no gradient. Ours differs in one
thing: the nine shifted maps are not written out. Shift and interpolation are both linear, so the
kernel over them is one over 5 x 5 low-resolution cells.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from radio_distill.errors import ConfigError

from ..methods.interpolate import enlarge
from . import Observation
from .carafe import interpolation_weights, reassemble
from .guidance import Grouped, MeanColours

_SIDE = 3  # of the shifts
_GROUPS = 4


class ReSFUNetwork(nn.Module):
    """ReSFU (arXiv 2407.02283): guided similarity of cells a coarse cell apart.

    Args:
        channels: C of the features.
        factor: f, how much finer the result is.
        embedding_channels: where image and features are compared; 32 in the paper.
        tiles: look at the stitched tiles beside the colours, FeatSharp's "ReSFU-tiled".

    Raises:
        ConfigError: tiles at factor 1, which has none.
    """

    shifted_interpolation: Tensor

    def __init__(
        self, channels: int, factor: int, embedding_channels: Grouped = 32, tiles: bool = False
    ):
        super().__init__()
        if tiles and factor < 2:
            raise ConfigError(f"resfu's tiles are of factor 2 and more; this one's is {factor}")
        self.factor = factor
        self.tile_levels: tuple[int, ...] = (factor,) if tiles else ()
        self.colours = MeanColours(factor)
        self.query = nn.Conv2d(3 + channels * tiles, embedding_channels, 1)
        self.key = nn.Conv2d(channels, embedding_channels, 1)
        for convolution in (self.query, self.key):
            nn.init.normal_(convolution.weight, std=0.02)
        self.meaning = Score(embedding_channels, factor)
        self.details = Score(embedding_channels, factor)
        self.bias = nn.Parameter(torch.zeros(_SIDE**2))
        interpolation = shifted_interpolation(factor).float()
        self.register_buffer("shifted_interpolation", interpolation, persistent=False)

    def forward(self, observation: Observation) -> Tensor:
        """Return ``[B, C, h * factor, w * factor]``."""
        low, f = observation.low, self.factor
        seen = [self.colours(observation), *(observation.tiles[x] for x in self.tile_levels)]
        query = self.query(torch.cat(seen, dim=1))
        key = enlarge(self.key(low), query.shape[-2:])
        scores = self.meaning(key, guided_filter(query, key)) + self.details(blur(query), query)
        scores = scores + rearrange(self.bias, "t -> t 1 1")
        scores = scores.masked_fill(beyond_border(scores, f), -torch.inf)  # [B, 9, f * h, f * w]
        weights = rearrange(scores.softmax(1), "b t (h i) (w j) -> b h w (i j) t", i=f, j=f)
        kernels = torch.einsum("b h w f t, f t k -> b h w f k", weights, self.shifted_interpolation)
        return reassemble(low, kernels, f)


class Score(nn.Module):
    """Score nine places around each fine cell by how two maps differ between there and here.

    ``v(x) = sum over taps of W_tap (a(x + f * tap) - b(x))``, then two pointwise layers.
    """

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.factor, width = factor, 4 * channels
        self.norm = nn.GroupNorm(8, channels)
        self.difference = nn.Conv2d(channels, width, _SIDE, dilation=factor, groups=_GROUPS)
        middle = nn.Conv2d(width, width, 1, groups=_GROUPS)
        last = nn.Conv2d(width, _SIDE**2, 1, bias=False)  # the network has one for both scores
        self.head = nn.Sequential(nn.ReLU(), middle, nn.ReLU(), nn.GroupNorm(8, width), last)
        nn.init.kaiming_normal_(self.difference.weight, mode="fan_out")
        for convolution in (middle, last):
            nn.init.normal_(convolution.weight, std=0.02)

    def forward(self, around: Tensor, here: Tensor) -> Tensor:
        """Return ``[B, 9, f * h, f * w]`` for maps a and b, ``[B, D, f * h, f * w]``."""
        padded = F.pad(self.norm(around), (self.factor,) * 4, mode="replicate")
        of_all_taps = self.difference.weight.sum((2, 3), keepdim=True)
        at_centre = F.conv2d(self.norm(here), of_all_taps, groups=_GROUPS)
        scores: Tensor = self.head(self.difference(padded) - at_centre)
        return scores


def blur(maps: Tensor) -> Tensor:
    """Blur ``[B, D, H, W]`` by a 3x3 Gaussian of one fine cell; the edge is repeated."""
    dtype = torch.promote_types(maps.dtype, torch.float32)
    line = torch.exp(-torch.arange(-1, 2, device=maps.device, dtype=dtype).square() / 2)
    line = (line / line.sum()).to(maps.dtype)
    kernel = torch.outer(line, line).expand(maps.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(maps, (1, 1, 1, 1), mode="replicate"), kernel, groups=maps.shape[1])


def guided_filter(guide: Tensor, maps: Tensor, radius: int = 8, eps: float = 1e-3) -> Tensor:
    """Filter ``maps [B, D, H, W]`` so that they have the edges of ``guide``, channel by channel.

    The fast guided filter (He and Sun, arXiv 1505.00996): a line ``slope * guide + offset`` is
    fitted within each box of half the resolution, and interpolated. Means are in float32, as
    variances are differences of them.
    """
    guide, maps = (
        each.to(torch.promote_types(each.dtype, torch.float32)) for each in (guide, maps)
    )
    small_guide, small_maps = (each[:, :, ::2, ::2] for each in (guide, maps))

    def mean(each: Tensor) -> Tensor:
        reach = radius // 2
        return F.avg_pool2d(each, 2 * reach + 1, 1, reach, count_include_pad=False)

    mean_guide, mean_maps = mean(small_guide), mean(small_maps)
    covariance = mean(small_guide * small_maps) - mean_guide * mean_maps
    slope = covariance / (mean(small_guide.square()) - mean_guide.square() + eps)
    offset = mean_maps - slope * mean_guide
    size = (guide.shape[-2], guide.shape[-1])
    return enlarge(slope, size) * guide + enlarge(offset, size)


def beyond_border(scores: Tensor, factor: int) -> Tensor:
    """Tell which taps of ``[B, 9, H, W]`` lie outside: ``[9, H, W]``."""

    def axis(length: int) -> Tensor:
        places = torch.arange(length, device=scores.device)
        taps = torch.arange(_SIDE, device=scores.device)[:, None] - _SIDE // 2
        reached = places + factor * taps
        return (reached < 0) | (reached >= length)  # [3, length]

    rows, columns = (axis(length) for length in scores.shape[-2:])
    return (rows[:, None, :, None] | columns[None, :, None, :]).flatten(0, 1)


def shifted_interpolation(factor: int) -> Tensor:
    """Return ``[f * f, 9, 25]``: what each shift of a fine cell takes of 5x5 cells around its own.

    The shifts are of whole cells, so it is the triangle of bilinear interpolation, moved.
    """
    line = interpolation_weights(factor, _SIDE)
    moved = torch.stack([F.pad(line, (tap, _SIDE - 1 - tap)) for tap in range(_SIDE)], dim=1)
    shifts = torch.einsum("i s a, j t b -> i j s t a b", moved, moved)
    return shifts.flatten(4, 5).flatten(2, 3).flatten(0, 1)
