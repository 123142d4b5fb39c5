"""Under which protocol was a number measured? A name that people know, and a digest of the rest.

``ade20k-linear-40k@1f3a9c02``: the name is what a reader of papers would say, and the eight digits
sum up everything that decides the number (data set and split, sizes, head, steps, optimizer,
version of the metric). Two numbers are compared only where both agree, see
:meth:`.ScoreSet.check_alike`.
"""

import json
from collections.abc import Iterable
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

_NO_PROTOCOL = ("batch_size", "seed", "workers")
"""Fields that decide how, or with which draw, a protocol is run, and not which it is."""
_FOLDERS = ("images", "labels", "segmentation")
"""Fields of `evaluation` that say where somebody's own images lie."""
_QUICK = "-quick"
DATA = "data."
"""How a benchmark's ``sources`` begin where they name a data set."""


def protocol_of(benchmark: Any, name: str = "", **facts: Any) -> str:
    """Return ``NAME@HASH`` for a benchmark, a dataclass whose fields are its protocol.

    All fields count but seeds, batch sizes and where data lies; of a data set by name, the name
    does. A true field ``quick`` ends the name in ``-quick``. A class whose numbers change though
    no field does says so by a class variable ``version``.

    Args:
        benchmark: the benchmark.
        name: what people call the protocol; by default the benchmark's own name.
        facts: what else decides the number: images of each split, classes …; JSON's types.
    """
    sources = getattr(benchmark, "sources", {})
    values: dict[str, Any] = {"version": getattr(benchmark, "version", 1)}
    for field in fields(benchmark):
        source = sources.get(field.name, "")
        if source.startswith(DATA):
            values[field.name] = source.removeprefix(DATA)
        elif field.name not in _NO_PROTOCOL and source not in _FOLDERS:
            values[field.name] = getattr(benchmark, field.name)
    name = name or benchmark.name
    protocol = named_protocol(name, [benchmark.name, values, facts])
    return quick(protocol) if values.get("quick") else protocol


def named_protocol(name: str, parts: Any) -> str:
    """Return ``NAME@HASH`` of anything that JSON can hold."""
    text = json.dumps([name, _plain(parts)], sort_keys=True)
    return f"{name}@{sha256(text.encode()).hexdigest()[:8]}"


def quick(protocol: str) -> str:
    """Return what a protocol is called that was asked of a part of its data, or in short."""
    name, _, digest = protocol.partition("@")
    return protocol if name.endswith(_QUICK) else f"{name}{_QUICK}@{digest}"


def file_names(images: Iterable[str | Path]) -> list[str]:
    """Return what says which images were used, wherever their folder or shard lies."""
    return [Path(image).name for image in images]


def _plain(value: Any) -> Any:
    """Return a value such that 5 and 5.0, and a tuple and a list, are written alike."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
