"""What a student is asked for: the weighted sum of its distances to all teachers.

Each term compares one teacher's summary or features with what the student's head predicts, after
:mod:`.alignment` has brought both maps to one grid, by one of :mod:`.distances`. Images stay apart
until the end, so that micro-batches of unequal size can be weighted exactly.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import LossConfig, StudentConfig
from ..errors import ConfigError
from ..types import FEATURES, SUMMARY, Features
from .alignment import align
from .distances import feature_loss, summary_loss
from .views import warp_to_student

KINDS = (SUMMARY, FEATURES)
"""A term is called ``teacher/kind``."""
INNER = "inner"
"""The part of a term of features that inner blocks have."""


class LossReport(NamedTuple):
    """The loss of a batch, and what it is made of."""

    total: Tensor
    """``[B]``: of each image, the weighted sum over terms."""
    terms: dict[str, Tensor]
    """Unweighted mean of each term over the batch, detached, as ``teacher/kind``."""


def distillation_loss(
    predictions: Mapping[str, Features],
    targets: Mapping[str, Features],
    losses_of: Mapping[str, LossConfig],
    weights: Mapping[str, float],
    shifts: Mapping[str, Tensor | None] | None = None,
    log_variances: Mapping[str, Tensor] | None = None,
    survivors: "Survivors | None" = None,
    mean_cells: Mapping[str, float] | None = None,
    inner: Mapping[str, Sequence[tuple[float, Tensor]]] | None = None,
) -> LossReport:
    """Compare a student with all its teachers.

    The total is the sum over terms of weight times loss. It is not divided by the number of
    teachers, so adding one does not weaken the others, as in the PHI-S recipe. A target without
    summary has no summary term, and a term of weight 0 is not computed.

    Args:
        predictions: of the student, by teacher.
        targets: of the teachers.
        losses_of: each teacher's losses (:attr:`..stage.Stage.losses`).
        weights: by term.
        shifts: how far the student's crop lies behind a teacher's
            (:func:`.views.warp_to_student`); the features are then compared where both crops show
            the image.
        log_variances: learned ones of each term, where weights are learned.
        survivors: who is not dropped, where teachers are.
        mean_cells: by teacher, the cells that an image of the step is compared at, on average;
            given where each cell counts alike (``loss.reduction: token``).
        inner: by teacher, what inner blocks of the student predict of its map, with the weights of
            those losses; they are part of the term of its features, and reported apart.

    Raises:
        ConfigError: where all weights are 0, or the alignment rule does not suit the grids.
    """
    assert predictions.keys() == targets.keys(), f"{set(predictions) ^ set(targets)} unmatched"
    losses: dict[str, Tensor] = {}  # [B]
    reported: dict[str, Tensor] = {}
    for name, target in targets.items():
        prediction = predictions[name]
        if weights[f"{name}/{SUMMARY}"] and target.summary is not None:
            assert prediction.summary is not None, f"no summary predicted for teacher {name}"
            loss = summary_loss(losses_of[name])(prediction.summary, target.summary)
            losses[f"{name}/{SUMMARY}"] = loss
        if weights[f"{name}/{FEATURES}"]:
            shift = None if shifts is None else shifts[name]
            asked = [(1.0, prediction.spatial), *(inner or {}).get(name, ())]
            parts = []
            for weight, spatial in asked:
                loss, cells = _compare_maps(spatial, target.spatial, losses_of[name], shift)
                if mean_cells is not None:
                    # Shifted crops may have no cell of a coarse map in common: then no image does.
                    loss = loss * (cells / (mean_cells[name] or 1.0))
                parts.append(weight * loss)
            losses[f"{name}/{FEATURES}"] = torch.stack(parts).sum(0)
            reported[f"{name}/{FEATURES}"] = parts[0].detach().mean()
            if parts[1:]:
                reported[f"{name}/{INNER}"] = torch.stack(parts[1:]).sum(0).detach().mean()
    if not losses:
        raise ConfigError(
            f"teachers {', '.join(targets)}: every loss weight is 0, nothing to learn; "
            "set a summary_weight or feature_weight, or leave them out of the partition"
        )
    terms = {name: loss.detach().mean() for name, loss in losses.items()} | reported
    if log_variances is not None:
        losses = {name: uncertain(loss, log_variances[name]) for name, loss in losses.items()}
    if survivors is not None:
        return LossReport(_of_survivors(losses, weights, survivors), terms)
    total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum(0)
    return LossReport(total, terms)


def weighted_inner(
    inner: Mapping[str, Sequence[Tensor]], student: StudentConfig
) -> dict[str, list[tuple[float, Tensor]]]:
    """Put the recipe's weights beside what inner blocks predict of each teacher's map."""
    return {
        name: list(zip(student.heads_of(name).inner.values(), maps, strict=True))
        for name, maps in inner.items()
    }


class Survivors(NamedTuple):
    """Which teachers stay for each image beside the one whose loss is largest there."""

    others: Tensor
    """``[T - 1, B]`` bool, of the others in their order: drawn without a look at the losses, so
    that their number is known before any loss is."""
    scale: float
    """Images of the partition over the teachers that stay for all of them together."""


def _of_survivors(
    losses: Mapping[str, Tensor], weights: Mapping[str, float], survivors: Survivors
) -> Tensor:
    """Return each image's part of the mean loss of the teachers that stay, ``[B]``.

    UNIC (arXiv 2408.05088): the teacher with the largest loss stays, each other by chance; all
    coefficients are divided by their sum over teachers and images. So an image for which few stay
    weighs less, as in its code.
    """
    by_teacher: dict[str, Tensor] = {}
    for name, loss in losses.items():
        teacher = name.partition("/")[0]
        by_teacher[teacher] = by_teacher.get(teacher, 0) + weights[name] * loss
    stacked = torch.stack(list(by_teacher.values()))  # [T, B]
    assert len(survivors.others) == len(stacked) - 1, "each teacher has a loss"
    if len(stacked) == 1:
        return stacked[0]
    rows = torch.arange(len(stacked), device=stacked.device)[:, None]
    largest = stacked.detach().argmax(0)  # [B]
    row_of_other = (rows - (rows > largest).long()).clamp(max=len(stacked) - 2)
    stays = (rows == largest) | survivors.others.gather(0, row_of_other)
    return survivors.scale * (stacked * stays).sum(0)


def _compare_maps(
    predicted: Tensor, wanted: Tensor, config: LossConfig, shift: Tensor | None
) -> tuple[Tensor, Tensor | int]:
    """Return the loss of each image, ``[B]``, and the number of cells that it is taken at."""
    predicted, wanted = align(predicted, wanted, config.alignment, config.interpolation)
    loss = feature_loss(config)
    if shift is None:
        return loss(predicted, wanted), wanted.shape[-2] * wanted.shape[-1]
    wanted, cells = warp_to_student(wanted, shift)
    return loss(predicted, wanted, cells), cells.sum((1, 2))


def uncertain(loss: Tensor, log_variance: Tensor) -> Tensor:
    """Return losses ``[B]`` weighted by a learned ``log_variance`` b: e^-b · loss + softplus(b).

    :class:`..models.heads.Uncertainty` learns b.

    AM-RADIO, equation 6. Kendall et al. have b in place of softplus(b), and half of both parts;
    softplus stops rewarding b well below 0, so that weights above 1 grow more slowly.
    """
    log_variance = log_variance.to(loss)
    return torch.exp(-log_variance) * loss + F.softplus(log_variance)
