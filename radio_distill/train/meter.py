"""Running means of a step's terms between two log lines, exact over ranks and micro-batches."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..system.distributed import all_reduce_sum


class Meter:
    """Weighted means of named values; a name may be absent from a micro-batch or from a rank.

    Args:
        names: all names that any rank will report, in the same order on every rank.
        device: where the values live; nothing is copied to the host before :meth:`means`.
    """

    def __init__(self, names: Sequence[str], device: torch.device):
        self._names = list(names)
        self._sums = torch.zeros(2, len(self._names), dtype=torch.float64, device=device)

    def add(self, values: Mapping[str, Tensor], weight: float) -> None:
        """Add scalar means that stand for ``weight`` images."""
        for name, value in values.items():
            index = self._names.index(name)
            self._sums[0, index] += value.detach().double() * weight
            self._sums[1, index] += weight

    def means(self) -> dict[str, float]:
        """Return the means over all ranks since the last call, and start anew."""
        totals, weights = all_reduce_sum(self._sums).tolist()
        self._sums.zero_()
        return {
            name: total / weight
            for name, total, weight in zip(self._names, totals, weights, strict=True)
            if weight
        }
