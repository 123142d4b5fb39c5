"""Learning rates as arrays indexed by step: what a step uses can be printed, plotted and tested.

A stage restarts its schedule. While the body is frozen its rate is zero, so that neither the
gradient (which is zero then) nor weight decay moves it.
"""

import numpy as np

from ..config import StageConfig

BODY, HEADS = "body", "head"


def cosine(steps: int, peak: float, final: float, warmup_steps: int = 0) -> np.ndarray:
    """Return ``[steps]`` rates: linear warm-up from ``peak / warmup_steps``, then half a cosine."""
    rates = np.full(steps, peak, dtype=np.float64)
    warmup_steps = min(warmup_steps, steps)
    if warmup_steps:
        rates[:warmup_steps] = peak * np.arange(1, warmup_steps + 1) / warmup_steps
    remaining = steps - warmup_steps
    if remaining:
        progress = np.arange(remaining) / max(remaining - 1, 1)
        rates[warmup_steps:] = final + (peak - final) * 0.5 * (1 + np.cos(np.pi * progress))
    return rates


def learning_rates(stage: StageConfig) -> dict[str, np.ndarray]:
    """Return ``{"body": [steps], "head": [steps]}`` for one stage."""
    heads = cosine(stage.steps, stage.learning_rate, stage.final_learning_rate, stage.warmup_steps)
    body = heads.copy()
    body[: stage.frozen_steps] = 0.0
    return {BODY: body, HEADS: heads}


def every(step: int, interval: int, total: int) -> bool:
    """Return whether something periodic is due after ``step`` (from 1); the last step always is."""
    return step == total or (interval > 0 and step % interval == 0)
