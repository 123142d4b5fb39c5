"""Comparison of what was written with the student it was written from."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ExportError
from ..types import Size


def probe_images(step: int, shapes: Sequence[tuple[int, Size]]) -> Iterator[Tensor]:
    """Yield the same random images ``[B, 3, H, W]`` in [0, 1] in every run.

    Args:
        step: what each side is a multiple of, in pixels.
        shapes: (B, (H, W)) of each batch, sides in steps.
    """
    generator = torch.Generator().manual_seed(0)
    for batch, (height, width) in shapes:
        yield torch.rand(batch, 3, height * step, width * step, generator=generator)


def check_equal(
    format_name: str,
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    tolerance: float,
) -> float:
    """Return the largest difference, in units of each output's largest value or 1.

    Untrained and normalised outputs have values around 1; without a final norm, a few channels of a
    large student reach hundreds, whose last bits are worth more than an absolute tolerance.

    Raises:
        ExportError: where an output differs by more than ``tolerance``, or is not finite.
    """
    largest = 0.0
    for name, wanted in expected.items():
        difference = (found[name] - wanted).abs().max() / wanted.abs().max().clamp(min=1)
        if not difference <= tolerance:
            raise ExportError(
                f"{format_name}: {name} of the written model differs by {difference:.1e} from the "
                f"student's (allowed: {tolerance:.0e}), so nothing was written; please report it"
            )
        largest = max(largest, difference.item())
    return largest
