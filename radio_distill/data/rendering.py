"""From the pixels of one image to a view of it: crop, resize, flip.

Views are resized by torch, on uint8 and with the colours of a pixel side by side ("channels last"),
its fastest way; ``python -m benchmarks.decoding`` has the figures.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..config import DataConfig
from ..types import Size, ViewOrigin

_FLIPPED_BYTES = 2**18
"""Of a view that are mirrored at a time, so that they stay in the caches: a copy of a large view
would lie on fresh pages, which take longer than all the rest."""
_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
PIXELS = 2
"""Counts how often the pixels of views have changed from one version to the next; part of the name
of what is kept of them. 1: resized by Pillow."""


def random_origin(
    source: Size, shape: Size, config: DataConfig, generator: np.random.Generator
) -> ViewOrigin:
    """Draw a crop of an image of ``source`` pixels, perhaps flipped.

    It covers ``crop_scale`` of the area; ``crop_ratio`` is its width to height in relation to that
    of ``shape``, so that a wide view distorts no more than a square one.
    """
    flipped = generator.random() < config.flip
    return ViewOrigin(source, *_random_box(source, shape, config, generator), flipped)


def centre_origin(source: Size, shape: Size) -> ViewOrigin:
    """Return the largest crop of the aspect ratio of ``shape`` in the middle of an image."""
    return ViewOrigin(source, *_centre_box(source, shape))


def render(
    image: Tensor,
    origin: ViewOrigin,
    size: Size,
    crop: Sequence[float] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Resize a view of a photograph, or a part of it, with antialiased bicubic resampling.

    Args:
        image: the photograph, ``[3, H, W]`` uint8, channels last; of other bands likewise.
        origin: where the view lies in it.
        size: (height, width) in pixels.
        crop: (top, left, height, width) as shares of the view's height and width; None for all.
        out: where to put the pixels, such as a row of a batch; None for a tensor of their own.

    Returns:
        Pixels ``[3, *size]`` uint8, channels last.
    """
    if out is None:
        out = torch.empty((*size, len(image)), dtype=torch.uint8).permute(2, 0, 1)
    pixels = _cut(out, 0, 0, *size)
    if crop is None:
        view = _cut(image, origin.top, origin.left, origin.height, origin.width)
        if not origin.flipped:  # what F.interpolate calls, but that it knows no out
            torch.ops.aten._upsample_bicubic2d_aa.out(view, size, False, out=pixels)
            return out
        rendered = F.interpolate(view, size, mode="bicubic", antialias=True)
    else:
        bottom, right = origin.top + origin.height, origin.left + origin.width
        view = image[:, origin.top : bottom, origin.left : right]
        rendered = _render_part(view, size, crop, origin.flipped)
        rendered = _cut(rendered, 0, 0, *size)
    if not origin.flipped:
        return out.copy_(rendered[0])
    rows = max(_FLIPPED_BYTES // (len(image) * size[1]), 1)
    for top in range(0, size[0], rows):
        pixels[:, :, top : top + rows] = rendered[:, :, top : top + rows].flip(-1)
    return out


def _cut(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """Return a part of an image ``[3, H, W]`` as a batch of one, with strides of channels last.

    By one operator: each costs some microseconds after a decoding, which leaves the caches cold.
    """
    strides = image.numel(), *image.stride()
    first = image.storage_offset() + top * strides[2] + left * strides[3]
    return image.as_strided((1, len(image), height, width), strides, first)


def _render_part(view: Tensor, size: Size, crop: Sequence[float], flipped: bool) -> Tensor:
    """Resize a part of a view, with Pillow: torch knows no crops at fractions of a pixel.

    The part is one of the flipped view, where that is what will be shown.
    """
    top, left, height, width = crop
    left = 1 - left - width if flipped else left
    down, across = view.shape[1:]
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    inside = np.clip(box, 0, (across, down, across, down))  # a rounding error may lead out

    def resized(pixels: Tensor) -> Tensor:
        whole = Image.fromarray(pixels.numpy())
        part = whole.resize((size[1], size[0]), Image.Resampling.BICUBIC, tuple(inside.tolist()))
        return torch.from_numpy(np.array(part))

    if len(view) != 3:  # Pillow has no image of any number of bands
        return torch.stack([resized(band.contiguous()) for band in view], -1).permute(2, 0, 1)
    return resized(view.permute(1, 2, 0)).permute(2, 0, 1)


def to_float(pixels: Tensor) -> Tensor:
    """Bring uint8 pixels to float32 in [0, 1], where they lie, each colour a plane of its own."""
    assert pixels.dtype == torch.uint8, str(pixels.dtype)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _random_box(
    source: Size, size: Size, config: DataConfig, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) as in Inception's crop; the centre where none fits."""
    area, aspect = source[0] * source[1], size[1] / size[0]
    low, high = map(math.log, config.crop_ratio)
    for _ in range(_CROP_ATTEMPTS):
        covered = area * _between(*config.crop_scale, generator)
        ratio = aspect * math.exp(_between(low, high, generator))
        height, width = round(math.sqrt(covered / ratio)), round(math.sqrt(covered * ratio))
        if 0 < height <= source[0] and 0 < width <= source[1]:
            top = int(generator.random() * (source[0] - height + 1))
            left = int(generator.random() * (source[1] - width + 1))
            return top, left, height, width
    return _centre_box(source, size)


def _between(low: float, high: float, generator: np.random.Generator) -> float:
    return low + (high - low) * generator.random()


def _centre_box(source: Size, size: Size) -> tuple[int, int, int, int]:
    scale = min(source[0] / size[0], source[1] / size[1])
    height, width = (max(1, round(side * scale)) for side in size)
    return (source[0] - height) // 2, (source[1] - width) // 2, height, width
