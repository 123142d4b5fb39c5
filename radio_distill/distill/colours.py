"""Colours and sharpness of an image changed at random, alike for all encoders.

Student and teachers must see the same image. So what is drawn for an image holds for each of its
views: the grey that contrast is measured from is one of them all, and a blur is as wide in shares
of the view. Operations and their order are those of SimCLR (arXiv 2002.05709) and DINO, each as
torchvision has it; it draws the order of the four jitters too, here they follow one another.
"""

import itertools
import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import AugmentationConfig
from ..system.transfer import to_device
from ..types import Size, View

DRAWS = 9
"""Uniform numbers that an image takes."""
_LUMA = (0.2989, 0.587, 0.114)
_THRESHOLD = 128 / 255  # of pixels that solarising turns round


def is_plain(config: AugmentationConfig) -> bool:
    """Tell whether images keep the colours that they have."""
    return not any(_shares(config))


def _shares(config: AugmentationConfig) -> tuple[float, float, float, float]:
    jitter = config.jitter_share if any(config.jitter) else 0.0
    return jitter, config.grey_share, config.blur_share, config.solarise_share


def recoloured(
    views: Mapping[View, Tensor], size: Size, config: AugmentationConfig, draws: np.ndarray
) -> dict[View, Tensor]:
    """Change the colours of some images.

    Args:
        views: pixels ``[B, 3, H, W]`` in [0, 1].
        size: of the student's input, (height, width) in pixels.
        config: how much, and how often.
        draws: uniform numbers in [0, 1), ``[B, DRAWS]``.
    """
    first = next(iter(views.values()))
    device = first.device

    def rows(which: int, share: float) -> Tensor:
        return to_device(torch.from_numpy(np.flatnonzero(draws[:, which] < share)), device)

    def column(which: int, low: float, high: float) -> Tensor:
        drawn = torch.from_numpy(low + (high - low) * draws[:, which]).float()
        return to_device(drawn, device)[:, None, None, None]

    jittered, grey, blurred, solarised = itertools.starmap(rows, enumerate(_shares(config)))
    *most, turn = config.jitter
    brightness, contrast, saturation = (
        column(4 + at, max(1 - by, 0), 1 + by)[jittered] for at, by in enumerate(most)
    )
    turns = column(7, -turn, turn)[jittered]
    sigma = column(8, *config.blur_sigma)[blurred].flatten()
    bright = (first[jittered] * brightness).clamp(0, 1)
    middle = _grey(bright).mean((2, 3), keepdim=True)  # [n, 1, 1, 1]
    changed = {}
    for view, pixels in views.items():
        pixels = pixels.clone()
        bright = (pixels[jittered] * brightness).clamp(0, 1)
        contrasty = middle.lerp(bright, contrast).clamp(0, 1)
        saturated = _grey(contrasty).lerp(contrasty, saturation).clamp(0, 1)
        pixels[jittered] = turn_hue(saturated, turns) if turn else saturated
        pixels[grey] = _grey(pixels[grey]).expand_as(pixels[grey])
        scale = view.size[0] / size[0]
        pixels[blurred] = blur(pixels[blurred], sigma * scale, 3 * config.blur_sigma[1] * scale)
        bright = pixels[solarised]
        pixels[solarised] = torch.where(bright >= _THRESHOLD, 1 - bright, bright)
        changed[view] = pixels
    return changed


def _grey(pixels: Tensor) -> Tensor:
    """``[B, 3, H, W]`` to ``[B, 1, H, W]``; of other bands their mean."""
    if pixels.shape[1] != 3:
        return pixels.mean(1, keepdim=True)
    red, green, blue = pixels.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]


def turn_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of ``[B, 3, H, W]`` by ``[B, 1, 1, 1]`` of the circle; grey stays grey."""
    red, green, blue = pixels.unbind(1)
    value, which = pixels.max(1)
    chroma = value - pixels.amin(1)
    steps = torch.where(chroma > 0, chroma, 1)
    sixths = torch.where(
        which == 0,
        (green - blue) / steps,
        torch.where(which == 1, 2 + (blue - red) / steps, 4 + (red - green) / steps),
    )
    phases = torch.tensor([5.0, 3.0, 1.0]).to(pixels).view(3, 1, 1)  # of red, green, blue
    place = (sixths[:, None] + 6 * turns + phases) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(place, 4 - place).clamp(0, 1)


def blur(pixels: Tensor, sigma: Tensor, reach: float) -> Tensor:
    """Blur each of ``[B, 3, H, W]`` by a Gaussian of its ``sigma`` ``[B]``, in pixels.

    It is cut off at ``reach`` pixels; beyond its edges the image is mirrored.
    """
    count, channels, height, width = pixels.shape
    radius = min(math.ceil(reach), height - 1, width - 1)
    if not count or not radius:
        return pixels
    offsets = torch.arange(-radius, radius + 1, device=pixels.device, dtype=pixels.dtype)
    kernel = torch.softmax(-0.5 * (offsets / sigma[:, None]).square(), dim=1)  # [B, k]
    kernel = kernel.repeat_interleave(channels, 0)[:, None]  # [3B, 1, k]
    planes = F.pad(pixels, (radius,) * 4, mode="reflect").flatten(0, 1)[None]  # [1, 3B, H, W]
    planes = F.conv2d(planes, kernel[..., None], groups=len(kernel))
    planes = F.conv2d(planes, kernel[:, :, None], groups=len(kernel))
    return planes.view(count, channels, height, width)
