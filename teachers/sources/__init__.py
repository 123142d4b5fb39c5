"""Sources of encoders: one module for each library, by a name of its own.

A source is a module with a table ``ARGUMENTS`` (its options, and what each is) and four functions:

    complete(preset, weights) -> Preset    fill in what is open; weights is the recipe's, or empty
    build(preset) -> nn.Module             normalised pixels to (summary or None, map)
    locate(preset) -> Path                 the weights, where the recipe names none
    load(preset, path) -> nn.Module        build, with these weights

A module of the user's own is named in full by the ``source`` of a preset.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from radio_distill.errors import ConfigError
from radio_distill.registry import check_has, check_takes
from radio_distill.system.files import reason_of

SOURCES = {
    "timm": "teachers.sources.timm",
    "open_clip": "teachers.sources.open_clip",
    "transformers": "teachers.sources.transformers",
    "radio": "teachers.sources.radio",
    "croco": "teachers.sources.croco",
    "student": "teachers.sources.student",
}
_FUNCTIONS = {
    "complete": ("preset", "weights"),
    "build": ("preset",),
    "locate": ("preset",),
    "load": ("preset", "path"),
}


def find_source(name: str) -> Any:
    """Return the module of a source; raises ConfigError where one of the user's lacks something."""
    module = SOURCES.get(name, name)
    try:
        source = import_module(module)
    except Exception as error:  # a module of the user's may fail with any
        reason = f"{type(error).__name__}: {reason_of(error)}"[:200]
        raise ConfigError(f"source {module!r} cannot be imported: {reason}") from error
    if name in SOURCES:
        return source
    what = f"source {module!r}"
    check_has(what, source, ("ARGUMENTS", *_FUNCTIONS))
    if not isinstance(source.ARGUMENTS, Mapping):
        kind = type(source.ARGUMENTS).__name__
        raise ConfigError(
            f"{what}: ARGUMENTS is a {kind}, not a mapping of its options to what each is"
        )
    for function, takes in _FUNCTIONS.items():
        check_takes(f"{what}: {function}", getattr(source, function), takes)
    return source
