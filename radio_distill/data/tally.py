"""Bad images of a run: counted by kind, named in the log, and limited."""

import logging
import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from ..errors import DataError
from .images import FIELD_OF_KIND

logger = logging.getLogger(__name__)

_MIN_READS = 50  # before that, the share of bad images says nothing
_LOGGED_SINGLY = 20
_SUMMARY_EVERY = 1000


class Bad(NamedTuple):
    """One image that could not be used."""

    key: str
    kind: str
    reason: str


class Tally:
    """What one process has read.

    Args:
        max_share: the share of bad images that is too much.
    """

    def __init__(self, max_share: float):
        self._max_share = max_share
        self._last: Bad | None = None
        self.num_reads = 0
        self.bad: Counter[str] = Counter()

    def add(self, num_good: int, bad: Iterable[Bad]) -> None:
        """Count what was read; the first bad images are logged one by one, then summaries."""
        self.num_reads += num_good
        for item in bad:
            self.num_reads += 1
            self.bad[item.kind] += 1
            self._last = item
            self._log(item)

    def check(self) -> None:
        """Raise DataError when clearly more images are bad than may be."""
        if too_many_bad(self.bad.total(), self.num_reads, self._max_share):
            raise DataError(f"too many bad images: {self.verdict()}")

    def verdict(self) -> str:
        """Return how many are bad, of which kinds, what the limit is, and how to find them."""
        assert self._last is not None, "a verdict needs a bad image"
        kinds = ", ".join(
            f"{count} {kind}" + (f" by {FIELD_OF_KIND[kind]}" if kind in FIELD_OF_KIND else "")
            for kind, count in self.bad.most_common()
        )
        return (
            f"{self.bad.total()} of {self.num_reads} read ({kinds}; data.max_bad_share is "
            f"{self._max_share:g}), the last was {self._last.key}: {self._last.reason}; list all "
            "of them with `radio-distill shards --check`"
        )

    def _log(self, item: Bad) -> None:
        total = self.bad.total()
        if total <= _LOGGED_SINGLY:
            logger.warning("bad image %s (%s): %s", *item)
        if total == _LOGGED_SINGLY:
            logger.warning("further bad images are summed up every %d", _SUMMARY_EVERY)
        if total % _SUMMARY_EVERY == 0:
            logger.warning("bad images: %s", self.verdict())


def too_many_bad(num_bad: int, num_reads: int, max_share: float) -> bool:
    """Tell whether the share of bad images is above the limit by more than chance explains.

    Chance is four standard deviations of a Poisson count, so that a long run with a share below the
    limit is not stopped by an unlucky start.
    """
    expected = max_share * num_reads
    return num_reads >= _MIN_READS and num_bad > expected + 4 * math.sqrt(expected)
