"""Nested data: dataclasses, mappings and lists as plain data, and the walk through its fields."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal


def plain_data(value: Any, defaults: bool = True) -> Any:
    """Copy nested data, with dataclasses in it, to dicts and lists.

    Without ``defaults``, fields that have theirs are left out.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain_data(getattr(value, field.name), defaults)
            for field in dataclasses.fields(value)
            if defaults or not _has_default(field, value)
        }
    if isinstance(value, Mapping):
        return {key: plain_data(item, defaults) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item, defaults) for item in value]
    return value


def _has_default(field: dataclasses.Field[Any], owner: Any) -> bool:
    value, factory = getattr(owner, field.name), field.default_factory
    if factory is not dataclasses.MISSING:
        return bool(value == factory())
    return field.default is not dataclasses.MISSING and bool(value == field.default)


def leaves(
    value: Any,
    lists: Literal["whole", "numbered", "named", "opened"] = "numbered",
    path: tuple[str, ...] = (),
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield path and value of each field of plain data that holds no others.

    Args:
        value: nested mappings and lists.
        lists: where sections lie in a list, go into it, by number or by their names, or take every
            list ``whole``; ``opened`` goes into all lists.
        path: of ``value`` itself.
    """
    sections = isinstance(value, list) and value and isinstance(value[0], dict)
    if isinstance(value, list) and value and (lists == "opened" or (sections and lists != "whole")):
        named = lists == "named"
        value = {item["name"] if named else place: item for place, item in enumerate(value)}
    if not isinstance(value, dict) or not value:
        yield path, value
        return
    for key, item in value.items():
        yield from leaves(item, lists, (*path, str(key)))
