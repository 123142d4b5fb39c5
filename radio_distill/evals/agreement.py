"""Does an encoder say the same of one image at every resolution?

Each image is encoded at several sizes, the maps are brought to the grid of the smallest, and
compared position by position. Two numbers come of it:

agreement
    Mean cosine with the reference size, in %, after the mean of the reference features over *all*
    images is taken off: features of a trained encoder share a large constant part, with which any
    two positions, related or not, look alike.
mode switch
    How far that mean itself moves from the reference size to another, squared, over the variance of
    the reference features, in %; the largest over the sizes. A shift common to all images is what
    RADIOv2.5 (arXiv 2412.07679) calls mode switching.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.folder import list_images, spread
from ..types import Report, Score, Size, unheard
from .demand import Demand, at_most
from .encoder import AnyImage, Encoder, encode_shared
from .protocol import file_names, protocol_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SizeAgreement:
    """How the features at one size relate to those at the reference size."""

    size: Size
    cosine: float
    """Mean centred cosine, in [-1, 1]."""
    shift: float
    """Squared shift of the mean feature over the reference variance."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of features across resolutions; the first of ``scales`` is the reference."""

    images: str
    size: int
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    batch_size: int = 4

    name: ClassVar[str] = "agreement"
    sources: ClassVar[dict[str, str]] = {"images": "images", "size": "size"}

    def demand(self, parts: Mapping[str, int], limit: int | None = None) -> Demand:
        """Count the images at each size."""
        images = at_most(parts["images"], limit)
        sides = [round(self.size * scale) for scale in self.scales]
        return Demand(
            images=images,
            passes={(side, side): images for side in sides},
            batch=self.batch_size,
            reads=len(sides) * images,
        )

    def run(
        self, encoder: Encoder, limit: int | None = None, progress: Report = unheard
    ) -> list[Score]:
        """Score ``encoder``; one that takes a single size gets no score."""
        images = spread(list_images(self.images), limit)
        sides = [round(self.size * scale) for scale in self.scales]
        rows = across_sizes(encoder, images, sides, self.batch_size, progress)[1:]
        if not rows:
            logger.warning("agreement: %s takes one size only, no score", encoder.name)
            return []
        of = "Agreement", len(images)
        protocol = protocol_of(self, images=file_names(image.key for image in images))
        return [
            Score(self.name, "cosine", mean_cosine(rows), "%", True, *of, protocol=protocol),
            Score(
                self.name, "mode_switch", largest_shift(rows), "%", False, *of,
                headline=False, protocol=protocol,
            ),
        ]  # fmt: skip


def mean_cosine(rows: Sequence[SizeAgreement]) -> float:
    """Return the mean over sizes of their agreement with the reference, in %."""
    return 100 * sum(row.cosine for row in rows) / len(rows)


def largest_shift(rows: Sequence[SizeAgreement]) -> float:
    """Return the largest shift of any size from the reference, in %."""
    return 100 * max(row.shift for row in rows)


def across_sizes(
    encoder: Encoder,
    images: Sequence[AnyImage],
    sides: Sequence[int],
    batch_size: int = 4,
    progress: Report = unheard,
) -> list[SizeAgreement]:
    """Compare the features at each distinct size the encoder takes with those at the first.

    Images are square crops of ``sides`` pixels. The first row is the reference itself.
    """
    sizes = list(dict.fromkeys(encoder.nearest_size((side, side)) for side in sides))
    total = len(sizes) * len(images)

    def maps(index: int) -> list[Tensor]:
        return encode_shared(
            encoder,
            images,
            sizes[index],
            lambda it: it.spatial,
            batch_size,
            lambda done, _: progress(index * len(images) + done, total),
        )  # each [B, C, h, w]

    reference = maps(0)
    mean = _mean(reference)
    variance = _mean([(batch - mean[:, None, None]).square() for batch in reference]).sum()
    rows = [SizeAgreement(sizes[0], 1.0, 0.0)]
    for index in range(1, len(sizes)):
        other = maps(index)
        cosine = torch.stack([_cosine(*pair, mean) for pair in zip(other, reference, strict=True)])
        weight = torch.tensor([len(batch) for batch in other]) / len(images)
        shift = (_mean(other) - mean).square().sum() / variance
        rows.append(SizeAgreement(sizes[index], (cosine * weight).sum().item(), shift.item()))
    return rows


def _mean(batches: Sequence[Tensor]) -> Tensor:
    """Mean over images and positions, ``[C]``."""
    return torch.cat([batch.double().mean(dim=(2, 3)) for batch in batches]).mean(dim=0).float()


def _cosine(features: Tensor, reference: Tensor, mean: Tensor) -> Tensor:
    """Mean cosine of two ``[B, C, h, w]`` on the coarser grid, both less ``mean``."""
    grid = [min(sides) for sides in zip(features.shape[2:], reference.shape[2:], strict=True)]
    features, reference = (
        F.interpolate(maps, grid, mode="bilinear", antialias=True) - mean[:, None, None]
        for maps in (features, reference)
    )
    return F.cosine_similarity(features, reference, dim=1).mean()
