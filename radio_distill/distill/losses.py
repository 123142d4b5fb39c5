"""What a student is asked for: losses of summaries and of feature maps, and their weighted sum.

Each term compares one teacher's summary or features with what the student's head predicts, after
:mod:`.alignment` has brought both maps to one grid. The losses are pure functions of two tensors of
one shape. Images stay apart until the end, so that micro-batches of unequal size can be weighted
exactly. Everything is computed in float32 (float64 stays), also under autocast.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from ..config import LossConfig
from ..errors import ConfigError, UnknownNameError
from ..registry import nearest
from ..types import Features
from .alignment import align
from .views import warp_to_student

SUMMARY, FEATURES = "summary", "features"
KINDS = (SUMMARY, FEATURES)
"""A term is called ``teacher/kind``."""


class LossReport(NamedTuple):
    """The loss of a batch, and what it is made of."""

    total: Tensor
    """``[B]``: of each image, the weighted sum over terms."""
    terms: dict[str, Tensor]
    """Unweighted mean of each term over the batch, detached, as ``teacher/kind``."""


def distillation_loss(
    predictions: Mapping[str, Features],
    targets: Mapping[str, Features],
    config: LossConfig,
    weights: Mapping[str, float],
    shifts: Mapping[str, Tensor | None] | None = None,
    log_variances: Mapping[str, Tensor] | None = None,
) -> LossReport:
    """Compare a student with all its teachers.

    The total is the sum over terms of weight times loss. It is not divided by the number of
    teachers, so adding one does not weaken the others, as in the PHI-S recipe. A target without
    summary has no summary term, and a term of weight 0 is not computed.

    Args:
        predictions: of the student, by teacher.
        targets: of the teachers.
        config: which losses.
        weights: by term.
        shifts: how far the student's crop lies behind a teacher's
            (:func:`.views.warp_to_student`); the features are then compared where both crops show
            the image.
        log_variances: learned ones of each term, where weights are learned.

    Raises:
        ConfigError: where all weights are 0, or the alignment rule does not suit the grids.
    """
    assert predictions.keys() == targets.keys(), f"{set(predictions) ^ set(targets)} unmatched"
    losses: dict[str, Tensor] = {}  # [B]
    for name, target in targets.items():
        prediction = predictions[name]
        if weights[f"{name}/{SUMMARY}"] and target.summary is not None:
            assert prediction.summary is not None, f"no summary predicted for teacher {name}"
            loss = summary_loss(config.summary)(prediction.summary, target.summary)
            losses[f"{name}/{SUMMARY}"] = loss
        if weights[f"{name}/{FEATURES}"]:
            shift = None if shifts is None else shifts[name]
            losses[f"{name}/{FEATURES}"] = _compare_maps(prediction, target, config, shift)
    if not losses:
        raise ConfigError(
            f"teachers {', '.join(targets)}: every loss weight is 0, nothing to learn; "
            "set a summary_weight or feature_weight, or leave them out of the partition"
        )
    terms = {name: loss.detach().mean() for name, loss in losses.items()}
    if log_variances is not None:
        losses = {name: uncertain(loss, log_variances[name]) for name, loss in losses.items()}
    total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum(0)
    return LossReport(total, terms)


def _compare_maps(
    prediction: Features, target: Features, config: LossConfig, shift: Tensor | None
) -> Tensor:
    predicted, wanted = align(prediction.spatial, target.spatial, config.alignment)
    cells = None
    if shift is not None:
        wanted, cells = warp_to_student(wanted, shift)
    return feature_loss(config.feature)(predicted, wanted, cells)


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the squared error of ``[B, C, ...]``, averaged over C: ``[B, ...]``."""
    return (prediction - target).square().mean(1)


def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Return one minus the cosine over C of ``[B, C, ...]``: ``[B, ...]``, from 0 to 2."""
    return 1 - F.cosine_similarity(prediction, target, dim=1)


def am_radio(prediction: Tensor, target: Tensor, beta: float = 2.0) -> Tensor:
    """Return 0.9 cosine + 0.1 smooth L1 over C of ``[B, C, ...]``: ``[B, ...]``.

    AM-RADIO (arXiv 2312.06709), section 3.4. The paper gives no ``beta``, the error at which smooth
    L1 turns from quadratic to linear; 2.0 is that of NVIDIA's port of the trainer in TAO Toolkit.
    """
    smooth = F.smooth_l1_loss(prediction, target, reduction="none", beta=beta).mean(1)
    return 0.9 * cosine(prediction, target) + 0.1 * smooth


def angle(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the squared angle over C of ``[B, C, ...]``: ``[B, ...]``, from 0 to π².

    C-RADIOv4 (arXiv 2601.17237) divides it by the teacher's dispersion, see
    :mod:`radio_distill.normalize.statistics`; here it is not divided. A zero vector is at a right
    angle to every other.
    """
    # arccos(cos) has an infinite slope at 0 and π and loses half the digits there; clamping the
    # cosine, as TAO Toolkit does, gives angles below 0.0014 no gradient at all. Of unit vectors u
    # and v, |u - v| = 2 sin(θ/2) and |u + v| = 2 cos(θ/2), both exact where they are small. Their
    # slopes in atan2 are bounded, since their squares add up to 4 (to 2 where one is 0).
    u, v = (F.normalize(item, dim=1, eps=1e-8) for item in (prediction, target))
    apart = torch.linalg.vector_norm(u - v, dim=1)
    along = torch.linalg.vector_norm(u + v, dim=1)
    return (2 * torch.atan2(apart, along)).square()


_SUMMARY = {"cosine": cosine, "mse": mse, "angle": angle}
_FEATURE = {"mse": mse, "cosine": cosine, "am_radio": am_radio}


def summary_loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of ``[B, S]`` predictions and targets that gives ``[B]``, one an image."""
    pointwise = _find("summary", name, _SUMMARY)

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return pointwise(_precise(prediction), _precise(target))

    return loss


def feature_loss(name: str) -> Callable[..., Tensor]:
    """Return the loss of ``[B, C, h, w]`` predictions and targets that gives ``[B]``, one an image.

    It takes a third argument ``valid`` ``[B, h, w]``: positions that count. An image in which none
    does has loss 0.
    """
    pointwise = _find("feature", name, _FEATURE)

    def loss(prediction: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
        return _mean_over_cells(pointwise(_precise(prediction), _precise(target)), valid)

    return loss


def mesa(student: Tensor, average: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the distance of a student's ``[B, D, h, w]`` to its averaged self's: ``[B]``.

    C-RADIOv4 (arXiv 2601.17237): the squared difference after a LayerNorm without weights, averaged
    over the cells where ``valid`` ``[B, h, w]``. As in the other terms it is averaged over channels
    too, where the paper writes a sum: cells that have nothing in common are 2 apart.
    """
    ours, theirs = (
        F.layer_norm(rearrange(_precise(item), "b d h w -> b h w d"), item.shape[1:2])
        for item in (student, average)
    )
    return _mean_over_cells((ours - theirs).square().mean(-1), valid)


def _mean_over_cells(values: Tensor, valid: Tensor | None) -> Tensor:
    """Average ``[B, h, w]`` where ``valid``: ``[B]``, 0 for an image without such a cell."""
    if valid is None:
        return reduce(values, "b h w -> b", "mean")
    total = reduce(values.masked_fill(~valid, 0), "b h w -> b", "sum")
    return total / reduce(valid.to(values), "b h w -> b", "sum").clamp(min=1)


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _find(
    kind: str, name: str, known: Mapping[str, Callable[..., Tensor]]
) -> Callable[..., Tensor]:
    if name not in known:
        raise UnknownNameError(f"unknown {kind} loss {name!r} ({nearest(name, list(known))})")
    return known[name]


def uncertain(loss: Tensor, log_variance: Tensor) -> Tensor:
    """Return losses ``[B]`` weighted by a learned ``log_variance`` b: e^-b · loss + softplus(b).

    :class:`..models.heads.Uncertainty` learns b.

    AM-RADIO, equation 6. Kendall et al. have b in place of softplus(b), and half of both parts;
    softplus stops rewarding b well below 0, so that weights above 1 grow more slowly.
    """
    log_variance = log_variance.to(loss)
    return torch.exp(-log_variance) * loss + F.softplus(log_variance)
