"""Teachers as people name them on a command line: a preset, or a source and a model of it."""

import re
from collections.abc import Sequence
from pathlib import Path

from radio_distill.config import TeacherConfig
from radio_distill.errors import ConfigError
from radio_distill.registry import nearest

from .options import TEACHERS
from .sources import SOURCES

_FAMILIES = (
    "eupe",  # whose names in timm say dinov3 too
    "dinov3",
    "dinov2",
    "dino",
    "siglip2",
    "siglip",
    "clip",
    "sam3",
    "sam2",
    "sam",
    "radio",
    "croco",
)


def split_name(text: str) -> tuple[str, str]:
    """Split ``[NAME=]TEACHER``; the name is empty where there is none."""
    name, equals, what = text.partition("=")
    # An equals sign may stand in the name of a model.
    return (name, what) if equals and ":" not in name else ("", text)


def named_teachers(texts: Sequence[str], flag: str) -> dict[str, TeacherConfig]:
    """Read ``[NAME=]TEACHER``, several times; ``flag`` is the argument that they were given in.

    Raises:
        ConfigError: an unknown preset or source, or two teachers of one name.
    """
    teachers: dict[str, TeacherConfig] = {}
    for text in texts:
        name, what = split_name(text)
        name = name or _short_name(what)
        config = teacher_named(what)
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise ConfigError(f"{flag} {text}: {name!r} is no name; use letters, digits and _")
        if name in teachers:
            raise ConfigError(f"{flag} {text}: two are called {name!r}; say NAME={what}")
        teachers[name] = config
    return teachers


def teacher_named(what: str) -> TeacherConfig:
    """Read ``PRESET``, ``PRESET:WEIGHTS`` or ``SOURCE:MODEL``; raises ConfigError.

    WEIGHTS is a path; MODEL is a name of that library, or a path.
    """
    presets = TEACHERS.names()
    source, colon, model = what.partition(":")
    if not colon:
        if what not in presets and Path(what).expanduser().exists():
            raise ConfigError(
                f"teacher {what!r} is a file or folder: say SOURCE:PATH, such as student:{what} "
                f"for a run (sources: {', '.join(SOURCES)})"
            )
        if what not in presets:
            raise ConfigError(
                f"no teacher {what!r} ({nearest(what, presets)}); for a model of a library say "
                f"SOURCE:MODEL, such as timm:{what}"
            )
        return TeacherConfig(preset=what)
    if source in presets and source not in SOURCES:
        return TeacherConfig(preset=source, weights=model)
    if source not in SOURCES:
        raise ConfigError(f"no source {source!r} of teachers ({nearest(source, list(SOURCES))})")
    if not model:
        raise ConfigError(f"{what!r} names no model; say {source}:MODEL")
    if source == "student" or Path(model).expanduser().exists():
        return TeacherConfig(preset=source, weights=model)
    return TeacherConfig(preset=source, options={"model": model})


def _short_name(what: str) -> str:
    """Name a teacher by its family where its model or its source names one, else by its model."""
    source, colon, model = what.lower().partition(":")
    model = Path(model if colon else source).name
    for text in (model, source):
        for family in _FAMILIES:
            if family in text:
                return family
    return re.sub(r"\W+", "_", model).strip("_")
