"""Strided: dense features of a teacher by showing it the image at ``factor ** 2`` shifts.

Amir et al. (arXiv 2112.05814) let a ViT's patches overlap by a smaller stride. From outside the
teacher the same cells come from shifting the image instead and interleaving the maps: each fine
cell is taken from the copy that has a patch centred on it. It differs in that a patch attends to
those of its own copy only, and that position embeddings stay as they were trained.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from radio_distill.distill.views import resize
from radio_distill.protocols import Teacher
from radio_distill.types import Features, Size

from . import tiling


@dataclass(frozen=True)
class Strided(tiling.Method):
    """Encode the whole image for its summary and the shifted copies for the map."""

    def __call__(self, teacher: Teacher, pixels: Tensor, grid: Size) -> Features:
        """Return features with spatial ``[B, C, *grid]``; ConfigError for a grid that cannot be."""
        if self.factor == 1:
            return tiling.encode_low(teacher, pixels, grid, 1, self.micro_batch)
        whole = resize(pixels, tiling.low_resolution(teacher, grid, self.factor))
        shifts = offsets(teacher.spec.patch_size, self.factor)
        rows = [shift(whole, down, dim=2) for down in shifts]
        copies = [shift(row, right, dim=3).clamp(0, 1) for row in rows for right in shifts]
        images = torch.cat([whole, *copies])  # [(1 + f * f) * B, 3, H', W']
        summary, spatial = tiling.encode(teacher, images, grid, self.micro_batch)
        batch = len(pixels)
        cells = "(i j b) c h w -> b c (h i) (w j)"
        fine = rearrange(spatial[batch:], cells, i=self.factor, j=self.factor)
        low_summary = None if summary is None else summary[:batch]
        return Features(low_summary, fine.contiguous(memory_format=torch.channels_last))


def offsets(patch_size: int, factor: int) -> list[float]:
    """Return how far from a patch's centre its fine cells' centres lie, in pixels.

    Fine cell i of a patch that begins at 0 is centred on ``(i + 1/2) * patch / factor``, the patch
    on ``patch / 2``.
    """
    return [patch_size * (2 * i + 1 - factor) / (2 * factor) for i in range(factor)]


def shift(pixels: Tensor, offset: float, dim: int) -> Tensor:
    """Move the image back by ``offset`` pixels along ``dim``: pixel n shows ``n + offset``.

    Parts of a pixel are interpolated with the Catmull-Rom spline (Keys 1981, a = -1/2), which
    leaves a linear ramp a ramp; whole pixels are copied. The edge is repeated.
    """
    whole = math.floor(offset)
    part = offset - whole
    index = torch.arange(pixels.shape[dim], device=pixels.device) + whole
    last = pixels.shape[dim] - 1

    def tap(step: int) -> Tensor:
        return pixels.index_select(dim, (index + step).clamp(0, last))

    if part == 0:
        return tap(0)
    weights = _catmull_rom(part)
    return sum((tap(step - 1) * weights[step] for step in range(1, 4)), tap(-1) * weights[0])


def _catmull_rom(part: float) -> tuple[float, float, float, float]:
    """Return the weights of the samples at -1, 0, 1 and 2 for a point at ``part`` of [0, 1]."""
    square, cube = part**2, part**3
    return (
        (-cube + 2 * square - part) / 2,
        (3 * cube - 5 * square + 2) / 2,
        (-3 * cube + 4 * square + part) / 2,
        (cube - square) / 2,
    )
