"""Depth in metres: errors of single images, with and without alignment, and of a whole set.

Four programs call four different numbers "NYU depth rmse": pooled over all pixels below 80 m
(:class:`PooledDepth`, the multi-task field), the mean over images in the Eigen crop below 10 m
(:func:`depth_errors` with :func:`eigen_crop`, DINOv2 and DINOv3), the mean over square crops and,
after alignment, of relative depth (both Probe3D). They never belong in one table.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .sums import Sums

_FAR = 80.0
"""Targets from here on do not count in :class:`PooledDepth`, in metres."""


class DepthErrors(NamedTuple):
    """Errors of each image, ``[B]`` in float64; NaN for an image without a valid pixel."""

    d1: Tensor
    """Share of pixels with max(p/t, t/p) < 1.25."""
    d2: Tensor
    """… < 1.25²."""
    d3: Tensor
    """… < 1.25³."""
    abs_rel: Tensor
    """Mean of |p - t|/t."""
    rmse: Tensor
    """Root of the mean of (p - t)², in metres."""


def depth_errors(prediction: Tensor, target: Tensor, valid: Tensor | None = None) -> DepthErrors:
    """Compare depth maps ``[B, H, W]``, image by image.

    Args:
        prediction: metres; what is not positive is wrong at every threshold.
        target: metres, 0 where not known.
        valid: ``[B, H, W]`` or ``[H, W]`` bool, pixels that count; by default those with a target.
    """
    known = target > 0 if valid is None else (target > 0) & valid
    count = known.sum(dim=(1, 2)).double()
    target = target.double().where(known, 1.0)
    prediction = prediction.double().where(known, 1.0)

    def mean(values: Tensor) -> Tensor:
        return values.where(known, 0.0).sum(dim=(1, 2)) / count

    positive = prediction.clamp(min=1e-9)
    ratio = torch.maximum(positive / target, target / positive)
    error = prediction - target
    return DepthErrors(
        d1=mean((ratio < 1.25).double()),
        d2=mean((ratio < 1.25**2).double()),
        d3=mean((ratio < 1.25**3).double()),
        abs_rel=mean(error.abs() / target),
        rmse=mean(error.square()).sqrt(),
    )


def align_scale_and_shift(prediction: Tensor, target: Tensor) -> Tensor:
    """Return ``a * prediction + b`` with the least squared error to ``target``, per image.

    With it depth is judged up to scale and shift (MiDaS, arXiv 1907.01341; "scale-invariant" in
    Probe3D). An image whose prediction is constant is left as it is.

    Args:
        prediction: ``[B, H, W]``.
        target: ``[B, H, W]``, 0 where not known.
    """
    weight = (target > 0).double()
    p, t = prediction.double(), target.double()

    def total(values: Tensor) -> Tensor:
        return (weight * values).sum(dim=(1, 2), keepdim=True)

    count, p1, t1, pp, pt = map(total, (torch.ones_like(p), p, t, p * p, p * t))
    determinant = count * pp - p1 * p1
    flat = determinant == 0
    determinant = determinant.where(~flat, 1.0)
    scale = ((count * pt - p1 * t1) / determinant).where(~flat, 1.0)
    shift = ((pp * t1 - p1 * pt) / determinant).where(~flat, 0.0)
    return (scale * p + shift).to(prediction.dtype)


def eigen_crop(height: int, width: int) -> Tensor:
    """Return which pixels lie in the crop that NYU depth is scored in, ``[H, W]`` bool.

    Rows 45 to 471 and columns 41 to 601 of 480 x 640 (Eigen et al. 2014), in proportion else.
    """
    inner = torch.zeros(height, width, dtype=torch.bool)
    rows = slice(round(height * 45 / 480), round(height * 471 / 480))
    inner[rows, round(width * 41 / 640) : round(width * 601 / 640)] = True
    return inner


class PooledDepth(Sums):
    """Root mean squared error over all pixels of a set with a target below 80 m, as in MLoRE.

    Args:
        device: where the sums live.
    """

    def __init__(self, device: torch.device | str | None = None):
        super().__init__(2, device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add maps in metres, of any equal shape; 0 is no target."""
        known = (target > 0) & (target < _FAR)
        p, t = prediction[known].to(self.sums), target[known].to(self.sums)
        self.sums += torch.stack([torch.ones_like(t).sum(), (p - t).square().sum()])

    def compute(self) -> float:
        """Return the error in metres."""
        count, squared = self.sums.tolist()
        return float((squared / count) ** 0.5)
