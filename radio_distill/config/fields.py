"""Fields of a recipe: how they are declared, which numbers they take, what they are in words."""

import dataclasses
import math
import typing
from dataclasses import MISSING, dataclass, field
from functools import partial
from typing import Annotated, Any, Literal


def option(default: Any = MISSING, help: str = "", unit: str = "", ours: bool = False) -> Any:
    """Declare a recipe field: default, what it does, its unit.

    ``ours`` marks a default that no paper publishes, so that the documentation can say so.
    """
    metadata = {"help": help, "unit": unit, "ours": ours}
    if isinstance(default, type):  # a section, dict or tuple
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


our_option = partial(option, ours=True)


@dataclass(frozen=True)
class Range:
    """Numbers that a field takes; without ``including`` the least is not one of them.

    With a ``step`` they are the least, so much more, and so on.
    """

    least: float
    most: float = math.inf
    including: bool = True
    step: int = 0

    def problem(self, value: float) -> str:
        """Say why a number is not one of them; empty where it is."""
        is_step = not self.step or (value - self.least) % self.step == 0
        is_above = value >= self.least if self.including else value > self.least
        if is_above and value <= self.most and is_step:
            return ""
        least, most = f"{self.least:,.10g}", f"{self.most:,.10g}"
        if not self.including:
            return f"is not above {least}" + (f", at most {most}" if self.most < math.inf else "")
        if self.step:
            numbers = ", ".join(f"{self.least + self.step * n:g}" for n in range(3))
            return f"is not one of {numbers}, …" + (f" {most}" if self.most < math.inf else "")
        return f"is not {least} to {most}" if self.most < math.inf else f"is below {least}"


Count = Annotated[int, Range(0)]
"""A whole number from 0 on; where 0 stands for something else, the field says so."""
Positive = Annotated[int, Range(1)]
Odd = Annotated[int, Range(1, step=2)]
Side = Annotated[int, Range(1, 65_536)]
"""Pixels a side."""
SmallCount = Annotated[int, Range(0, 1024)]
"""Layers, tokens or processes, of which more would be a mistake or an attack."""
Share = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0)]
Seconds = Annotated[float, Range(0, 1e9)]
Auto = Literal["auto"]
"""A field that gets a plain value when a stage or a fit starts; see :mod:`.resolve`."""
AboveZero = Annotated[float, Range(0, including=False)]


def size_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a size that may be given as one side."""
    return (size, size) if isinstance(size, int) else size


def share_of(amount: int | float | Literal["auto"], whole: int) -> int:
    """Return a number that may be given as a share below 1 of ``whole``, in a resolved recipe."""
    assert amount != "auto", "the recipe is not resolved"
    return round(amount * whole) if 0 < amount < 1 else int(amount)


def plain(value: int | Literal["auto"]) -> int:
    """Return a value of a resolved recipe, which is `auto` nowhere that matters."""
    assert value != "auto", "the recipe is not resolved"
    return value


def joined(path: str, key: Any) -> str:
    """Return the full name of a field within a section."""
    return f"{path}.{key}" if path else str(key)


def describe_fields(cls: type, path: str = "") -> list[tuple[str, str, str, str]]:
    """List every field as (name, default, unit, explanation), for ``--help`` and the docs.

    ``NAME`` stands for a key of the user's, ``N`` for a position in a list.

    Args:
        cls: dataclass of a section.
        path: name of the section itself.
    """
    rows = []
    kinds = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        name, kind = joined(path, item.name), kinds[item.name]
        section, suffix = _section_of(kind)
        if section is not None:
            rows += describe_fields(section, name + suffix)
            continue
        text = item.metadata["help"] + (" [our choice]" if item.metadata["ours"] else "")
        if choices := _choices(kind):
            text += f" ({' | '.join(map(str, choices))})"
        rows.append((name, _default_text(item), item.metadata["unit"], text))
    return rows


def _choices(kind: Any) -> tuple[Any, ...]:
    """Return the words that a field takes, as it is or as keys of weights."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return arguments
    if typing.get_origin(kind) is dict:
        return _choices(arguments[0])
    is_weighted = len(arguments) == 2 and typing.get_origin(arguments[1]) is dict
    return _choices(arguments[0]) if is_weighted else ()


def _section_of(kind: Any) -> tuple[Any, str]:
    """Return the dataclass of the sections that a field holds, and what stands for their names."""
    if dataclasses.is_dataclass(kind):
        return kind, ""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is dict and dataclasses.is_dataclass(arguments[1]):
        return arguments[1], ".NAME"
    if typing.get_origin(kind) is tuple and dataclasses.is_dataclass(arguments[0]):
        return arguments[0], ".N"
    return None, ""


def _default_text(item: dataclasses.Field[Any]) -> str:
    if item.default_factory is not MISSING or item.default in ("", None):
        return "none"
    if item.default is MISSING:
        return "required"
    if isinstance(item.default, tuple):
        return ", ".join(map(str, item.default))
    return str(item.default)
