"""What a benchmark asks of an encoder, counted before an image is read; ``plan`` prices it.

A benchmark has a method ``demand(parts, limit)``, of how many items each part of its data has (as
``Dataset.published`` names parts) and of at most how many are taken. One without is not priced.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..types import Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The work of one benchmark with one encoder."""

    images: int
    """Different images."""
    passes: Mapping[Size, int]
    """How often the encoder sees an image, by (height, width) in pixels."""
    batch: int = 1
    """Images of one pass."""
    steps: int = 0
    """Of training."""
    tested: int = 0
    """Images that trained heads are asked of."""
    reads: int = 0
    """How often an image is read from disk; 0 for once each."""
    products: int = 0
    """How often two features are compared."""

    @property
    def num_passes(self) -> int:
        """How often the encoder sees an image, of any size."""
        return sum(self.passes.values())


def at_most(count: int, limit: int | None) -> int:
    """Return how many of so many items are taken, as ``data.folder.spread`` does."""
    return min(count, limit) if limit else count
