"""What the measures of a whole set share: sums that add up, and a check of what goes into them.

They are ratios of sums, not means of ratios of batches, which a single flat image would ruin.
"""

from collections.abc import Sequence

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


class ImageMeans(Sums):
    """Means over the images of a set, for measures of single images.

    Args:
        names: of the measures.
        device: where the sums live.
    """

    def __init__(self, names: Sequence[str], device: torch.device | str | None = None):
        super().__init__(1 + len(names), device)
        self.names = tuple(names)

    def update(self, measures: object) -> None:
        """Add measures, attributes ``[B]``; an image for which one is NaN does not count."""
        values = [getattr(measures, name) for name in self.names]
        rows = torch.stack(values).to(self.sums)  # [N, B]
        rows = rows[:, rows.isfinite().all(dim=0)]
        self.sums += torch.cat([torch.ones_like(rows[:1]), rows]).sum(dim=1)

    def compute(self) -> dict[str, float]:
        """Return the means by name; raises DataError where no image counted."""
        count, *sums = self.sums.tolist()
        if not count:
            raise DataError(f"{', '.join(self.names)}: no image has a pixel with a label")
        return {name: total / count for name, total in zip(self.names, sums, strict=True)}
