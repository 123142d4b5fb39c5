"""Files of statistics, so that a run that starts again need not estimate them again.

The caller names the file after all that its numbers depend on; moments and not normalizers are
kept, so one file serves every normalizer.
"""

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError
from ..files import reason_of, replacing
from .moments import Moments

logger = logging.getLogger(__name__)


def save_moments(path: Path, moments: Moments) -> None:
    """Write ``moments`` to a safetensors file, whole or not at all.

    Raises:
        CheckpointError: where the file cannot be written; a former one stays as it was.
    """
    try:
        with replacing(path) as temporary:
            save_file(moments.state(), temporary)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write statistics to {path}: {reason_of(error)}; "
            "set normalizer.cache to a folder with room"
        ) from error


def load_moments(path: Path) -> Moments | None:
    """Read moments, on the CPU; None where there are none, or with a warning where damaged."""
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
    return Moments.from_state(state)


def _problem(state: dict[str, Tensor]) -> str:
    if sorted(state) != ["count", "mean", "scatter"]:
        return f"holds {', '.join(sorted(state)) or 'nothing'}"
    channels = state["mean"].shape
    if len(channels) != 1 or state["scatter"].shape != channels * 2 or state["count"].ndim:
        return "shapes do not fit together"
    finite = all(torch.isfinite(value).all() for value in state.values())
    return "" if finite and state["count"] > 0 else "numbers are not statistics"
