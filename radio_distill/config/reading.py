"""From YAML and command-line overrides to a recipe, and back.

One builder reads both, so both give the same messages.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml

from ..errors import ConfigError
from ..registry import nearest
from ..system.nested import leaves, plain_data
from .fields import Range, describe_fields, joined
from .rules import check
from .schema import Recipe
from .strict_yaml import parse_yaml, read_yaml, yaml_line

_FIELD_NAMES = frozenset(part for name, *_ in describe_fields(Recipe) for part in name.split("."))
_NAMES_TEACHERS = ("teachers", "upsample", "mosaic")
_BY_TEACHER = ("teacher_sizes", "weights", "sha256", "sizes", "heads")
"""Fields of student and stages that hold the names of teachers, in lists and as keys."""
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


def assignments_of(path: str | Path) -> list[str]:
    """Read a YAML file of fields to change, as assignments that :func:`override` takes.

    It nests like a recipe; items of a list may be named (``partitions: {high: {size: 512}}``), and
    a list replaces the whole list.
    """
    return [
        f"{'.'.join(keys)}={yaml_line(value)}" for keys, value in leaves(read_yaml(path), "whole")
    ]


def override(
    data: Mapping[str, Any], assignments: Sequence[str], stage: str = ""
) -> dict[str, Any]:
    """Return ``data`` with each ``a.b.c=value`` applied; values are read as YAML.

    Items of a list are named by position or by their ``name``
    (``stages.stage3.partitions.high.batch_size=8``); dashes count as underscores in field names.
    A teacher, a stage or a partition is dropped by ``null``; a teacher wherever it is named.
    """
    result = plain_data(data)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"override {assignment!r} is not of the form field.name=value")
        keys = path.strip().split(".")
        if stage and keys[0] == "stage":
            keys[:1] = ["stages", stage]
        keys = _with_whole_names(result, keys)
        value = _value_of(text)
        if value is None and len(keys) == 2 and keys[0] in ("teachers", "stages"):
            _drop(result, *keys)
            continue
        _assign(result, keys, value, path)
        if value is None and len(keys) == 4 and (keys[0], keys[2]) == ("stages", "partitions"):
            items = result["stages"][keys[1]]["partitions"]
            result["stages"][keys[1]]["partitions"] = [item for item in items if item is not None]
    return result


def _value_of(text: str) -> Any:
    """Read a value as YAML; ` #` is a part of it, as in a folder `my #1`, and begins no comment."""
    try:
        value = parse_yaml(text)
    except ConfigError:
        return text
    before, comment, _ = f" {text}".partition(" #")
    return text.strip() if comment and (value or "") == before.strip() else value


def _with_whole_names(node: Any, parts: Sequence[str]) -> list[str]:
    """Join what was parted at the dots of a name, such as that of a stage `stage1.5`."""
    keys: list[str] = []
    while parts:
        children = node if isinstance(node, dict) else {}
        if isinstance(node, list):
            children = {str(item.get("name")): item for item in node if isinstance(item, dict)}
            children |= {str(place): item for place, item in enumerate(node)}
        lengths = range(len(parts), 1, -1)
        length = next((n for n in lengths if ".".join(parts[:n]) in children), 1)
        keys.append(".".join(parts[:length]))
        node, parts = children.get(keys[-1]), parts[length:]
    return keys


def _drop(data: dict[str, Any], section: str, name: str) -> None:
    """Take out a stage, or a teacher wherever it is named."""
    known = data.get(section)
    if not isinstance(known, dict) or name not in known:
        names = list(known) if isinstance(known, dict) else []
        raise ConfigError(f"{section}.{name}: there is none to drop ({nearest(name, names)})")
    del known[name]
    for place in ("student", "stages") if section == "teachers" else ():
        _forget(data.get(place), name)


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
        place: str | int = key
        if isinstance(node, list):
            place = _place_in(node, key, path)
        elif not isinstance(node, dict):
            raise ConfigError(
                f"{path}: {'.'.join(keys[:depth])} is a plain value and has no field {key!r}"
            )
        elif key not in node and key.replace("-", "_") in _FIELD_NAMES:
            place = key.replace("-", "_")
        if depth == len(keys) - 1:
            node[place] = value
        elif isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        node = node[place]


def _place_in(items: list[Any], key: str, path: str) -> int:
    """Return the position of the item of a list that a key names, or that it numbers."""
    names = [str(item.get("name", "")) if isinstance(item, dict) else "" for item in items]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(items):
        return int(key)
    known = ", ".join(filter(None, names)) or f"0 to {len(items) - 1}"
    raise ConfigError(f"{path}: no item {key!r} in the list (known: {known})")


RENAMED = {
    "evaluation.pictures": "evaluation.images",
    "fit.pictures_every": "fit.images_every",
    "log.tensorboard": "log.trackers",
}
"""Fields that were called otherwise before version 0.2.0."""

REMOVED = {"weight_anchor": (0.0, "the stage's `anchor` holds the student near its start")}
"""Fields of the first 0.2.0: what each was where nobody set it, and what there is instead."""

_TRACKERS = {True: ["tensorboard"], False: []}  # of log.tensorboard


def with_new_names(data: Any) -> Any:
    """Return the plain data of an earlier version's recipe with today's names of its fields.

    Those that are gone are left out where nobody had set them.
    """
    if not isinstance(data, Mapping):
        return data
    data = _without_removed(data)
    for old, new in RENAMED.items():
        (section, before), after = old.split("."), new.partition(".")[2]
        if isinstance(data.get(section), dict) and before in data[section]:
            value = data[section].pop(before)
            data[section][after] = _TRACKERS.get(value, value) if after == "trackers" else value
    return data


def _without_removed(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {
            key: _without_removed(item)
            for key, item in data.items()
            if key not in REMOVED or item != REMOVED[key][0]
        }
    return list(map(_without_removed, data)) if isinstance(data, list) else data


class _NumberError(ConfigError):
    """A number that its field does not take."""


def build(cls: type, data: Any, path: str = "") -> Any:
    """Make a dataclass of plain data.

    Raises:
        ConfigError: for fields that are unknown, missing, of another type or out of their range,
            one line each.
    """
    if not isinstance(data, Mapping):
        got = "nothing; take it out, or write fields below it" if data is None else repr(data)
        raise ConfigError(f"{path or 'recipe'}: expected a mapping of fields, got {got}")
    fields = {item.name: item for item in dataclasses.fields(cls)}
    kinds = typing.get_type_hints(cls, include_extras=True)
    problems: list[str] = []
    for key in data:
        name = joined(path, key)
        if new := RENAMED.get(name):
            problems.append(f"{name} is called {new} now; rename it")
        elif key in REMOVED and key not in fields:
            problems.append(f"{name} is gone: {REMOVED[key][1]}; take it out")
        elif key not in fields:
            problems.append(f"unknown field {name!r} ({nearest(str(key), list(fields))})")
    for name, item in fields.items():
        if name not in data and item.default is MISSING and item.default_factory is MISSING:
            said = item.metadata.get("help", f"a field of {cls.__name__}")
            problems.append(f"{joined(path, name)} is missing: {said}")
    known = [key for key in data if key in fields]
    values: list[Any] = []
    try:
        values = _convert_each(path, [(key, kinds[key], data[key]) for key in known])
    except ConfigError as error:
        problems += error.args
    if problems:
        raise ConfigError(*problems)
    return cls(**dict(zip(known, values, strict=True)))


def build_options(
    target: Any, options: Mapping[str, Any], path: str, given: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the keyword arguments of a component as the types that its signature says.

    Args:
        target: its class.
        options: by name.
        path: what a message begins with.
        given: arguments that are no options, as something else decides them.

    Raises:
        ConfigError: for those that it does not take, or of another type or range, a line each.
    """
    parameters = signature(target).parameters.values()
    named = [it.name for it in parameters if it.kind in (it.POSITIONAL_OR_KEYWORD, it.KEYWORD_ONLY)]
    known = [name for name in named if name not in given]
    lacking = "no option {!r} ({})" if known else "it takes no options, not {!r}"
    problems = [
        f"{path}: {lacking.format(name, nearest(name, known))}"
        for name in options
        if name not in known
    ]
    try:
        kinds = typing.get_type_hints(target.__init__, include_extras=True)
    except NameError:  # a class of the user's whose types only a type checker imports
        kinds = {}
    items = [(name, kinds.get(name, Any), value) for name, value in options.items()]
    try:
        values = _convert_each(path, [item for item in items if item[0] in known])
    except ConfigError as error:
        problems += error.args
    if problems:
        raise ConfigError(*problems)
    return dict(zip(options, values, strict=True))


def _convert_each(path: str, items: Iterable[tuple[Any, Any, Any]]) -> list[Any]:
    """Convert (name, type, value) of each field; raises ConfigError with all that is wrong."""
    values: list[Any] = []
    problems: list[str] = []
    for name, kind, value in items:
        try:
            values.append(_convert(kind, value, joined(path, name)))
        except ConfigError as error:
            problems += error.args
    if problems:
        raise ConfigError(*problems)
    return values


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, path)
    if origin is Annotated:
        number = _convert(arguments[0], value, path)
        for limits in filter(lambda item: isinstance(item, Range), arguments[1:]):
            if problem := limits.problem(number):
                raise _NumberError(f"{path}: {number} {problem}")
        return number
    if origin is Literal:
        if value in arguments and type(value) in {type(known) for known in arguments}:
            return value
        raise ConfigError(f"{path}: {value!r} is not one of {', '.join(map(str, arguments))}")
    if origin in (Union, types.UnionType):
        if types.NoneType in arguments:
            return None if value is None else _convert(arguments[0], value, path)
        mappings = [item for item in arguments if typing.get_origin(item) is dict]
        if isinstance(value, Mapping) and mappings:
            return _convert(mappings[0], value, path)
        for option_kind in sorted(arguments, key=lambda item: item is not type(value)):
            try:
                return _convert(option_kind, value, path)
            except _NumberError:
                raise
            except ConfigError:
                continue
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected a mapping, got {value!r}")
        if typing.get_origin(arguments[0]) is Literal:
            for key in value:
                _convert(arguments[0], key, path)
        items = _convert_each(path, ((key, arguments[1], item) for key, item in value.items()))
        return dict(zip(map(str, value), items, strict=True))
    if origin is tuple:
        return _convert_tuple(arguments, value, path)
    return _convert_plain(kind, value, path)


def _convert_plain(kind: Any, value: Any, path: str) -> Any:
    """Convert a number, a text, true or false."""
    if kind is Any or (kind in (bool, int) and type(value) is kind):
        return value
    if kind is int and type(value) in (str, float):  # YAML reads 1e5 as a text
        with suppress(ValueError, OverflowError):
            if float(value).is_integer():
                return int(float(value))
    if kind is float and not isinstance(value, bool):
        with suppress(TypeError, ValueError, OverflowError):
            if math.isfinite(number := float(value)):
                return number
            raise _NumberError(f"{path}: {value} is not a finite number")
    if kind is str and (value is None or type(value) in (str, int)):
        return "" if value is None else str(value)  # `pretrained:` with nothing behind it
    quotes = "; put it in quotes" if kind is str and isinstance(value, (bool, float)) else ""
    raise ConfigError(f"{path}: {value!r} is not {_kind_name(kind)}{quotes}")


def _convert_tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if isinstance(value, str) and _SIZE_FIELD.search(path) and _SIZE.fullmatch(value):
        value = [int(side) for side in re.split(r"\D+", value)]
    is_text = arguments[0] is str or typing.get_origin(arguments[0]) is Literal
    if isinstance(value, str) and (is_text or "," in value):
        # Not at commas within braces, as in shard-{000,001}.tar.
        value = [part.strip() for part in re.split(r",(?![^{}]*\})", value)] if value else []
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{path}: expected a list, got {value!r}")
    kinds = arguments
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        kinds = (arguments[0],) * len(value)
    if len(value) != len(kinds):
        raise ConfigError(f"{path}: expected {len(kinds)} values, got {len(value)}")
    names = [item.get("name") if isinstance(item, Mapping) else None for item in value]
    shown = [name or index for index, name in enumerate(names)]
    return tuple(_convert_each(path, zip(shown, kinds, value, strict=True)))


def _kind_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    names |= {tuple: "a list", dict: "a mapping"}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_kind_name, arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is Annotated:
        return _kind_name(arguments[0])
    return names.get(origin or kind, str(kind))


def dump(recipe: Any) -> str:
    """Write a recipe, or a section of one, as YAML that :func:`load` reads back to an equal one."""
    return yaml.safe_dump(plain_data(recipe), sort_keys=False, allow_unicode=True, width=100)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """List the fields in which two recipes differ, as ``field: old -> new``."""
    before, after = dict(leaves(plain_data(old))), dict(leaves(plain_data(new)))
    names = list(before) + [name for name in after if name not in before]
    return [
        f"{'.'.join(name)}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in names
        if before.get(name, MISSING) != after.get(name, MISSING)
    ]
