"""Warns of a loss that jumps and of a rate that falls: what a run survives, but one should look at.

Numbers that are not finite are no matter of warnings; they end a step (:mod:`.guard`). A resumed
run begins to watch anew.
"""

import math
from collections import deque
from statistics import fmean, median

from ..config import WatchConfig

WINDOW = 100
"""Steps whose losses are usual ones."""
LEAST_STEPS = 50
"""Steps before the first warning of the loss."""
QUIET_STEPS = 50
"""Steps after a warning of the loss without another."""
LEAST_DEVIATION = 1e-3
"""Share of the mean that counts as deviation even where losses deviate by less."""
COLD_WINDOWS = 2
"""First log windows, which compile, choose kernels and fill caches."""
LEAST_WINDOWS = 3
"""Further log windows before the first warning of the rate."""


class Watch:
    """Keeps what is usual of a run, and tells what is not.

    Args:
        config: the recipe's watch section.
    """

    def __init__(self, config: WatchConfig):
        self._config = config
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._rates: list[float] = []
        self._num_windows = 0
        self._quiet_until = 0
        self._is_slow = False

    def loss(self, step: int, value: float) -> str | None:
        """Take in the loss of a step; returns a warning where it is a spike.

        A spike lies ``loss_spike`` standard deviations above the mean of the last 100 steps, both
        taken over losses cut off at their own step's bound. So one spike hides no other, and a loss
        that stays on a new level is soon usual. Steps of several image sizes, whose losses differ,
        only widen the deviation.

        Args:
            step: that the loss is of.
            value: the loss of the whole step, over all processes.
        """
        if not self._config.loss_spike or not math.isfinite(value):
            return None
        if not self._losses:
            self._losses.append(value)
            return None
        mean = fmean(self._losses)
        deviation = max(_deviation(self._losses, mean), LEAST_DEVIATION * abs(mean))
        bound = mean + self._config.loss_spike * deviation
        is_watching = len(self._losses) >= LEAST_STEPS
        self._losses.append(min(value, bound) if is_watching else value)
        if not is_watching or value <= bound or step < self._quiet_until:
            return None
        self._quiet_until = step + QUIET_STEPS
        return (
            f"step {step}: the loss of {value:.4g} lies {(value - mean) / deviation:.0f} usual "
            f"deviations above its mean of {mean:.4g} (watch.loss_spike is "
            f"{self._config.loss_spike:g}); look at the losses by teacher and at gradient_norm, "
            "and if it does not come back, lower the learning rate"
        )

    def rate(self, step: int, images_per_second: float, data_wait_share: float = 0.0) -> str | None:
        """Take in the rate of a log window; returns a warning where the run has become slow.

        There is one warning until the rate has recovered to half-way between bound and median.

        Args:
            step: at the end of the window.
            images_per_second: of this window alone.
            data_wait_share: share of this window's time that was spent waiting for images, on the
                process that waited longest.
        """
        self._num_windows += 1
        if not self._config.slow_share or self._num_windows <= COLD_WINDOWS:
            return None
        usual, share = median(self._rates or [images_per_second]), self._config.slow_share
        num_usual = len(self._rates)
        self._rates.append(images_per_second)
        if self._is_slow:
            self._is_slow = images_per_second < (1 + share) / 2 * usual
            return None
        if num_usual < LEAST_WINDOWS or images_per_second >= share * usual:
            return None
        self._is_slow = True
        lost = 1 - images_per_second / usual
        return (
            f"step {step}: {images_per_second:.3g} images/s, {images_per_second / usual:.0%} of "
            f"the {usual:.3g} that are usual (watch.slow_share is {share:g}); "
            f"{_cause(data_wait_share, lost)}"
        )


def _deviation(values: deque[float], mean: float) -> float:
    return math.sqrt(fmean((value - mean) ** 2 for value in values))


def _cause(data_wait_share: float, lost: float) -> str:
    """Tell where to look; data are the brake where they explain half of the lost time."""
    waited = f"{data_wait_share:.0%} of the time was spent waiting for images"
    if data_wait_share >= lost / 2:
        return f"{waited}: look at the disk of data.shards, and raise data.workers"
    return f"{waited}, so look at the devices: clocks, temperature, other programs, the network"
