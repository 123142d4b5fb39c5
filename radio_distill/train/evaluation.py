"""Scores of what is trained, inside a run: when there are any, and which is the best."""

import logging
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ..errors import RadioDistillError
from ..protocols import Task
from ..stage import Stage
from ..system.files import reason_of
from ..types import Score
from .checkpoint import Best
from .optim import every
from .trackers import WriteImage

logger = logging.getLogger(__name__)


class Evaluations:
    """The evaluations of a run.

    Args:
        stage: the resolved stage.
        task: scores what it trains.
        is_main: whether this process tells of what is wrong.
        best: of the run that is gone on with.
    """

    def __init__(self, stage: Stage, task: Task, is_main: bool, best: Best | None = None):
        self._stage, self._task, self._is_main = stage, task, is_main
        self.best = best
        """The best score so far, where the recipe has ``evaluation.best``."""

    def is_due(self, done: int) -> bool:
        """Return whether there is one after so many steps."""
        interval = self._task.evaluate_every
        return interval > 0 and every(done, interval, self._stage.steps)

    def run(
        self, done: int, beat: Callable[[], None], write_image: WriteImage, may_be_best: bool
    ) -> dict[str, float]:
        """Score what is trained, and note whether it is the best so far; every rank must call."""
        try:
            with same_randomness():
                scores = self._task.evaluate(done, beat, write_image)
        except (RadioDistillError, OSError) as error:  # a run of days does not end for a score
            logger.warning("step %d is not evaluated: %s", done, reason_of(error))
            return {}
        shown = [f"{score.name} {score.value:.4g}" for score in scores if score.headline]
        logger.info("%s, step %d: %s", self._stage.folder.name, done, ", ".join(shown))
        wanted, names = self._stage.evaluation.best, [score.name for score in scores]
        if wanted and names and wanted not in names and self._is_main:
            logger.warning(
                "evaluation.best: step %d has no score %s, so none is the best; it has %s",
                done, wanted, ", ".join(names),
            )  # fmt: skip
        for score in scores:
            if score.name == wanted and may_be_best and _is_better(score, self.best):
                self.best = Best(wanted, score.value, done)
        return {f"eval/{score.name}": score.value for score in scores}


@contextmanager
def same_randomness() -> Iterator[None]:
    """Leave every global generator as it was before the block."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _is_better(score: Score, best: Best | None) -> bool:
    if not math.isfinite(score.value):
        return False
    if best is None or best.metric != score.name:
        return True
    return score.value > best.score if score.higher_is_better else score.value < best.score
