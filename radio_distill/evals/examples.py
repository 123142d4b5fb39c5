"""What a benchmark shows of its test beside its scores: predictions and the truth.

A benchmark whose ``run`` takes ``show`` hands it a few examples; drawing and keeping them is the
caller's (``report.examples``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.folder import spread

MOST: Final = 4
"""Images or pairs that a benchmark shows."""


@dataclass(frozen=True, slots=True)
class ShownMaps:
    """Maps that were predicted for an image, and what they should be.

    Both are of one size, by name as in ``datasets.LabelledImage.labels``: ``segmentation`` and
    ``parts`` ``[H, W]`` int64 (``metrics.IGNORED`` is no class), ``saliency`` and ``depth``
    ``[H, W]``, ``normals`` ``[3, H, W]``; and ``masks`` ``[H, W]`` int64, numbers of objects.
    """

    pixels: Tensor
    """``[3, H, W]`` uint8."""
    truth: Mapping[str, Tensor]
    prediction: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class ShownMatches:
    """Points of an image that were looked for in another; (x, y) in pixels, ``[K, 2]``."""

    source: Tensor
    """``[3, H, W]`` uint8; so is ``target``, of a size of its own."""
    target: Tensor
    points: Tensor
    """Of the source."""
    truth: Tensor
    """Where they are in the target."""
    found: Tensor
    """Where they were found."""
    within: float
    """How near to the truth is found, in pixels."""


@dataclass(frozen=True, slots=True)
class ShownBoxes:
    """Boxes of objects, ``[N, 4]`` left, top, right, bottom in pixels, and what each shows."""

    pixels: Tensor
    """``[3, H, W]`` uint8."""
    truth: Tensor
    prediction: Tensor
    truth_names: Sequence[str]
    prediction_names: Sequence[str]


Shown = ShownMaps | ShownMatches | ShownBoxes
Show = Callable[[Shown], None]


def shown_of(count: int, show: Show | None) -> list[int]:
    """Return which of ``count`` test images or pairs are shown; none where nobody looks."""
    return [] if show is None else spread(range(count), MOST)


def shown_maps(
    pixels: Tensor, truth: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
) -> ShownMaps:
    """Make an example of heads' outputs ``[1, K, h, w]``, at the size of each truth."""
    resized = {
        name: F.interpolate(output.detach().float(), truth[name].shape[-2:], mode="bilinear")[0]
        for name, output in outputs.items()
    }
    prediction = {name: _as_label(name, output).cpu() for name, output in resized.items()}
    return ShownMaps(pixels.cpu(), {name: truth[name].cpu() for name in prediction}, prediction)


def _as_label(name: str, output: Tensor) -> Tensor:
    """Return an output ``[K, H, W]`` in the form of its label."""
    if name == "normals":
        return F.normalize(output[:3], dim=0)
    if name == "depth":
        return output[0]
    return output[0].sigmoid() if name == "saliency" else output.argmax(dim=0)


def as_bytes(pixels: Tensor) -> Tensor:
    """Return pixels in [0, 1] as uint8."""
    return (pixels.detach().cpu() * 255).round().to(torch.uint8)


def shown_matches(
    views: Sequence[Tensor], points: Sequence[Tensor], within: float, most: int = 24
) -> ShownMatches:
    """Make an example of source and target ``[3, H, W]`` in [0, 1], with at most so many points.

    ``points`` are those of the source, the truth, and those that were found.
    """
    kept = spread(range(len(points[0])), most)
    source, target = map(as_bytes, views)
    asked, truth, found = (some[kept].cpu() for some in points)
    return ShownMatches(source, target, asked, truth, found, within)
