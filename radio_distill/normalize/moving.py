"""Standardisations whose statistics follow the training: those of UNIC and DUNE.

Both keep a mean and a deviation for each channel, of the images of a step over all processes, and
average them over the steps:

    μ ← (1 - m) μ + m μ_step,   s likewise,   m from 1 to 0.001 along a cosine.

The first step therefore replaces what was estimated before the stage (that beginning is ours). A
step that is skipped counts for nothing. A teacher must be seen at its own grid: a fine map would
weigh as many images as it has more cells.
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from ..system.distributed import all_reduce_sum
from .affine import Affine, mean_variance
from .statistics import CHUNK, Moments

LAST_MOMENTUM = 0.001
"""Share of a stage's last step in the averages, in UNIC and DUNE."""


def momentum(progress: float) -> float:
    """Return the share in the averages of a step at 0, the beginning of a stage, to 1, its end."""
    return LAST_MOMENTUM + (1 - LAST_MOMENTUM) * (1 + math.cos(math.pi * progress)) / 2


class EmaStandardise(Affine):
    """A mean and a deviation for each channel, averaged over the steps before (UNIC, ECCV 2024).

    y = (x - μ) / (s + 1e-6).
    """

    floor = 1e-6
    needs_whole_step = False
    """Whether all maps of a step must be seen before one of them can be normalised."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: Tensor | None = None
        """Tokens of this step on this process: count, Σ (x - μ), Σ (x - μ)²; ``[1 + 2 C]``."""

    def fit(self, moments: Moments) -> "EmaStandardise":
        """Take the first statistics; raises DataError where no channel varies."""
        mean_variance(moments)
        self._take(moments.mean, moments.covariance.diagonal().sqrt())
        return self

    def state(self) -> dict[str, Tensor]:
        """Return the averages, on the CPU."""
        return {name: value.cpu() for name, value in super().state().items()}

    @torch.no_grad()
    def observe(self, spatial: Tensor) -> None:
        """Let the tokens of ``[B, C, h, w]``, in the teacher's space, count for this step."""
        mean = self._state["mean"].to(spatial.device)
        if self._sums is None:
            self._sums = mean.new_zeros(1 + 2 * len(mean))
        for tokens in rearrange(spatial, "b c h w -> (b h w) c").split(CHUNK):
            centred = tokens.double() - mean  # about one point on all processes, so that sums add
            count = centred.new_full((1,), len(centred))
            self._sums += torch.cat((count, centred.sum(0), centred.square().sum(0)))

    def begin_step(self, device: torch.device) -> None:
        """Know that all maps of a step were observed; every process calls, where that is needed."""

    def end_step(self, progress: float, device: torch.device) -> None:
        """Let a step, at this share of the stage, have its share in the averages; all call."""
        mean, deviation, seen = self._of_step(device)
        own = tuple(value.to(device) for value in self._averages())
        self._average(own, (mean, deviation), momentum(progress) * seen)
        self._sums = None

    def _average(self, own: Sequence[Tensor], step: Sequence[Tensor], share: Tensor) -> None:
        pairs = zip(own, step, strict=True)
        mean, deviation = (before + share * (now - before) for before, now in pairs)
        self._take(mean, deviation)

    def forget_step(self) -> None:
        """Let this step count for nothing."""
        self._sums = None

    def _averages(self) -> tuple[Tensor, Tensor]:
        return self._state["mean"], 1 / self._state["scale"] - self.floor

    def _of_step(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and deviation over all processes' tokens, and 1 where there are any, or 0."""
        around = self._state["mean"].to(device)
        sums = self._sums if self._sums is not None else around.new_zeros(1 + 2 * len(around))
        count, first, second = all_reduce_sum(sums.to(device)).split([1, len(around), len(around)])
        tokens = count.clamp(min=1)
        offset = first / tokens
        variance = (second / tokens - offset.square()).clamp(min=0)
        return around + offset, variance.sqrt(), (count > 0).double()

    def _take(self, mean: Tensor, deviation: Tensor) -> None:
        self._set(mean=mean, scale=1 / (deviation + self.floor))

    def _set(self, **state: Tensor) -> None:
        """Keep the state where it lies: a step that moved it to the host would wait for it."""
        self._state = {name: value.detach().double() for name, value in state.items()}
        self._copies.clear()
        self._into = None


class BatchStandardise(EmaStandardise):
    """Mean and deviation of each channel in the step itself; averages in evaluation (DUNE).

    y = (x - μ) / max(s, 1e-3), over all images of a step on all processes (CVPR 2025). So a process
    encodes all its images of a step before it compares the first, and holds their maps.
    """

    floor = 1e-3
    needs_whole_step = True

    def __init__(self) -> None:
        super().__init__()
        self._before: tuple[Tensor, Tensor] | None = None
        """The averages, while those of a step stand in their place."""
        self._seen = torch.zeros(1)

    def begin_step(self, device: torch.device) -> None:
        """Take the statistics of the step in the place of the averages."""
        own = self._averages()
        mean, deviation, self._seen = self._of_step(device)
        self._before = own[0].to(device), own[1].to(device)
        is_seen = self._seen > 0
        self._take(
            torch.where(is_seen, mean, self._before[0]),
            torch.where(is_seen, deviation, self._before[1]),
        )

    def end_step(self, progress: float, device: torch.device) -> None:
        """Let the step have its share in the averages, which are back in their place."""
        now = self._averages()
        self._average(self._restored(), now, momentum(progress) * self._seen)

    def forget_step(self) -> None:
        """Put the averages back in their place."""
        self._take(*self._restored())

    def _restored(self) -> tuple[Tensor, Tensor]:
        assert self._before is not None, "a step that has not begun"
        before, self._before, self._sums = self._before, None, None
        return before

    def _averages(self) -> tuple[Tensor, Tensor]:
        return self._state["mean"], 1 / self._state["scale"]

    def _take(self, mean: Tensor, deviation: Tensor) -> None:
        self._set(mean=mean, scale=1 / deviation.clamp(min=self.floor))
