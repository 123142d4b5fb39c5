"""Losses of probes on frozen features, in float32: what published probes are trained with.

Maps are ``[B, C, H, W]``. Where published code has a mistake that is in published numbers,
``as_published=True`` repeats it.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .metrics import IGNORED

_EPS = 1e-3  # metres, so that no logarithm is of zero
_STRIDES = (1, 2, 4, 6)


def depth_from_bins(logits: Tensor, near: float = 1e-3, far: float = 10.0) -> Tensor:
    """Return the depth that bins vote for, ``[B, 1, H, W]`` in metres (AdaBins, DINOv2, Probe3D).

    Bins are evenly spaced in [near, far]; their weights are relu(x) + 0.1, to a sum of one.

    Args:
        logits: ``[B, bins, H, W]``.
        near: depth of the first bin, in metres.
        far: depth of the last bin.
    """
    weights = F.relu(logits) + 0.1
    bins = torch.linspace(near, far, logits.shape[1], device=logits.device)
    depth = torch.einsum("bkhw,k->bhw", weights / weights.sum(dim=1, keepdim=True), bins)
    return depth[:, None]


def _log_difference(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return g = log(p + eps) - log(t + eps), zero where t is not known, and what is known."""
    known = target > 0
    return ((prediction + _EPS).log() - (target + _EPS).log()).where(known, 0.0), known


def sig_loss(prediction: Tensor, target: Tensor, variance_focus: float = 0.85) -> Tensor:
    """Return √(mean g² - λ·(mean g)²), g the difference of logarithms (Eigen et al. 2014).

    Args:
        prediction: ``[B, 1, H, W]`` metres, positive.
        target: ``[B, 1, H, W]`` metres, 0 where not known.
        variance_focus: λ.
    """
    difference, known = _log_difference(prediction, target)
    count = known.sum().clamp(min=1)
    mean, squared = difference.sum() / count, difference.square().sum() / count
    # A root has no gradient at zero, where all is right.
    return (squared - variance_focus * mean.square()).clamp(min=1e-12).sqrt()


def gradient_loss(prediction: Tensor, target: Tensor, as_published: bool = False) -> Tensor:
    """Return how unlike the slopes of two depth maps are, at strides 1, 2, 4 and 6.

    At each stride, the sum of |Δg| over pairs two pixels apart that are both known, over the number
    of known pixels; g is the difference of logarithms.

    Args:
        prediction: ``[B, 1, H, W]`` metres, positive.
        target: ``[B, 1, H, W]`` metres, 0 where not known.
        as_published: slice batch and channels in place of height and width, as Probe3D did up to
            14 November 2025: the "slope" is then between *images* two apart in the batch.
    """
    axes = (0, 1) if as_published else (2, 3)
    total = prediction.new_zeros(())
    for stride in _STRIDES:
        index = tuple(slice(None, None, stride if axis in axes else None) for axis in range(4))
        difference, known = _log_difference(prediction[index], target[index])
        count = known.sum().clamp(min=1)
        for axis in axes:
            length = difference.shape[axis] - 2
            if length > 0:
                step = difference.narrow(axis, 0, length) - difference.narrow(axis, 2, length)
                both = known.narrow(axis, 0, length) & known.narrow(axis, 2, length)
                total = total + (step.abs() * both).sum() / count
    return total


def depth_loss(prediction: Tensor, target: Tensor, as_published: bool = False) -> Tensor:
    """Return 10 times :func:`sig_loss` and half of :func:`gradient_loss` (Probe3D, DINOv2)."""
    return 10 * sig_loss(prediction, target) + gradient_loss(prediction, target, as_published) / 2


def uncertain_angular_loss(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Return the negative log-likelihood of normals under the angular von Mises distribution.

    mean of log(1 + e^(-κπ)) - log(1 + κ²) + κ·angle, κ = elu(x₄) + 1.01 (Bae et al. 2021,
    arXiv 2109.09881, eq. 6, as Probe3D has it).

    Args:
        prediction: ``[B, 4, H, W]``: normal of any length, and x₄, how sure.
        target: ``[B, 3, H, W]``.
        valid: ``[B, H, W]`` bool.
    """
    kappa = (F.elu(prediction[:, 3]) + 1.01)[valid]
    angle = _angle(prediction, target)[valid]
    return (torch.log1p((-kappa * math.pi).exp()) - torch.log1p(kappa**2) + kappa * angle).mean()


def _angle(prediction: Tensor, target: Tensor) -> Tensor:
    """Angle in radians, ``[B, H, W]``; the arc cosine has no gradient at 1, so it is kept off."""
    cosine = F.cosine_similarity(prediction[:, :3], target, dim=1)
    return cosine.clamp(-1 + 1e-7, 1 - 1e-7).acos()


def balanced_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return binary cross-entropy in which positives weigh the share of negatives in the batch.

    The weights do not sum to one: the mean is over pixels (Xie and Tu 2015; saliency in MLoRE).

    Args:
        logits: log-odds, of any shape; of two classes, the difference of theirs.
        target: of the same shape: 1, 0 or IGNORED.
    """
    known = target != IGNORED
    positive = (target[known] == 1).to(logits.dtype)
    return weighted_cross_entropy(logits[known], positive, 1 - positive.mean())


def weighted_cross_entropy(
    logits: Tensor, positive: Tensor, weight: float | Tensor = 0.95
) -> Tensor:
    """Return the mean of -w·y·log p - (1-w)·(1-y)·log(1-p), p = sigmoid(x): the "edge loss".

    Args:
        logits: log-odds of an edge, of any shape.
        positive: 1 or 0, in floating point.
        weight: w of positives: 0.95 in InvPT, 0.925 (Pascal) and 0.88 (NYUD) in MLoRE.
    """
    hit, miss = positive * F.logsigmoid(logits), (1 - positive) * F.logsigmoid(-logits)
    return -(weight * hit + (1 - weight) * miss).mean()


def normal_l1_loss(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Return the L1 distance of the prediction, brought to unit length, summed over channels.

    Args:
        prediction: ``[B, 3, H, W]``, of any length.
        target: ``[B, 3, H, W]``.
        valid: ``[B, H, W]`` bool, pixels that the mean is over.
    """
    return (F.normalize(prediction, dim=1) - target).abs().sum(dim=1)[valid].mean()


def depth_l1_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean of |p - t| in metres, over pixels whose target is known (not 0)."""
    return (prediction - target).abs()[target > 0].mean()
