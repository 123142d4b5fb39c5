"""Every field of a recipe in words, for ``--help`` and the documentation."""

import dataclasses
import typing
from dataclasses import MISSING
from typing import Any, Literal

from .schema import Recipe


def describe(cls: type = Recipe, path: str = "") -> list[tuple[str, str, str, str]]:
    """List every field as (name, default, unit, explanation), for ``--help`` and the docs.

    ``NAME`` stands for a key of the user's, ``N`` for a position in a list.
    """
    rows = []
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        name, hint = f"{path}.{item.name}" if path else item.name, hints[item.name]
        inner, suffix = _section_of(hint)
        if inner is not None:
            rows += describe(inner, name + suffix)
            continue
        text = item.metadata["help"] + (" [our choice]" if item.metadata["ours"] else "")
        if typing.get_origin(hint) is Literal:
            text += f" ({' | '.join(map(str, typing.get_args(hint)))})"
        rows.append((name, _default_text(item), item.metadata["unit"], text))
    return rows


def _section_of(hint: Any) -> tuple[Any, str]:
    if dataclasses.is_dataclass(hint):
        return hint, ""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is dict and dataclasses.is_dataclass(arguments[1]):
        return arguments[1], ".NAME"
    if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(arguments[0]):
        return arguments[0], ".N"
    return None, ""


def _default_text(item: dataclasses.Field[Any]) -> str:
    if item.default_factory is not MISSING:
        return "none"
    if item.default is MISSING:
        return "required"
    if isinstance(item.default, tuple):
        return ", ".join(map(str, item.default))
    return str(item.default) if item.default != "" else "none"


def _field_names(cls: type) -> set[str]:
    names = {item.name for item in dataclasses.fields(cls)}
    for hint in typing.get_type_hints(cls).values():
        inner, _ = _section_of(hint)
        if inner is not None:
            names |= _field_names(inner)
    return names


FIELD_NAMES = frozenset(_field_names(Recipe))
