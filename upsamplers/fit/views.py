"""Random views of an image, and of its features: what fitting by multi-view consistency compares.

An upsampler is fitted by showing a teacher other views of an image and asking that the upsampled
features, seen in the same view and downsampled, be what the teacher answers (FeatUp, arXiv
2403.10516, section 3). Each view is one homography, from points of the view to points of the
image (:mod:`radio_distill.geometry`). Outside the image a view shows the image's mirror image, to
the teacher less strange than black; :func:`~radio_distill.geometry.valid_mask` says which cells of
a view have none of it.

Left out: FeatSharp's tracking of polygons; a cell is valid or it is not. And the four free corners
of a general perspective: two numbers tilt the image, the other degrees of freedom are those of
scale, rotation and shift but for a shear of a few percent.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from radio_distill.errors import ConfigError
from radio_distill.geometry import warp
from radio_distill.types import Size


@dataclass(frozen=True)
class ViewRange:
    """How far random views may go; the defaults are the image itself. Raises ConfigError."""

    scale: tuple[float, float] = (1.0, 1.0)
    """Least and largest magnification, drawn log-uniformly; at 2, half of each side is seen."""
    scale_chance: float = 1.0
    """Share of the views that are scaled at all."""
    shift: float = 0.0
    """How far an upright view may reach beyond each edge, in sides of the image."""
    flip: float = 0.0
    """Share of the views that are mirrored left to right."""
    rotation: float = 0.0
    """Largest angle, in degrees, either way."""
    perspective: float = 0.0
    """Largest tilt about either axis; 0.05 moves a corner by up to about 5 % of the side."""

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high:
            raise ConfigError(f"views.scale is {self.scale}; write (least, largest), above 0")
        for name, most in (("scale_chance", 1), ("shift", 1), ("flip", 1), ("rotation", 180)):
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"views.{name} is {getattr(self, name)}; write 0 to {most}")
        if not 0 <= self.perspective <= 0.25:  # at 0.5 a corner of the view is at infinity
            raise ConfigError(f"views.perspective is {self.perspective}; write 0 to 0.25")


VIEWS = {
    # FeatUp's released JBU recipe: 20 of 224 pixels of padding, half of the views zoomed, up to
    # 2x (its Table 7 has 30 pixels).
    "featup": ViewRange(scale=(1.0, 2.0), scale_chance=0.5, shift=20 / 224, flip=0.5),
    # FeatSharp (arXiv 2502.16025), Table 11, names the kinds; the strengths are those of its
    # released code, but for flip (it never flips) and shift (a crop in whole patches; FeatUp's
    # here). What it does to an image and all its views alike is left to the data.
    "featsharp": ViewRange(
        scale=(0.95, 1 / 0.95), shift=20 / 224, flip=0.5, rotation=5.0, perspective=0.05
    ),
}
"""The published strengths, by name."""


def draw_homographies(
    num: int, ranges: ViewRange, generator: np.random.Generator, aspect: float = 1.0
) -> Tensor:
    """Draw ``[num, 3, 3]`` fp32 homographies, from points of a view to points of the image.

    Each takes eight uniform numbers of ``generator`` and nothing else, so the first n of a longer
    draw are those of a shorter one, and with Philox a view is a function of seed and position.

    Args:
        num: how many, one a view.
        ranges: how far they go.
        generator: where chance comes from.
        aspect: width over height of images and views in pixels, for rotations without shear.
    """
    chance, zoom, x, y, flip, angle, tilt_x, tilt_y = generator.random((num, 8)).T
    low, high = np.log(ranges.scale)
    extent = np.exp(-np.where(chance < ranges.scale_chance, low + (high - low) * zoom, 0.0))
    reach = np.maximum(1 + 2 * ranges.shift - extent, 0)
    radians = np.deg2rad(ranges.rotation) * (2 * angle - 1)
    cos, sin = extent * np.cos(radians), extent * np.sin(radians)
    mirror = np.where(flip < ranges.flip, -1.0, 1.0)

    views = np.zeros((num, 3, 3))  # mirrored, then turned, shrunk and moved
    views[:, 0] = np.stack([mirror * cos, -sin / aspect, reach * (2 * x - 1)], axis=1)
    views[:, 1] = np.stack([mirror * sin * aspect, cos, reach * (2 * y - 1)], axis=1)
    views[:, 2, 2] = 1
    tilts = np.tile(np.eye(3), (num, 1, 1))
    tilts[:, 2, :2] = ranges.perspective * (2 * np.stack([tilt_x, tilt_y], axis=1) - 1)
    return torch.from_numpy(views @ tilts).float()


def render(images: Tensor, homographies: Tensor, size: Size) -> Tensor:
    """Render views ``[B * V, C, *size]`` of images ``[B, C, H, W]``, coarser ones antialiased.

    A view coarser than its image is sampled finer than asked, then averaged: at least twice a
    side, and no more than two pixels of the image apart. The whole image at 1/2 or 1/4 is
    exactly its average pooling; random views of photographs at 1/2 to 1/4 came within 1.3 / 255 rms
    of the mean over each pixel's area (sampled once: 3 to 7), at a quarter of its price.

    Args:
        images: ``[B, C, H, W]``.
        homographies: ``[B * V, 3, 3]``, the V views of an image one after the other.
        size: height and width of each view, in pixels.
    """
    height, width = images.shape[-2:]
    ratio = max(height / size[0], width / size[1])
    finer = max(2, math.ceil(ratio / 2)) if ratio > 1 else 1
    views = warp(images, homographies, (size[0] * finer, size[1] * finer))
    return views if finer == 1 else F.avg_pool2d(views, finer)
