"""What the student is asked for: losses between two encoders' features, and their weighted sum.

Every loss is a mean over channels and positions and keeps the images apart, so that micro-batches
of unequal size can be weighted exactly. Everything is computed in float32 (float64 stays), also
under autocast, after :mod:`radio_distill.alignment` has brought both maps to one grid.

C-RADIOv4's angle loss is left out, and so are weights that adapt while training (AdaLoss,
uncertainty): beside PHI-S, the plain sum ranks best on average (arXiv 2410.01680).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

from .alignment import align, valid_cells
from .config import LossConfig, TeacherConfig
from .errors import ConfigError, UnknownNameError
from .registry import nearest
from .types import Features


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


_SUMMARY = {"cosine": cosine, "mse": mse}
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
        values = pointwise(_precise(prediction), _precise(target))  # [B, h, w]
        if valid is None:
            return reduce(values, "b h w -> b", "mean")
        total = reduce(values.masked_fill(~valid, 0), "b h w -> b", "sum")
        return total / reduce(valid.to(values), "b h w -> b", "sum").clamp(min=1)

    return loss


class LossReport(NamedTuple):
    """The loss of a batch, and what it is made of."""

    total: Tensor
    """``[B]``: of each image, the weighted sum over teachers."""
    terms: dict[str, Tensor]
    """Unweighted mean of each term over the batch, detached: ``teacher/summary`` and
    ``teacher/features``."""


def distillation_loss(
    predictions: Mapping[str, Features],
    targets: Mapping[str, Features],
    config: LossConfig,
    teachers: Mapping[str, TeacherConfig],
    valid: Tensor | None = None,
) -> LossReport:
    """Compare a student with all its teachers.

    The total is the sum over teachers of ``summary_weight`` times the summary loss and
    ``feature_weight`` times the feature loss. It is not divided by the number of teachers, so
    adding one does not weaken the others, as in the PHI-S recipe. A teacher without summary has no
    summary term, and a term of weight 0 is not computed. ``valid`` ``[B, H, W]`` marks real pixels;
    cells that cover others do not count.

    Raises:
        ConfigError: where all weights are 0, or the alignment rule does not suit the grids.
    """
    assert predictions.keys() == targets.keys(), f"{set(predictions) ^ set(targets)} unmatched"
    losses: dict[str, tuple[float, Tensor]] = {}  # weight, [B]
    for name, target in targets.items():
        prediction, weights = predictions[name], teachers[name]
        if weights.summary_weight and target.summary is not None:
            assert prediction.summary is not None, f"no summary predicted for teacher {name}"
            loss = summary_loss(config.summary)(prediction.summary, target.summary)
            losses[f"{name}/summary"] = weights.summary_weight, loss
        if weights.feature_weight:
            loss = _compare_maps(prediction, target, config, valid)
            losses[f"{name}/features"] = weights.feature_weight, loss
    if not losses:
        raise ConfigError(
            f"teachers {', '.join(targets)}: every loss weight is 0, nothing to learn; "
            "set a summary_weight or feature_weight, or leave them out of the partition"
        )
    total = torch.stack([weight * loss for weight, loss in losses.values()]).sum(0)
    return LossReport(total, {name: loss.detach().mean() for name, (_, loss) in losses.items()})


def _compare_maps(
    prediction: Features, target: Features, config: LossConfig, valid: Tensor | None
) -> Tensor:
    predicted, wanted = align(prediction.spatial, target.spatial, config.alignment)
    height, width = wanted.shape[-2:]
    cells = None if valid is None else valid_cells(valid, (height, width))
    return feature_loss(config.feature)(predicted, wanted, cells)


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _find(
    kind: str, name: str, known: Mapping[str, Callable[..., Tensor]]
) -> Callable[..., Tensor]:
    if name not in known:
        raise UnknownNameError(f"unknown {kind} loss {name!r} ({nearest(name, list(known))})")
    return known[name]
