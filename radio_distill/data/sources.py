"""The shards that a run reads, by source, and what is left out of them before it starts.

A damaged shard, and a sample that must not be used, are told from the rest before the first step,
so the order of a run is that of what is whole: they cost nothing later, and stand in no count of
bad images. Both have a budget, above which the run does not start.
"""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from ..config import DataConfig
from ..errors import DataError
from .index import Shard, try_open_shards
from .names import printable
from .shards import find_shards
from .walk import describe

logger = logging.getLogger(__name__)

_MAX_LOGGED = 20


@dataclass(frozen=True)
class Sources:
    """The shards in use."""

    by_source: tuple[tuple[Shard, ...], ...]
    """One source for each weight, or one in all."""
    damaged: tuple[str, ...] = ()
    """One line for each shard that is left out."""

    @property
    def shards(self) -> list[Shard]:
        """All of them, numbered through."""
        return list(chain(*self.by_source))

    @property
    def num_images(self) -> int:
        """Images of all shards in use."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def left_out(self) -> dict[str, int]:
        """Samples of the shards in use that must not be used, by kind."""
        counts: Counter[str] = Counter()
        for shard in self.shards:
            counts.update({kind: item.num_samples for kind, item in shard.left_out.items()})
        return dict(counts)

    @property
    def fingerprint(self) -> str:
        """sha256 of all that the order depends on besides the recipe.

        That is the contents of each shard, in the order of the shards; not where they lie, nor
        what they are called.
        """
        contents = [
            [(shard.num_samples, shard.digest) for shard in source] for source in self.by_source
        ]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def open_sources(config: DataConfig) -> Sources:
    """Find and open the shards of ``config``; what is left out is logged.

    Raises:
        DataError: no shards; more than ``max_bad_shards`` of them are damaged, or all of one
            source; more than ``max_bad_share`` of the samples must not be used.
    """
    entries = [[entry] for entry in config.shards] if config.weights else [config.shards]
    by_source, damaged = [], []
    for patterns in entries:
        results = try_open_shards(find_shards(patterns))
        errors = [str(result) for result in results if isinstance(result, DataError)]
        _warn(f"damaged: {error}" for error in errors)
        if len(errors) == len(results):
            names = printable(", ".join(patterns))
            raise DataError(f"all shards of {names} are damaged; the first: {errors[0]}")
        by_source.append(tuple(result for result in results if isinstance(result, Shard)))
        damaged += errors
    sources = Sources(tuple(by_source), tuple(damaged))
    _check_damaged(sources, config.max_bad_shards)
    _check_left_out(sources.shards, config.max_bad_share)
    return sources


def _check_damaged(sources: Sources, max_bad_shards: float) -> None:
    num_damaged, num_shards = len(sources.damaged), len(sources.damaged) + len(sources.shards)
    if num_damaged > max_bad_shards * num_shards:
        enough = math.ceil(100 * num_damaged / num_shards) / 100
        raise DataError(
            f"{num_damaged} of {num_shards} shards damaged; the first: {sources.damaged[0]}; or "
            f"leave such shards out with data.max_bad_shards={enough:g} (now {max_bad_shards:g})"
        )


def _check_left_out(shards: Sequence[Shard], max_bad_share: float) -> None:
    lines = [
        f"shard {printable(shard.path)}: left out {shard.num_left_out} of "
        f"{shard.num_left_out + shard.num_samples} samples: {describe(shard.left_out)}"
        for shard in shards
        if shard.left_out
    ]
    _warn(lines)
    num_left_out = sum(shard.num_left_out for shard in shards)
    num_samples = num_left_out + sum(shard.num_samples for shard in shards)
    if num_left_out > max_bad_share * num_samples:
        raise DataError(
            f"{num_left_out} of {num_samples} samples cannot be used, and data.max_bad_share is "
            f"{max_bad_share:g}; the first: {lines[0]}; list all of them with `radio-distill "
            "shards --check`, and make the shards anew or raise the share"
        )


def _warn(lines: Iterable[str]) -> None:
    lines = list(lines)
    for line in lines[:_MAX_LOGGED]:
        logger.warning("%s", line)
    if len(lines) > _MAX_LOGGED:
        more = len(lines) - _MAX_LOGGED
        logger.warning("and %d shards more; `radio-distill shards --check` lists them", more)
