"""Parts that the methods share: resize, cut into tiles, encode everything at once, stitch.

The image is first brought to the pixels of the fine grid, then cut; so each tile has exactly the
teacher's low-resolution input size, whatever the image measured (FeatSharp, arXiv 2502.16025,
Figure 4). Tiles have neither overlap nor margin, as in the paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from radio_distill.distill.views import resize
from radio_distill.errors import ConfigError
from radio_distill.protocols import Teacher
from radio_distill.types import Features, Size


@dataclass(frozen=True)
class Method:
    """An upsampler without parameters that shows the teacher ``factor ** 2`` images more."""

    factor: int
    """How much finer the map is than the teacher's own."""
    micro_batch: int = 0
    """Teacher images in one call, tiles and copies counted; 0 for the teacher's own setting."""

    def cost(self, grid: Size) -> int:
        """Return ``1 + factor ** 2``: the whole image, for its summary, and what makes the map."""
        return 1 if self.factor == 1 else 1 + self.factor**2


def low_resolution(teacher: Teacher, grid: Size, factor: int) -> Size:
    """Return the teacher's input size, in pixels, whose grid is ``grid / factor``.

    Raises ConfigError where ``factor`` does not divide the grid.
    """
    if any(cells % factor for cells in grid):
        near = "x".join(str(max(1, round(cells / factor)) * factor) for cells in grid)
        raise ConfigError(
            f"grid {grid[0]}x{grid[1]} does not divide by upsampler.factor {factor}; nearest {near}"
        )
    height, width = (cells // factor * teacher.spec.patch_size for cells in grid)
    return height, width


def fine_grid(teacher: Teacher, size: Size, factor: int) -> Size:
    """Return the grid of an upsampled map where the teacher's input measures ``size`` pixels."""
    height, width = teacher.spec.grid(size)
    return height * factor, width * factor


def cut(pixels: Tensor, factor: int) -> Tensor:
    """Cut ``[B, 3, H, W]`` into ``factor * factor`` tiles an image, row by row."""
    return rearrange(pixels, "b c (zy h) (zx w) -> (b zy zx) c h w", zy=factor, zx=factor)


def stitch(spatial: Tensor, factor: int) -> Tensor:
    """Put the maps of tiles together: the way back of :func:`cut`."""
    return rearrange(spatial, "(b zy zx) c h w -> b c (zy h) (zx w)", zy=factor, zx=factor)


def encode(teacher: Teacher, pixels: Tensor, grid: Size, micro_batch: int) -> Features:
    """Encode in calls of at most ``micro_batch`` images; 0 leaves the batch to the teacher.

    Raises ConfigError, with the grid that was asked for, where the teacher cannot take the size.
    """
    try:
        parts = [teacher.encode(part) for part in pixels.split(micro_batch or len(pixels))]
    except ConfigError as error:
        raise ConfigError(f"no grid {grid[0]}x{grid[1]} from the upsampler: {error}") from error
    return Features.joined(parts)


def encode_low(
    teacher: Teacher, pixels: Tensor, grid: Size, factor: int, micro_batch: int
) -> Features:
    """Encode the whole image at the low-resolution size: spatial ``[B, C, *(grid / factor)]``."""
    return encode(teacher, resize(pixels, low_resolution(teacher, grid, factor)), grid, micro_batch)


class Encoded(NamedTuple):
    """Teacher output for whole images, their tiles, and further images."""

    low: Features
    """Features of the whole image: spatial ``[B, C, h, w]``."""
    tiles: dict[int, Tensor]
    """``{level: [B, C, h * level, w * level]}``, stitched."""
    further: Tensor
    """``[N, C, h, w]`` maps of the further images."""
    images: dict[int, Tensor]
    """``{level: [B, 3, *, *]}``: images before cutting, ``level`` times the teacher's input."""


def encode_with_tiles(
    teacher: Teacher,
    pixels: Tensor,
    grid: Size,
    factor: int,
    levels: Sequence[int],
    micro_batch: int,
    further: Tensor | None = None,
) -> Encoded:
    """Encode the whole image, its tiles, and further images of the same size, together.

    Args:
        teacher: the encoder.
        pixels: ``[B, 3, H, W]`` of any size.
        grid: the fine grid, ``factor`` times the teacher's.
        factor: how much finer.
        levels: for each, the image is cut into ``level * level`` tiles. Level 1 is the whole.
        micro_batch: see :func:`encode`. All images have one size, so they share these calls.
        further: ``[N, 3, H', W']`` at the low-resolution size.
    """
    size = low_resolution(teacher, grid, factor)
    cut_levels = [level for level in levels if level > 1]
    fine = {level: resize(pixels, (size[0] * level, size[1] * level)) for level in cut_levels}
    images = [resize(pixels, size)]  # [B, 3, H', W']
    images += [cut(image, level) for level, image in fine.items()]
    images.append(pixels[:0, :, :1, :1].expand(0, 3, *size) if further is None else further)
    summary, spatial = encode(teacher, torch.cat(images), grid, micro_batch)
    low, *maps, rest = spatial.split([len(part) for part in images])
    tiles = {level: stitch(part, level) for level, part in zip(cut_levels, maps, strict=True)}
    if 1 in levels:
        tiles[1] = low
    summary = None if summary is None else summary[: len(pixels)]
    return Encoded(Features(summary, low), tiles, rest, fine)
