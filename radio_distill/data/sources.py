"""The shards that a run reads, by source, and what is left out of them before it starts.

A damaged shard, and a sample that must not be used, are told from the rest before the first step,
and so is a shard without any image, which is no fault. So the order of a run is that of what is
whole: they cost nothing later, and stand in no count of bad images. Both have a budget, above which
the run does not start.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from ..config import DataConfig
from ..errors import DataError
from ..system.files import printable
from .cache import cache_of
from .curation import apply_curation
from .find import find_shards, say_once
from .remote import without_secrets
from .tar_index import BESIDE, Shard, try_open_shards
from .tar_scan import NOTES, describe

_MAX_LOGGED = 20


@dataclass(frozen=True)
class Sources:
    """The shards in use."""

    by_source: tuple[tuple[Shard, ...], ...]
    """One source for each weight, or one in all."""
    damaged: tuple[str, ...] = ()
    """One line for each shard that is left out."""
    empty: tuple[Shard, ...] = ()
    """Shards without an image that can be used."""

    @property
    def shards(self) -> list[Shard]:
        """All of them, numbered through."""
        return list(chain(*self.by_source))

    @property
    def num_images(self) -> int:
        """Images of all shards in use."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """sha256 of all that the order depends on besides the recipe.

        That is the contents of each shard, in the order of the shards, and what a curation keeps
        of them; not where they lie, nor what they are called.
        """
        contents = [
            [(shard.num_samples, shard.digest + shard.chosen.hex()) for shard in source]
            for source in self.by_source
        ]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def open_sources(config: DataConfig) -> Sources:
    """Find and open the shards of ``config``; what is left out is logged.

    Raises:
        DataError: no shards; more than ``max_bad_shards`` of them are damaged, or all of one
            source; more than ``max_bad_share`` of the samples must not be used; ``curation`` does
            not fit them.
    """
    entries = [[entry] for entry in config.shards] if config.weights else [config.shards]
    by_source, damaged, empty = [], [], []
    for patterns in entries:
        found = find_shards(patterns, cache_of(config))
        for note in found.notes:
            say_once(f"data.shards: {note}", logging.INFO)
        results = try_open_shards(found.paths, index_folders(config))
        errors = [str(result) for result in results if isinstance(result, DataError)]
        _warn(f"damaged: {error}" for error in errors)
        shards = [result for result in results if isinstance(result, Shard)]
        if not any(shard.num_samples for shard in shards):
            names = printable(", ".join(map(without_secrets, patterns)))
            raise DataError(_why_none(names, shards, errors))
        by_source.append(tuple(shard for shard in shards if shard.num_samples))
        empty += [shard for shard in shards if not shard.num_samples]
        damaged += errors
    sources = Sources(tuple(by_source), tuple(damaged), tuple(empty))
    _check_damaged(sources, config.max_bad_shards)
    _check_left_out([*sources.shards, *empty], config.max_bad_share)
    _warn(f"shard {printable(shard.path)} has no images" for shard in empty)
    for line in describe_notes(sources.shards):
        say_once(f"data.shards: {line}", logging.INFO)
    if config.curation:
        path = Path(config.curation).expanduser()
        return replace(sources, by_source=tuple(apply_curation(path, sources.by_source)))
    return sources


def index_folders(config: DataConfig) -> Sequence[str]:
    """Return the folders that `data.index` names, in the order in which they are tried."""
    return (BESIDE,) if config.index == "auto" else config.index


def describe_notes(shards: Iterable[Shard]) -> list[str]:
    """Say what is notable about the members of shards and no fault, one line a kind."""
    shards, lines = list(shards), []
    for kind, text in NOTES.items():
        if items := [shard.notes[kind] for shard in shards if kind in shard.notes]:
            number, first = sum(item.num_samples for item in items), items[0].names[0]
            lines.append(f"{number} members are {text} ({first}{', …' * (number > 1)})")
    return lines


def _why_none(names: str, shards: Sequence[Shard], errors: Sequence[str]) -> str:
    """Say why the shards of a source hold nothing that can be used."""
    if not shards:
        return f"all shards of {names} are damaged; the first: {errors[0]}"
    words = [f"{len(shards)} without images", *([f"{len(errors)} damaged"] if errors else [])]
    if first := next((shard for shard in shards if shard.left_out), None):
        words.append(f"the first: {printable(first.path)}, left out {describe(first.left_out)}")
    return f"no images in the shards of {names}: {'; '.join(words)}"


def _check_damaged(sources: Sources, max_bad_shards: float) -> None:
    num_damaged = len(sources.damaged)
    num_shards = num_damaged + len(sources.shards) + len(sources.empty)
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
        say_once(line)
    if len(lines) > _MAX_LOGGED:
        more = len(lines) - _MAX_LOGGED
        say_once(f"and {more} shards more; `radio-distill shards --check` lists them")
