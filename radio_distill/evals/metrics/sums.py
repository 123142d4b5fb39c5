"""What the measures of a whole set share: sums that add up, and a check of what goes into them.

They are ratios of sums, not means of ratios of batches, which a single flat image would ruin.
"""

import torch
from torch import Tensor

from ...errors import DataError
from ...system.distributed import all_reduce_sum


def check_finite(values: Tensor, measure: str, name: str) -> None:
    """Raise DataError, with the name of the input, for a value that is NaN or infinite."""
    bad = values.numel() - int(values.isfinite().sum())
    if bad:
        raise DataError(
            f"{measure}: {bad} of {values.numel()} values of {name} are NaN or infinite; "
            "compute it in float32, or find the layer that overflows"
        )


class Sums:
    """Float64 sums that add up over batches, parts of a set, and processes."""

    def __init__(self, num_sums: int, device: torch.device | str | None = None):
        self.sums = torch.zeros(num_sums, dtype=torch.float64, device=device)

    def merge(self, other: "Sums") -> None:
        """Add what ``other``, of the same kind, was fed."""
        self.sums += other.sums.to(self.sums)

    def all_reduce(self) -> None:
        """Merge over all processes, once, at the end; alone, do nothing."""
        self.sums = all_reduce_sum(self.sums)
