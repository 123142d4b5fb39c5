"""Distances between what a student predicts and what a teacher says, one an image.

Pure functions of two tensors of one shape. Those of cells compare channels, ``[B, C, ...]`` to
``[B, ...]``, and are averaged over the cells of an image; those of maps look at an image's map as a
whole. A recipe names one of them, or a sum of several with weights. Everything is computed in
float32 (float64 stays), also under autocast.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from ..config import LossConfig
from ..errors import UnknownNameError
from ..registry import nearest

TEMPERATURE = 4.0
"""Of :func:`channel_kl`, as in TAO Toolkit."""
_NEVER = -1e4  # logit of a place that is not to be looked at


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the squared error of ``[B, C, ...]``, averaged over C: ``[B, ...]``."""
    return (prediction - target).square().mean(1)


def dampened_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Return half the squared error up to 1, beyond it 2√|error| - 1.5, averaged over C.

    Value and slope have no jump at 1. As in TAO Toolkit.
    """
    error = (prediction - target).abs()
    # The root is taken of no less than 1: its slope at 0 is infinite, also where it is not used.
    far = 2 * error.clamp(min=1).sqrt() - 1.5
    return torch.where(error <= 1, error.square() / 2, far).mean(1)


def smooth_l1(prediction: Tensor, target: Tensor, beta: float = 1.0) -> Tensor:
    """Return error² / (2 beta) up to ``beta``, beyond it |error| - beta / 2, averaged over C."""
    return F.smooth_l1_loss(prediction, target, reduction="none", beta=beta).mean(1)


def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Return one minus the cosine over C of ``[B, C, ...]``: ``[B, ...]``, from 0 to 2."""
    return 1 - F.cosine_similarity(prediction, target, dim=1)


def am_radio(prediction: Tensor, target: Tensor) -> Tensor:
    """Return 0.9 cosine + 0.1 smooth L1 over C of ``[B, C, ...]``: ``[B, ...]``.

    AM-RADIO (arXiv 2312.06709), section 3.4. The paper gives no ``beta``; 2.0 is that of NVIDIA's
    port of the trainer in TAO Toolkit.
    """
    return 0.9 * cosine(prediction, target) + 0.1 * smooth_l1(prediction, target, beta=2.0)


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


def map_cosine(prediction: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return one minus the cosine of whole maps ``[B, C, h, w]``: one angle an image, ``[B]``.

    Theia (arXiv 2407.20179): a cell with long vectors counts for more than one with short ones.
    """
    if valid is None:
        return cosine(prediction.flatten(1), target.flatten(1))
    prediction, target = (
        item.masked_fill(~valid[:, None], 0).flatten(1) for item in (prediction, target)
    )
    return cosine(prediction, target) * valid.flatten(1).any(1)


def gram(prediction: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return how far the cosines between cells are from the teacher's: ``[B]``.

    The mean over pairs of cells of the squared difference (DINOv3, arXiv 2508.10104: Gram
    anchoring). Maps may have unequal numbers of channels. Of N cells and D channels,
    ‖XXᵀ - YYᵀ‖² = ‖XᵀX‖² + ‖YᵀY‖² - 2 ‖XᵀY‖², which needs no N x N matrix: of two equal numbers
    the cheaper is computed.
    """
    x, y = (F.normalize(item.flatten(2), dim=1) for item in (prediction, target))  # [B, D, N]
    cells = torch.full_like(x[:, 0, 0], x.shape[2])
    if valid is not None:
        keep = valid.flatten(1).to(x)  # [B, N]
        x, y, cells = x * keep[:, None], y * keep[:, None], keep.sum(1).clamp(min=1)
    with torch.autocast(x.device.type, enabled=False):
        if x.shape[2] <= max(x.shape[1], y.shape[1]):
            total = (x.mT @ x - y.mT @ y).square().sum((1, 2))
        else:
            xx, yy, xy = ((a @ b.mT).square().sum((1, 2)) for a, b in ((x, x), (y, y), (x, y)))
            total = xx + yy - 2 * xy
    return total / cells.square()


def channel_kl(prediction: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return how far each channel's share of the places is from the teacher's: ``[B]``.

    Each channel of ``[B, C, h, w]`` becomes a distribution over places, a softmax at temperature
    4; KL(teacher ‖ student), averaged over channels, times 16. As in TAO Toolkit.
    """
    if valid is not None:
        prediction, target = (
            item.masked_fill(~valid[:, None], _NEVER) for item in (prediction, target)
        )
    student, teacher = (
        F.log_softmax(item.flatten(2) / TEMPERATURE, dim=2) for item in (prediction, target)
    )
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(2)  # [B, C]
    return divergence.mean(1) * TEMPERATURE**2


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


_OF_CELLS: dict[str, Callable[..., Tensor]] = {
    "mse": mse,
    "cosine": cosine,
    "smooth_l1": smooth_l1,
    "dampened_mse": dampened_mse,
    "am_radio": am_radio,
    "angle": angle,
}
_OF_MAPS: dict[str, Callable[..., Tensor]] = {
    "map_cosine": map_cosine,
    "gram": gram,
    "channel_kl": channel_kl,
}


def summary_loss(config: LossConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of ``[B, S]`` predictions and targets that gives ``[B]``, one an image."""
    parts = _find("summary", config.summary, _of_cells(config))

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        pair = _precise(prediction), _precise(target)
        return torch.stack([weight * part(*pair) for part, weight in parts]).sum(0)

    return loss


def feature_loss(config: LossConfig) -> Callable[..., Tensor]:
    """Return the loss of ``[B, C, h, w]`` predictions and targets that gives ``[B]``, one an image.

    It takes a third argument ``valid`` ``[B, h, w]``: positions that count. An image in which none
    does has loss 0.
    """
    averaged = {name: _averaged(part) for name, part in _of_cells(config).items()}
    parts = _find("feature", config.feature, averaged | _OF_MAPS)

    def loss(prediction: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
        pair = _precise(prediction), _precise(target)
        return torch.stack([weight * part(*pair, valid) for part, weight in parts]).sum(0)

    return loss


def _of_cells(config: LossConfig) -> dict[str, Callable[..., Tensor]]:
    return _OF_CELLS | {"smooth_l1": partial(smooth_l1, beta=config.smooth_l1_beta)}


def _averaged(of_cells: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(prediction: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
        return _mean_over_cells(of_cells(prediction, target), valid)

    return loss


def _find(
    kind: str, asked: str | Mapping[Any, float], known: Mapping[str, Callable[..., Tensor]]
) -> list[tuple[Callable[..., Tensor], float]]:
    """Return the losses that a field names, a name or names with weights, and their weights."""
    weights = {asked: 1.0} if isinstance(asked, str) else asked
    for name in weights:
        if name not in known:
            raise UnknownNameError(f"unknown {kind} loss {name!r} ({nearest(name, list(known))})")
    return [(known[name], weight) for name, weight in weights.items()]


def _mean_over_cells(values: Tensor, valid: Tensor | None) -> Tensor:
    """Average ``[B, h, w]`` where ``valid``: ``[B]``, 0 for an image without such a cell."""
    if valid is None:
        return reduce(values, "b h w -> b", "mean")
    total = reduce(values.masked_fill(~valid, 0), "b h w -> b", "sum")
    return total / reduce(valid.to(values), "b h w -> b", "sum").clamp(min=1)


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
