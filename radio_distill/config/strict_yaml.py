"""YAML as recipes have it: plain values, each key once, no larger than a recipe can be."""

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from ..system.files import reason_of

_MOST_VALUES, _MOST_DEPTH = 100_000, 50
_TAG = "tag:yaml.org,2002:"
_TEXT, _MERGE = f"{_TAG}str", f"{_TAG}merge"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping."""
    try:
        data = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8; save it in that encoding") from error
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {reason_of(error)}") from error
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"{path}: expected a mapping of fields, found {found}")
    return data


class _Loader(yaml.SafeLoader):
    """A safe loader to which keys are texts, `1` and `on` too, and a repeated one is an error.

    YAML's own would drop the first value.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = key.value, key.start_mark.line + 1
                if name in lines:
                    raise ConfigError(
                        f"{name!r} stands in lines {lines[name]} and {line}; keep one"
                    )
                lines[name] = line
                if key.tag != _MERGE:
                    key.tag = _TEXT
        return node


def _resolve_plain_numbers_alone() -> None:
    """Let 2026-12-01, 1:30 and 007 be texts, which YAML 1.1 reads as a day, as 90 and as 7."""
    numbers = {
        "int": r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)",
        "float": r"([-+]?[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    }
    dropped = {f"{_TAG}{kind}" for kind in (*numbers, "timestamp", "value")}
    _Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in dropped]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for kind, pattern in numbers.items():
        whole = re.compile(f"^(?:{pattern})$")
        _Loader.add_implicit_resolver(f"{_TAG}{kind}", whole, list("-+.0123456789"))


_resolve_plain_numbers_alone()


def parse_yaml(text: str) -> Any:
    """Parse YAML into plain values; references are unfolded, as far as a recipe can need it.

    Raises:
        ConfigError: no YAML, deeper or larger than any recipe, a field that is written twice, or a
            number that no field can hold.
    """
    try:
        value = yaml.load(text, _Loader)
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


def yaml_line(value: Any) -> str:
    """Write plain data as one line of YAML, as an assignment has it."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")
