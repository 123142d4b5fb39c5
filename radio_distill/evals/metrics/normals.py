"""Surface normals: angles, the errors of images and of a set, and normals out of depth."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .sums import Sums

THRESHOLDS = (11.25, 22.5, 30.0)
"""Degrees under which a normal counts as right (Fouhey et al. 2013)."""


def angles_between(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the angles between vectors ``[B, 3, H, W]`` of any length, in degrees ``[B, H, W]``.

    Further channels of the prediction (its certainty) are passed over.
    """
    cosine = F.cosine_similarity(prediction[:, :3], target, dim=1)
    return cosine.clamp(-1, 1).acos().rad2deg()


class NormalErrors(NamedTuple):
    """Errors of each image, ``[B]`` in float64; NaN for an image without a valid pixel."""

    d1: Tensor
    """Share of pixels under 11.25 degrees."""
    d2: Tensor
    """… under 22.5 degrees."""
    d3: Tensor
    """… under 30 degrees."""
    rmse: Tensor
    """Root of the mean squared angle, in degrees."""


def normal_errors(prediction: Tensor, target: Tensor, valid: Tensor) -> NormalErrors:
    """Compare normals ``[B, 3, H, W]``, image by image, on pixels ``valid`` ``[B, H, W]``."""
    angle = angles_between(prediction, target).double()
    count = valid.sum(dim=(1, 2)).double()

    def mean(values: Tensor) -> Tensor:
        return values.where(valid, 0.0).sum(dim=(1, 2)) / count

    d1, d2, d3 = (mean((angle < threshold).double()) for threshold in THRESHOLDS)
    return NormalErrors(d1, d2, d3, mean(angle.square()).sqrt())


class PooledNormals(Sums):
    """The mean angle over all pixels of a set."""

    def __init__(self, device: torch.device | str | None = None):
        super().__init__(2, device)

    def update(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        """Add normals ``[B, 3, H, W]``, of pixels that are ``valid`` ``[B, H, W]``."""
        angle = angles_between(prediction, target)[valid].to(self.sums)
        self.sums += torch.stack([torch.ones_like(angle).sum(), angle.sum()])

    def compute(self) -> float:
        """Return the mean in degrees."""
        count, total = self.sums.tolist()
        return float(total / count)


def normals_from_depth(depth: Tensor, focal: float, as_published: bool = False) -> Tensor:
    """Return unit normals ``[3, H, W]`` of a depth map, away from the camera; 0 where unknown.

    The mean of the four cross products of a point's differences to its neighbours left, above,
    right and below, (x right, y down, z away) about the principal point. A pixel at the rim, or
    one of whose neighbours has no depth, has no normal.

    Args:
        depth: ``[H, W]`` metres, 0 where not known.
        focal: focal length in pixels, the same in both directions.
        as_published: as Probe3D makes the truth of its NAVI normals: the principal point lies in
            the image's corner, not in its middle, which shears all points, and a neighbour without
            depth is a million metres away instead of unknown.
    """
    height, width = depth.shape
    x0, y0 = (0.0, 0.0) if as_published else (width / 2, height / 2)
    known = depth > 0
    z = depth.where(known, 1e6)
    y, x = (torch.arange(n, device=depth.device) + 0.5 for n in (height, width))
    points = torch.stack([(x - x0) / focal * z, (y - y0)[:, None] / focal * z, z])
    rows, columns = slice(1, -1), slice(1, -1)
    neighbours = (
        (rows, slice(None, -2)), (slice(None, -2), columns),
        (rows, slice(2, None)), (slice(2, None), columns),
    )  # fmt: skip
    arms = [points[:, row, column] - points[:, rows, columns] for row, column in neighbours]
    pairs = zip(arms, [*arms[1:], arms[0]], strict=True)
    inner = torch.stack([torch.linalg.cross(one, other, dim=0) for one, other in pairs]).mean(dim=0)
    usable = known[rows, columns]
    if not as_published:
        for row, column in neighbours:
            usable = usable & known[row, column]
    return F.pad(F.normalize(inner, dim=0) * usable, (1, 1, 1, 1))
