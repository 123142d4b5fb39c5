"""Stops a run before numbers that are not finite reach the weights.

DeepSpeed's own check differs between ZeRO stages (with float32 and stage 0 there is none), so the
loss is checked here, before the update, on all ranks together.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DivergedError
from ..types import Features
from .distributed import sum_over_ranks


def check_targets(targets: Mapping[str, Features], keys: Sequence[str]) -> None:
    """Raise DivergedError, naming teacher and images, where a teacher's output is not finite."""
    for name, features in targets.items():
        finite = torch.isfinite(features.spatial).flatten(1).all(1)  # [B]
        if features.summary is not None:
            finite = finite & torch.isfinite(features.summary).all(1)
        if not bool(finite.all()):
            bad = [key for key, good in zip(keys, finite.tolist(), strict=True) if not good]
            raise DivergedError(
                f"teacher {name!r} gave numbers that are not finite for {', '.join(bad[:3])}; "
                f"check its weights, or set teachers.{name}.dtype to float32"
            )


def check_loss(
    loss: Tensor, terms: Mapping[str, Tensor], step: int, last_good: Path | None
) -> None:
    """Raise DivergedError on every rank when the step's loss is not finite on any of them."""
    broken = sum_over_ranks((~torch.isfinite(loss)).to(torch.float32).reshape(1))
    if not float(broken):
        return
    names = [name for name, value in terms.items() if not bool(torch.isfinite(value))]
    where = f" ({', '.join(names)})" if names else " on another process"
    raise DivergedError(f"step {step}: the loss is not finite{where}; {_advice(last_good)}")


def check_gradient(norm: float, step: int, last_good: Path | None) -> None:
    """Raise DivergedError for a gradient that is not finite; no engine takes such a step."""
    if not math.isfinite(norm):
        raise DivergedError(
            f"step {step}: the gradient is not finite, though the loss is; {_advice(last_good)}"
        )


def _advice(last_good: Path | None) -> str:
    found = (
        f"the last good checkpoint is {last_good}" if last_good else "there is no checkpoint yet"
    )
    return f"{found}; lower the learning rate, or set engine.precision to float32"
