"""From YAML and command-line overrides to a recipe, and back.

One builder reads both, so both give the same messages.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from ..errors import ConfigError
from ..registry import nearest
from ..system.files import reason_of
from .checks import check
from .describing import FIELD_NAMES
from .schema import Recipe

_MOST_VALUES, _MOST_DEPTH = 100_000, 50
_NAMES_TEACHERS = ("teachers", "upsample", "mosaic")
_BY_TEACHER = ("teacher_sizes", "weights", "sha256", "sizes")
"""Fields of stages that hold the names of teachers, in lists and as keys."""
_SIZE_FIELD = re.compile(r"\.size$|\.sizes\.\d+$")
_SIZE = re.compile(r"\d+ ?[xX\N{MULTIPLICATION SIGN}] ?\d+")
"""A size as people write it, ``64x96``: height, then width."""


def load(path: str | Path, overrides: Sequence[str] = (), stage: str = "") -> Recipe:
    """Read a recipe, apply ``a.b.c=value`` overrides, and check it.

    One without a name is called after its file.

    Args:
        path: YAML file.
        overrides: assignments as :func:`override` takes them.
        stage: stage that an override's leading ``stage.`` stands for.

    Raises:
        ConfigError: one line a problem, with the field's full name.
    """
    fields = override(read_yaml(path), overrides, stage)
    recipe = build(Recipe, {"name": Path(path).stem, **fields})
    check(recipe)
    return recipe


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping."""
    try:
        data = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ConfigError, ValueError) as error:  # ValueError: bytes that are no text
        raise ConfigError(f"{path} is not valid YAML: {reason_of(error)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of fields, found {type(data).__name__}")
    return data


def parse_yaml(text: str) -> Any:
    """Parse YAML into plain values; references are unfolded, as far as a recipe can need it.

    Raises:
        ConfigError: no YAML, deeper or larger than any recipe, or a number that no field can hold.
    """
    try:
        value = yaml.safe_load(text)
        return _bounded(value, [_MOST_VALUES], 0)
    except yaml.YAMLError as error:
        raise ConfigError(reason_of(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # `!!int word`, 2024-99-99
        raise ConfigError(f"a value that is none of its kind: {reason_of(error)}") from error
    except RecursionError as error:
        raise ConfigError("nested too deeply") from error


def _bounded(value: Any, left: list[int], depth: int) -> Any:
    """Return a copy; a few lines of references can stand for more than any memory holds."""
    left[0] -= 1
    if left[0] < 0 or depth > _MOST_DEPTH:
        raise ConfigError(f"more than {_MOST_VALUES} values, or nested deeper than {_MOST_DEPTH}")
    if isinstance(value, dict):
        return {
            _bounded(key, left, depth + 1): _bounded(item, left, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_bounded(item, left, depth + 1) for item in value]
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError("a whole number that needs more than 64 bits")
    return value


def assignments_of(path: str | Path) -> list[str]:
    """Read a YAML file of fields to change, as assignments that :func:`override` takes.

    It nests like a recipe; items of a list may be named (``partitions: {high: {size: 512}}``), and
    a list replaces the whole list.
    """
    return [
        f"{name}={yaml.safe_dump(value, default_flow_style=True, width=10**6)}"
        for name, value in _fields(read_yaml(path), "")
    ]


def _fields(value: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in _fields(item, _join(path, key))]
    return [(path, value)]


def override(
    data: Mapping[str, Any], assignments: Sequence[str], stage: str = ""
) -> dict[str, Any]:
    """Return ``data`` with each ``a.b.c=value`` applied; values are read as YAML.

    Items of a list are named by position or by their ``name``
    (``stages.stage3.partitions.high.batch_size=8``); dashes count as underscores in field names.
    A teacher, a stage or a partition is dropped by ``null``; a teacher wherever it is named.
    """
    result = _plain(data)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"override {assignment!r} is not of the form field.name=value")
        keys = path.strip().split(".")
        if stage and keys[0] == "stage":
            keys[:1] = ["stages", stage]
        try:
            value = parse_yaml(text)
        except ConfigError:
            value = text
        _assign(result, keys, value, path)
        if value is None:
            _drop(result, keys)
    return result


def _drop(data: dict[str, Any], keys: list[str]) -> None:
    """Take out what was set to null, where a recipe has any number of its kind."""
    if len(keys) == 2 and keys[0] in ("teachers", "stages"):
        del data[keys[0]][keys[1]]
    if len(keys) == 4 and (keys[0], keys[2]) == ("stages", "partitions"):
        stage = data["stages"][keys[1]]
        stage["partitions"] = [item for item in stage["partitions"] if item is not None]
    if len(keys) == 2 and keys[0] == "teachers":
        _forget(data.get("stages"), keys[1])


def _forget(node: Any, teacher: str) -> None:
    """Take a teacher's name out of the lists and mappings of stages that hold teachers' names."""
    if isinstance(node, list):
        for item in node:
            _forget(item, teacher)
    if not isinstance(node, dict):
        return
    for field, value in node.items():
        if field in _NAMES_TEACHERS and isinstance(value, list):
            node[field] = [name for name in value if name != teacher]
        elif field in _BY_TEACHER and isinstance(value, dict):
            node[field] = {name: item for name, item in value.items() if name != teacher}
        else:
            _forget(value, teacher)


def _assign(node: Any, keys: list[str], value: Any, path: str) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            names = [item.get("name") if isinstance(item, dict) else None for item in node]
            if key in names:
                index = names.index(key)
            elif key.isdigit() and int(key) < len(node):
                index = int(key)
            else:
                known = ", ".join(str(name) for name in names if name) or f"0 to {len(node) - 1}"
                raise ConfigError(f"{path}: no item {key!r} in the list (known: {known})")
            if last:
                node[index] = value
            else:
                node = node[index]
        elif isinstance(node, dict):
            if key not in node and key.replace("-", "_") in FIELD_NAMES:
                key = key.replace("-", "_")
            if last:
                node[key] = value
            else:
                if node.get(key) is None:
                    node[key] = {}
                node = node[key]
        else:
            raise ConfigError(
                f"{path}: {'.'.join(keys[:depth])} is a plain value and has no field {key!r}"
            )


RENAMED = {
    "evaluation.pictures": "evaluation.images",
    "fit.pictures_every": "fit.images_every",
}
"""Fields that were called otherwise before version 0.2.0."""


def with_new_names(data: Any) -> Any:
    """Return the plain data of an earlier version's recipe with today's names of its fields."""
    if not isinstance(data, Mapping):
        return data
    data = {key: dict(item) if isinstance(item, Mapping) else item for key, item in data.items()}
    for old, new in RENAMED.items():
        (section, before), after = old.split("."), new.partition(".")[2]
        if isinstance(data.get(section), dict) and before in data[section]:
            data[section][after] = data[section].pop(before)
    return data


def build(cls: type, data: Any, path: str = "") -> Any:
    """Make a dataclass of plain data; unknown, missing and ill-typed fields are ConfigErrors."""
    where = path or "recipe"
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected fields of {cls.__name__}, got {data!r}")
    fields = {item.name: item for item in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if new := RENAMED.get(_join(path, key)):
            raise ConfigError(f"{_join(path, key)} is called {new} now; rename it")
        if key not in fields:
            raise ConfigError(
                f"unknown field {_join(path, key)!r} ({nearest(str(key), list(fields))})"
            )
        values[key] = _convert(hints[key], value, _join(path, key))
    for name, item in fields.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{_join(path, name)} is missing: {item.metadata['help']}")
    return cls(**values)


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, path)
    if kind is Any:
        return value
    if origin is Literal:
        if value in arguments and type(value) in {type(known) for known in arguments}:
            return value
        raise ConfigError(f"{path}: {value!r} is not one of {', '.join(map(str, arguments))}")
    if origin in (Union, types.UnionType):
        for option_kind in arguments:
            try:
                return _convert(option_kind, value, path)
            except ConfigError:
                continue
        raise ConfigError(f"{path}: {value!r} is not {_kind_name(kind)}")
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected a mapping, got {value!r}")
        return {
            str(key): _convert(arguments[1], item, _join(path, key)) for key, item in value.items()
        }
    if origin is tuple:
        return _convert_tuple(arguments, value, path)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    if kind is str and value is None:  # `pretrained:` with nothing behind it
        return ""
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"{path}: {value!r} is not {_kind_name(kind)}")


def _convert_tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if isinstance(value, str) and _SIZE_FIELD.search(path) and _SIZE.fullmatch(value):
        value = [int(side) for side in re.split(r"\D+", value)]
    if isinstance(value, str) and arguments[0] is str:
        # Not at commas within braces, as in shard-{000,001}.tar.
        value = [part.strip() for part in re.split(r",(?![^{}]*\})", value)] if value else []
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{path}: expected a list, got {value!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_convert(arguments[0], item, _join(path, i)) for i, item in enumerate(value))
    if len(value) != len(arguments):
        raise ConfigError(f"{path}: expected {len(arguments)} values, got {len(value)}")
    pairs = zip(arguments, value, strict=True)
    return tuple(_convert(kind, item, _join(path, i)) for i, (kind, item) in enumerate(pairs))


def _kind_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_kind_name(item) for item in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(item) for item in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a list"
    return names.get(kind, str(kind))


def _plain(value: Any) -> Any:
    """Copy nested data to dicts and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def dump(recipe: Any) -> str:
    """Write a recipe, or a section of one, as YAML that :func:`load` reads back to an equal one."""
    return yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True, width=100)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """List the fields in which two recipes differ, as ``field: old -> new``."""
    before, after = dict(_leaves(_plain(old))), dict(_leaves(_plain(new)))
    names = list(before) + [name for name in after if name not in before]
    return [
        f"{name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in names
        if before.get(name, MISSING) != after.get(name, MISSING)
    ]


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in _leaves(item, _join(path, key))]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [leaf for i, item in enumerate(value) for leaf in _leaves(item, _join(path, i))]
    return [(path, value)]
