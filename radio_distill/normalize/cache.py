"""Files of statistics, so that a run that starts again need not estimate them again.

The caller names the file after all that its numbers depend on; moments and not normalizers are
kept, so one file serves every normalizer.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError
from ..system.files import check_writable, reason_of, replacing
from .moments import Moments

logger = logging.getLogger(__name__)

DISPERSION = "dispersion"


class Statistics(NamedTuple):
    """Mean, covariance and dispersion of a teacher's outputs on a set of images."""

    moments: Moments
    """Of its spatial features."""
    dispersion: float | None = None
    """Of its summaries, see :mod:`.dispersion`; None where it was not asked for."""


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Write them to a safetensors file, whole or not at all.

    Raises:
        CheckpointError: where the file cannot be written; a former one stays as it was.
    """
    try:
        with replacing(path) as temporary:
            save_file(_tensors(statistics), temporary)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error


def check_can_save(folder: Path) -> None:
    """Raise CheckpointError where no statistics can be written to a folder; leaves nothing."""
    try:
        check_writable(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _cannot_write(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot write statistics to {path}: {reason_of(error)}; "
        "set normalizer.cache to a folder of yours with room"
    )


def load_statistics(path: Path) -> Statistics | None:
    """Read statistics, on the CPU; None where there are none, or with a warning where damaged."""
    if not path.exists():
        return None
    try:
        state = load_file(path)
        problem = _problem(state)
    except (OSError, SafetensorError) as error:
        problem = reason_of(error)
    if problem:
        logger.warning("statistics in %s are damaged (%s): estimating them again", path, problem)
        return None
    dispersion = float(state.pop(DISPERSION)) if DISPERSION in state else None
    return Statistics(Moments.from_state(state), dispersion)


def _tensors(statistics: Statistics) -> dict[str, Tensor]:
    tensors = statistics.moments.state()
    if statistics.dispersion is not None:
        tensors[DISPERSION] = torch.tensor(statistics.dispersion, dtype=torch.float64)
    return tensors


def _problem(state: dict[str, Tensor]) -> str:
    if sorted(state.keys() - {DISPERSION}) != ["count", "mean", "scatter"]:
        return f"holds {', '.join(sorted(state)) or 'nothing'}"
    channels = state["mean"].shape
    if len(channels) != 1 or state["scatter"].shape != channels * 2 or state["count"].ndim:
        return "shapes do not fit together"
    finite = all(torch.isfinite(value).all() for value in state.values())
    return "" if finite and state["count"] > 0 else "numbers are not statistics"
