"""Which samples of some shards are trained on: the file that `radio-distill curate` writes.

The shards stay as they are. The file is text: a head line, which holds the sha256 of the rest, and
one line a shard, in which the kept samples are set bits, most significant first. A shard is known
by its contents (``Shard.digest``), so it may move or be renamed.
"""

import hashlib
import json
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..system.files import open_regular, printable, reason_of, replacing
from .find import say_once
from .tar_index import Shard

VERSION = 1
_MAKE = "make one with `radio-distill curate`"


@dataclass(frozen=True)
class Curation:
    """The contents of the file."""

    settings: Mapping[str, Any]
    """How it was made; nothing here depends on it."""
    shards: tuple[tuple[str, int, str, bytes], ...]
    """Name, number of samples, digest, and the samples in use as packed bits."""


def write_curation(
    path: Path, shards: Sequence[Shard], kept: np.ndarray, settings: Mapping[str, Any]
) -> None:
    """Write the file, whole or not at all; equal arguments give equal bytes.

    Args:
        path: of the file.
        shards: that were curated.
        kept: bool ``[N]``, of the samples of all shards one after the other.
        settings: how it was made.
    """
    ends = np.cumsum([shard.num_samples for shard in shards])
    assert len(kept) == (ends[-1] if len(ends) else 0), "one truth value a sample"
    lines = [
        json.dumps([printable(shard.path.name), shard.num_samples, shard.digest, _pack(bits).hex()])
        for shard, bits in zip(shards, np.split(kept, ends[:-1]), strict=True)
    ]
    head = {"curation": VERSION, "sha256": _sha256(lines), "settings": dict(settings)}
    with replacing(path) as draft:
        draft.write_text("\n".join([json.dumps(head), *lines, ""]), encoding="utf-8")


def read_curation(path: Path) -> Curation:
    """Read the file; raises DataError where it is not there, or not whole."""
    try:
        with open_regular(path) as file:
            head_line, *lines = file.read().decode().splitlines()
        head = json.loads(head_line)
        if head["curation"] != VERSION:
            raise DataError(f"data.curation: {path} is of another version; {_MAKE}")
        if head["sha256"] != _sha256(lines):
            raise DataError(f"data.curation: {path} is not whole; {_MAKE}")
        rows = (json.loads(line) for line in lines)
        shards = tuple(
            (name, size, digest, bytes.fromhex(bits)) for name, size, digest, bits in rows
        )
        return Curation(head["settings"], shards)
    except OSError as error:
        raise DataError(f"data.curation: {path}: {reason_of(error)}; {_MAKE}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"data.curation: {path} is no such file; {_MAKE}") from error


def apply_curation(path: Path, by_source: Sequence[Sequence[Shard]]) -> list[tuple[Shard, ...]]:
    """Return the shards of each source with the kept samples alone, without those that keep none.

    Of shards with equal contents the first is the first of the file, and so on.

    Raises:
        DataError: the file cannot be read, was made for other shards, or keeps nothing of a source.
    """
    curation = read_curation(path)
    known: dict[str, deque[bytes]] = {}
    for _, _, digest, bits in curation.shards:
        known.setdefault(digest, deque()).append(bits)
    found, total, used = [], 0, 0
    for shards in by_source:
        curated = []
        for shard in shards:
            if not known.get(shard.digest):
                raise DataError(
                    f"data.curation: {path} was made for other shards: it does not know "
                    f"{printable(shard.path)}; {_MAKE} for these shards"
                )
            bits = known[shard.digest].popleft()
            number = len(kept_samples(bits))
            total, used = total + shard.num_samples, used + number
            if number:
                curated.append(replace(shard, num_samples=number, chosen=bits))
        if not curated:
            raise DataError(
                f"data.curation: {path} keeps no image of {printable(shards[0].path)} and the "
                f"other shards of its entry; leave the entry out, or {_MAKE}"
            )
        found.append(tuple(curated))
    say_once(f"data.curation: {used:,} of {total:,} images are in use", logging.INFO)
    return found


def kept_samples(bits: bytes) -> np.ndarray:
    """Return the numbers of the samples whose bits are set, rising."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8)))


def _pack(kept: np.ndarray) -> bytes:
    return np.packbits(kept).tobytes()


def _sha256(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
