"""Feature grids of different size: at which grid student and teacher are compared.

The student's head runs at the student's own grid and its output is resampled here, never the other
way round: a head does not commute with interpolation, and resampling first changes the gradient.

Recipes differ. AM-RADIO (arXiv 2312.06709, section 3.4) compares at the larger grid; the PHI-S
recipe (arXiv 2410.01680, A.7) shrinks the teacher and RADIOv2.5's high-resolution stage the student
(FeatSharp, arXiv 2502.16025, appendix C), which together is the smaller grid; FeatSharp's baseline
enlarges the teacher (section 4.5). All of these are bilinear. EUPE (arXiv 2603.22387) compares at
the larger grid, bicubically. Here both mean ``align_corners=False`` and, on an axis that shrinks, a
filter as wide as what a new cell covers (antialiased): without it, a shrink by more than 2 leaves
cells unread. The papers do not say.
"""

import torch
from einops import rearrange
from torch import Tensor

from ..errors import ConfigError, UnknownNameError
from ..registry import nearest
from ..types import Size

RULES = ("student_down", "teacher_down", "teacher_up", "smaller", "larger")
BILINEAR, BICUBIC = "bilinear", "bicubic"


def align(
    prediction: Tensor, target: Tensor, rule: str, interpolation: str = BILINEAR
) -> tuple[Tensor, Tensor]:
    """Bring a student's ``[B, C, h, w]`` and a teacher's ``[B, C, h', w']`` to one grid.

    Errors are those of :func:`common_grid`, which says what each rule does.
    """
    student, teacher = prediction.shape[-2:], target.shape[-2:]
    grid = common_grid((student[0], student[1]), (teacher[0], teacher[1]), rule)
    return resample(prediction, grid, interpolation), resample(target, grid, interpolation)


def common_grid(student: Size, teacher: Size, rule: str) -> Size:
    """Return the grid at which a student and a teacher of these grids are compared.

    ``smaller`` and ``larger`` decide each axis by itself, so they suit any two grids; where one
    map is higher and the other wider, both are resampled. The other rules promise which map is
    resampled and in which direction: ``student_down`` compares at the teacher's grid,
    ``teacher_down`` and ``teacher_up`` at the student's. Equal grids suit every rule.

    Raises:
        ConfigError: where a directional rule would have to go the other way on an axis.
        UnknownNameError: for a rule that does not exist.
    """
    if rule not in RULES:
        raise UnknownNameError(f"unknown alignment {rule!r} ({nearest(rule, RULES)})")
    smaller = (min(student[0], teacher[0]), min(student[1], teacher[1]))
    larger = (max(student[0], teacher[0]), max(student[1], teacher[1]))
    if rule in ("smaller", "larger"):
        return smaller if rule == "smaller" else larger
    moved, direction = rule.split("_")
    grid = teacher if moved == "student" else student
    if grid != (smaller if direction == "down" else larger):
        fallback = "smaller" if direction == "down" else "larger"
        raise ConfigError(
            f"loss.alignment: {rule} cannot compare a student grid of {student[0]}x{student[1]} "
            f"with a teacher grid of {teacher[0]}x{teacher[1]}; use {fallback}, which suits any two"
        )
    return grid


def resample(features: Tensor, grid: Size, interpolation: str = BILINEAR) -> Tensor:
    """Resample ``[B, C, h, w]`` to ``[B, C, *grid]``, in float32 or float64.

    The filter is separable: a small matrix for each axis. ``F.interpolate`` computes the same, but
    adds gradients on a GPU in no fixed order.
    """
    height, width = features.shape[-2:]
    if (height, width) == grid:
        return features
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    # Channels come last, as tokens leave a head, so that each product is one for all channels.
    maps = rearrange(features, "b c h w -> b h (w c)")
    with torch.autocast(features.device.type, enabled=False):
        maps = _apply(filter_of(interpolation, height, grid[0], features), maps)
        maps = rearrange(maps, "b h (w c) -> (b h) w c", w=width)
        maps = _apply(filter_of(interpolation, width, grid[1], features), maps)
    return rearrange(maps, "(b h) w c -> b c h w", h=grid[0])


def filter_of(interpolation: str, old: int, new: int, like: Tensor) -> Tensor:
    """Return the matrix ``[new, old]`` that resamples an axis, of a tensor's type and device.

    A new cell weighs old ones by their distance to its centre, in the larger of the two kinds of
    cells: bilinearly by a triangle; bicubically by Keys' kernel with a = -1/2, which continues
    quadratics exactly (IEEE ASSP 29, 1981).
    """
    centres = torch.arange(1, 2 * old, 2, device=like.device) * new
    targets = torch.arange(1, 2 * new, 2, device=like.device) * old
    distances = (centres - targets[:, None]).abs().to(like.dtype)  # whole numbers: exact
    distances = distances / (2 * max(old, new))
    weights = keys_cubic(distances) if interpolation == BICUBIC else (1 - distances).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)


def keys_cubic(distances: Tensor) -> Tensor:
    """Return Keys' cubic kernel with a = -1/2 at distances of 0 and more; 0 from 2 on."""
    near = (1.5 * distances - 2.5) * distances.square() + 1
    far = ((2.5 - 0.5 * distances) * distances - 4) * distances + 2
    return torch.where(distances < 1, near, far.where(distances < 2, 0))


def _apply(matrix: Tensor, maps: Tensor) -> Tensor:
    """``[new, old]`` times each ``[old, n]`` of ``[batch, old, n]``."""
    if matrix.shape[0] == matrix.shape[1]:
        return maps
    return torch.bmm(matrix.expand(len(maps), -1, -1), maps)
