"""Whether a run is healthy: numbers that are not finite, losses that jump, rates that fall.

DeepSpeed's own check for finite numbers differs between ZeRO stages (with float32 and stage 0 there
is none), so the trainer looks at every pass before the update, and all processes agree on what was
found. Such a step is skipped: its images are used up, the weights stay. One bad image in a million,
or one overflow of a teacher in half precision, must not end a run of days; one that recurs must.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import WatchConfig
from ..errors import DivergedError
from ..system import signals
from ..system.distributed import all_reduce_sum
from ..system.transfer import OnItsWay, to_device
from ..types import Features

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


class NonFinite(NamedTuple):
    """What is not finite, and in which images."""

    cause: str
    """``teacher NAME``, ``loss PARTITION/TEACHER/KIND`` or ``gradient``."""
    keys: tuple[str, ...]


class _Checked(NamedTuple):
    cause: str
    finite: Tensor
    """``[B]`` bool, on the device."""
    keys: Sequence[str]
    terms: Mapping[str, Tensor]


class NonFiniteGuard:
    """Collects what is not finite in the passes of one step on this process.

    Nothing is copied from the device, which would stop it, before something is wrong.
    """

    def __init__(self) -> None:
        self._checked: list[_Checked] = []
        self._keys: list[str] = []

    def add_targets(self, targets: Mapping[str, Features], keys: Sequence[str]) -> None:
        """Check the features that each teacher gave for the images ``keys``."""
        self._keys += keys
        for name, features in targets.items():
            self._checked.append(_Checked(f"teacher {name}", finite_images(features), keys, {}))

    def add_loss(self, loss: Tensor, terms: Mapping[str, Tensor], keys: Sequence[str]) -> None:
        """Check the loss of each image ``[B]``; ``terms`` are the means it is made of."""
        self._checked.append(_Checked("loss", torch.isfinite(loss.detach()), keys, terms))

    def flag(self, device: torch.device) -> Tensor:
        """Return 1 where anything is not finite, else 0, on the device."""
        flags = [~checked.finite.all() for checked in self._checked]
        flag = torch.stack(flags).any() if flags else torch.zeros((), device=device)
        return flag.to(device, torch.float64)

    def causes(self) -> list[NonFinite]:
        """List what is not finite; an image whose teacher is at fault is not listed as a loss."""
        keys_of: dict[str, dict[str, None]] = {}
        blamed = set[str]()
        for checked in self._checked:
            finite = checked.finite.tolist()
            bad = [key for key, good in zip(checked.keys, finite, strict=True) if not good]
            cause = checked.cause
            if cause == "loss":
                bad = [key for key in bad if key not in blamed]
                terms = checked.terms.items()
                cause = " ".join([cause, *(n for n, v in terms if not bool(torch.isfinite(v)))])
            if bad:
                blamed |= set(bad)
                keys_of.setdefault(cause, {}).update(dict.fromkeys(bad))
        return [NonFinite(cause, tuple(keys)) for cause, keys in keys_of.items()]

    def gradient(self) -> list[NonFinite]:
        """Name all images of the step: a gradient that is not finite may come from any of them."""
        return [NonFinite("gradient", tuple(dict.fromkeys(self._keys)))]


class StepStatus(NamedTuple):
    """What all processes know of a step before any of them ends it."""

    loss: float
    """The loss of the whole step."""
    is_bad: bool
    """Something is not finite, on some process; the step is skipped."""
    signal: int
    """The signal that asked some process to stop; 0 for none."""


class Agreement:
    """What all processes know of a step, summed on the device, where it stays until it is read.

    Args:
        sums: over all processes: the loss, what is not finite, each signal, errors of writing.
    """

    def __init__(self, sums: Tensor):
        self.is_bad = sums[1] > 0
        """Scalar bool on the device; see :attr:`StepStatus.is_bad`."""
        self._sums = OnItsWay(sums)

    def read(self) -> StepStatus:
        """Wait for the numbers, which are there once the engine's step is.

        Raises:
            WriteError: on every process, where rank 0 cannot go on.
        """
        total, bad, *asked, errors = self._sums.tolist()
        if errors:
            raise WriteError
        numbers = zip(signals.SIGNALS, asked, strict=True)
        return StepStatus(total, bad > 0, next((int(number) for number, by in numbers if by), 0))


Agree = Callable[[Tensor, NonFiniteGuard], Agreement]
"""Takes this process's part of a step's loss; returns what all processes know of the step."""


class WriteError(Exception):
    """Rank 0 cannot write; its error is raised on every process."""


def agree(loss: Tensor, guard: NonFiniteGuard, cannot_write: bool = False) -> Agreement:
    """Sum up a step over all processes; each calls once, and does not wait for the device.

    Args:
        loss: this process's part of the step's loss.
        guard: what is not finite in its passes.
        cannot_write: whether this process, rank 0, cannot go on.
    """
    requested = signals.requested()
    flags = torch.tensor(
        [requested == number for number in signals.SIGNALS] + [cannot_write], dtype=torch.float64
    )
    values = torch.stack([loss.detach().double(), guard.flag(loss.device)])
    return Agreement(all_reduce_sum(torch.cat([values, to_device(flags, loss.device)])))


def finite_images(features: Features) -> Tensor:
    """Return which images ``[B]`` a teacher gave finite numbers for."""
    finite = torch.isfinite(features.spatial).flatten(1).all(1)
    if features.summary is not None:
        finite = finite & torch.isfinite(features.summary).all(1)
    return finite


def check_targets(targets: Mapping[str, Features], keys: Sequence[str]) -> None:
    """Raise DivergedError, naming teacher and images, where a teacher's output is not finite.

    Statistics and pools of features, which must be right for every image, call it.
    """
    for name, features in targets.items():
        finite = finite_images(features).tolist()
        if not all(finite):
            bad = [key for key, good in zip(keys, finite, strict=True) if not good]
            raise DivergedError(
                f"teacher {name!r} gave numbers that are not finite for {_first_keys(bad)}; "
                f"check its weights, or set teachers.{name}.dtype to float32"
            )


def _first_keys(keys: Sequence[str], count: int = 3) -> str:
    """Name the first of some images, and say how many more there are."""
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more


class SkipCounter:
    """Counts skipped steps, alike on every process.

    Args:
        limit: steps in a row that may be skipped.
        total: steps skipped before, in a resumed run.
        in_a_row: of these, the last ones.
    """

    def __init__(self, limit: int, total: int = 0, in_a_row: int = 0):
        self._limit = limit
        self.total, self.in_a_row = total, in_a_row

    def reset(self) -> None:
        """Note a step that was taken."""
        self.in_a_row = 0

    def add(self, step: int, causes: Sequence[NonFinite], last_good: Path | None) -> None:
        """Note a skipped step, counted from 1; raises DivergedError where it is one too many."""
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row <= self._limit:
            return
        where = f"step {step}"
        if self.in_a_row > 1:
            where += f", the {_ordinal(self.in_a_row)} in a row,"
        saved = f"the last good checkpoint is {last_good}"
        if last_good is None:
            saved = "there is no checkpoint yet"
        teachers = [cause.split()[1] for cause, _ in causes if cause.startswith("teacher")]
        hint = "lower the learning rate, or set engine.precision to float32"
        if teachers:
            hint = f"check the weights of {teachers[0]}, or set teachers.{teachers[0]}.dtype to "
            hint += "float32"
        raise DivergedError(f"{where} is not finite: {describe(causes)}; {saved}; {hint}")


def describe(causes: Sequence[NonFinite]) -> str:
    """Write what all processes found in one line."""
    images: dict[str, list[str]] = {}
    for cause, keys in causes:
        images.setdefault(cause, []).extend(keys)
    return "; ".join(f"{cause} for {_first_keys(keys)}" for cause, keys in images.items())


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}th" if number % 100 in (11, 12, 13) else f"{number}{ending}"


class LossMonitor:
    """Returns warnings of losses that jump and of rates that fall; a resumed run begins anew."""

    def __init__(self, config: WatchConfig):
        self._config = config
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._rates: list[float] = []
        self._num_windows = 0
        self._quiet_until = 0
        self._is_slow = False

    def loss(self, step: int, value: float) -> str | None:
        """Add the loss of a whole step, over all processes; returns a warning where it is a spike.

        A spike lies ``loss_spike`` standard deviations above the mean of the last 100 steps, both
        taken over losses cut off at their own step's bound. So one spike hides no other, and a loss
        that stays on a new level is soon usual. Steps of several image sizes, whose losses differ,
        only widen the deviation.
        """
        if not self._config.loss_spike or not math.isfinite(value):
            return None
        if not self._losses:
            self._losses.append(value)
            return None
        mean = fmean(self._losses)
        deviation = math.sqrt(fmean((loss - mean) ** 2 for loss in self._losses))
        deviation = max(deviation, LEAST_DEVIATION * abs(mean))
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
        """Add the rate of a log window; returns a warning where the run has become slow.

        There is one warning until the rate has recovered to half-way between bound and median.

        Args:
            step: the last step of the window.
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
        cause = f"{data_wait_share:.0%} of the time was spent waiting for images"
        if data_wait_share >= (1 - images_per_second / usual) / 2:  # half of the lost time
            cause += ": look at the disk of data.shards, and raise data.workers"
        else:
            cause += ", so look at the devices: clocks, temperature, other programs, the network"
        return (
            f"step {step}: {images_per_second:.3g} images/s, {images_per_second / usual:.0%} of "
            f"the {usual:.3g} that are usual (watch.slow_share is {share:g}); {cause}"
        )
