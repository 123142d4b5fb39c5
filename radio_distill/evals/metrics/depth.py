"""Depth in metres: errors of single images, with and without alignment, and of a whole set.

Four programs call four different numbers "NYU depth rmse": pooled over all pixels below 80 m
(:class:`PooledDepth`, the multi-task field), the mean over images in the Eigen crop below 10 m
(:func:`depth_errors` with :func:`eigen_crop`, DINOv2 and DINOv3), the mean over square crops and,
after alignment, of relative depth (both Probe3D). They never belong in one table.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .sums import Sums


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
    log10: Tensor
    """Mean of |log₁₀ p - log₁₀ t|."""
    rmse_log: Tensor
    """Root of the mean of (log p - log t)²."""
    silog: Tensor
    """100 times the standard deviation of log p - log t."""
    sq_rel: Tensor
    """Mean of (p - t)²/t."""
    mae: Tensor
    """Mean of |p - t|, in metres."""


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
    error, log_error = prediction - target, positive.log() - target.log()
    return DepthErrors(
        d1=mean((ratio < 1.25).double()),
        d2=mean((ratio < 1.25**2).double()),
        d3=mean((ratio < 1.25**3).double()),
        abs_rel=mean(error.abs() / target),
        rmse=mean(error.square()).sqrt(),
        log10=mean(log_error.abs()) / math.log(10),
        rmse_log=mean(log_error.square()).sqrt(),
        silog=100 * (mean(log_error.square()) - mean(log_error).square()).clamp(min=0).sqrt(),
        sq_rel=mean(error.square() / target),
        mae=mean(error.abs()),
    )


def align_scale_and_shift(
    prediction: Tensor, target: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Return ``a * prediction + b`` with the least squared error to ``target``, per image.

    With it depth is judged up to scale and shift (MiDaS, arXiv 1907.01341; "scale-invariant" in
    Probe3D). An image whose prediction is constant is left as it is.

    Args:
        prediction: ``[B, H, W]``.
        target: ``[B, H, W]``, 0 where not known.
        valid: pixels that count; by default those with a target.
    """
    weight = ((target > 0) if valid is None else (target > 0) & valid).double()
    p, t = prediction.double(), target.double()

    def total(values: Tensor) -> Tensor:
        return (weight * values).sum(dim=(1, 2), keepdim=True)

    count, p1, t1, pp, pt = (
        total(torch.ones_like(p)),
        total(p),
        total(t),
        total(p * p),
        total(p * t),
    )
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
    """Errors over all pixels of a set with a target between 0 and ``far`` (NYUDv2 as in MLoRE).

    Args:
        far: targets from here on do not count, in metres.
        device: where the sums live.
    """

    def __init__(self, far: float = 80.0, device: torch.device | str | None = None):
        super().__init__(5, device)
        self.far = far

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add maps in metres, of any equal shape; 0 is no target."""
        known = (target > 0) & (target < self.far)
        p, t = prediction[known].to(self.sums), target[known].to(self.sums)
        error, log_error = p - t, p.clamp(min=1e-9).log() - t.log()
        terms = (torch.ones_like(t), error.square(), error.abs() / t, log_error.square())
        self.sums += torch.stack([x.sum() for x in (*terms, error.square() / t)])

    def compute(self) -> dict[str, float]:
        """Return ``rmse`` (metres), ``abs_rel``, ``rmse_log`` and ``sq_rel``."""
        squared, relative, logarithmic, squared_relative = (self.sums[1:] / self.sums[0]).tolist()
        return {
            "rmse": squared**0.5,
            "abs_rel": relative,
            "rmse_log": logarithmic**0.5,
            "sq_rel": squared_relative,
        }
