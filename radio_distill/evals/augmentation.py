"""Random views of images together with their labels, as semantic segmentation trains on them.

::

    image, labels ─► scale ─► crop ─► flip ─► distort the colours ─► pad to the crop

As in mmsegmentation's pipeline, which RADIO, DINOv2 and DINOv3 use. Every draw is from the
generator that the caller gives, one for each position in the order of training, so that views
depend neither on processes nor on where training was interrupted.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as vision

from ..types import Size
from .metrics import IGNORED

Labels = Mapping[str, Tensor]
"""Maps of an image by name, ``[H, W]`` or ``[C, H, W]``; see ``datasets.LabelledImage.labels``."""

UNKNOWN: Mapping[str, int] = {"depth": 0, "normals": 0}
"""What a label says where nothing is known; others say IGNORED."""

_TRIES = 10


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How images are varied; see the module's text."""

    crop: Size
    fit: Size | None = None
    """Longer and shorter side that an image is made to fit in at scale 1; None: as it is."""
    scale: tuple[float, float] = (0.5, 2.0)
    most_of_one_class: float = 0.75
    """Share of a crop that one class of ``segmentation`` may cover; else it is drawn again, at most
    ten times (``cat_max_ratio``)."""
    flip: float = 0.5
    distort: bool = True
    scale_depth: bool = False
    """Divide depth by the scale: what is twice as large is half as far."""
    centred: bool = False
    """Pad on all sides; else to the right and below."""

    def __call__(
        self, pixels: Tensor, labels: Labels, random: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a view of ``[3, H, W]`` uint8 and its labels, both of the size ``crop``."""
        scale = random.uniform(*self.scale)
        height, width = pixels.shape[-2:]
        factor = scale * (self._fitting((height, width)) if self.fit else 1.0)
        size = (max(1, round(height * factor)), max(1, round(width * factor)))
        pixels, labels = resized(pixels, labels, size)
        if self.scale_depth and "depth" in labels:
            labels["depth"] = labels["depth"] / scale
        rows, columns = self._window(labels, size, random)
        pixels = pixels[:, rows, columns]
        labels = {name: label[..., rows, columns] for name, label in labels.items()}
        if random.random() < self.flip:
            pixels, labels = flipped(pixels, labels)
        if self.distort:
            pixels = distorted(pixels, random)
        return padded(pixels, labels, self.crop, self.centred)

    def _fitting(self, size: Size) -> float:
        assert self.fit is not None
        return min(max(self.fit) / max(size), min(self.fit) / min(size))

    def _window(
        self, labels: Labels, size: Size, random: np.random.Generator
    ) -> tuple[slice, slice]:
        """Draw where to crop, again where one class covers too much."""
        classes = labels.get("segmentation")
        for _ in range(_TRIES + 1):
            top, left = (
                int(random.integers(max(side - part, 0) + 1))
                for side, part in zip(size, self.crop, strict=True)
            )
            window = slice(top, top + self.crop[0]), slice(left, left + self.crop[1])
            if classes is None or self.most_of_one_class >= 1:
                break
            counts = (classes[window].flatten() - IGNORED).bincount()[1:]
            if (counts > 0).sum() > 1 and counts.max() < self.most_of_one_class * counts.sum():
                break
        return window


def resized(pixels: Tensor, labels: Labels, size: Size) -> tuple[Tensor, dict[str, Tensor]]:
    """Resize an image bilinearly, without antialias as OpenCV does, and labels to the nearest."""
    if tuple(pixels.shape[-2:]) != size:
        pixels = vision.resize(pixels, list(size), antialias=False)
    return pixels, {name: nearest(label, size) for name, label in labels.items()}


def nearest(label: Tensor, size: Size) -> Tensor:
    """Resize a map ``[..., H, W]`` to the nearest of its values."""
    if tuple(label.shape[-2:]) == size:
        return label
    rows, columns = (
        ((torch.arange(new) + 0.5) * (old / new)).long().clamp_max(old - 1)
        for new, old in zip(size, label.shape[-2:], strict=True)
    )
    return label.index_select(-2, rows).index_select(-1, columns)


def flipped(pixels: Tensor, labels: Labels) -> tuple[Tensor, dict[str, Tensor]]:
    """Mirror an image and its labels: left becomes right, also for the x of normals."""
    mirrored = {name: label.flip(-1) for name, label in labels.items()}
    if "normals" in mirrored:
        mirrored["normals"] = mirrored["normals"] * torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
    return pixels.flip(-1), mirrored


def padded(
    pixels: Tensor, labels: Labels, size: Size, centred: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Pad an image with black, and its labels with what says that nothing is known."""
    below, right = (max(want - have, 0) for want, have in zip(size, pixels.shape[-2:], strict=True))
    if not below and not right:
        return pixels, dict(labels)
    top, left = (below // 2, right // 2) if centred else (0, 0)
    sides = (left, right - left, top, below - top)
    return F.pad(pixels, sides), {
        name: F.pad(label, sides, value=UNKNOWN.get(name, IGNORED))
        for name, label in labels.items()
    }


def distorted(pixels: Tensor, random: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue of ``[3, H, W]`` uint8, each half the time.

    mmsegmentation's ``PhotoMetricDistortion``: brightness by up to 32 of 255, contrast and
    saturation by 0.5 to 1.5, hue by a tenth of the circle; contrast comes first or last.
    """
    coins = random.random(5) < 0.5
    brightness, hue = random.uniform(-32, 32), random.uniform(-0.1, 0.1)
    contrast, saturation = random.uniform(0.5, 1.5, size=2)
    if coins[0]:
        pixels = _clipped(pixels.float() + brightness)
    if coins[1] and coins[2]:
        pixels = _clipped(pixels.float() * contrast)
    if coins[3]:
        pixels = _saturated(pixels, saturation)
    if coins[4]:
        pixels = vision.adjust_hue(pixels, hue)
    if coins[1] and not coins[2]:
        pixels = _clipped(pixels.float() * contrast)
    return pixels


def _saturated(pixels: Tensor, factor: float) -> Tensor:
    """Multiply the saturation of HSV, at most to 1; hue and value stay."""
    colours = pixels.float()
    value, least = colours.amax(dim=0), colours.amin(dim=0)
    most = value / (value - least).clamp_min(1e-6)
    return _clipped(value - (value - colours) * most.clamp_max(factor))


def _clipped(pixels: Tensor) -> Tensor:
    return pixels.clamp(0, 255).byte()
