"""Names for exchangeable components: ``name -> "module:attribute"``, imported on first use.

A package writes one table of names. A user's own package adds to it through an entry point
(``[project.entry-points."radio_distill.teachers"]``), without touching this project.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from inspect import signature
from typing import Any

from .errors import ConfigError, UnknownNameError

_LISTED = 600
"""Most characters of names that a message lists."""


def nearest(name: str, known: "list[str] | tuple[str, ...]") -> str:
    """Return ``(did you mean 'x'?)`` or the list of what is known, for an error message.

    Names that begin with the wrong one go before names that are spelt alike; a list that is too
    long for a message is cut, with the number of all.
    """
    begun = sorted((item for item in known if name and item.startswith(name)), key=len)
    close = begun[:3] or get_close_matches(name, list(known), n=1, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    names = sorted(known)
    line = ", ".join(names)
    if len(line) <= _LISTED:
        return f"known: {line}"
    return f"known: {', '.join(names[:3])}, … {len(names)} in all"


def check_takes(
    what: str, target: Any, positional: Sequence[str] = (), keywords: Sequence[str] = ()
) -> None:
    """Raise ConfigError unless a component of the user's can be called as it will be.

    Args:
        what: the component, as the message begins: ``upsampler 'mine'``.
        target: its class or function.
        positional: names of what it gets by position.
        keywords: names of what it gets by keyword.
    """
    call = ", ".join([*positional, *(f"{name}=…" for name in keywords)])
    if not callable(target):
        raise ConfigError(f"{what} is a {type(target).__name__}, and is to be called with ({call})")
    try:
        signature(target).bind(*positional, **dict.fromkeys(keywords))
    except TypeError as error:
        raise ConfigError(f"{what} is called with ({call}): {error}") from error
    except ValueError:  # a builtin, whose arguments nobody knows
        return


def check_has(what: str, component: Any, names: Sequence[str]) -> None:
    """Raise ConfigError naming the attributes that a component of the user's lacks."""
    known = dir(component)  # a class has no __call__ there unless its instances have one
    missing = [name for name in names if name not in known]
    if missing:
        raise ConfigError(f"{what} lacks {', '.join(missing)}; it needs {', '.join(names)}")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


class Registry:
    """A lazy table of one kind of component.

    Args:
        kind: what it holds, in the singular, as error messages say it (``upsampler``).
        entries: ``{name: "module:attribute"}``.
    """

    def __init__(self, kind: str, entries: Mapping[str, str]):
        self.kind = kind
        self._entries: dict[str, str] = {}
        self._plugins_loaded = False
        for name, target in entries.items():
            self.add(name, target)

    def add(self, name: str, target: str) -> None:
        """Register ``module:attribute`` under ``name``; a second registration is an error."""
        if name in self._entries:
            raise ConfigError(
                f"{self.kind} {name!r} is registered twice: as {self._entries[name]} and as "
                f"{target}; rename one of them"
            )
        if ":" not in target:
            raise ConfigError(f"{self.kind} {name!r}: {target!r} is not of the form module:name")
        self._entries[name] = target

    def names(self) -> list[str]:
        """All names, plug-ins included, sorted."""
        self._load_plugins()
        return sorted(self._entries)

    def get(self, name: str) -> Any:
        """Import and return what ``name`` stands for; raises UnknownNameError."""
        self._load_plugins()
        if name not in self._entries:
            raise UnknownNameError(
                f"unknown {self.kind} {name!r} ({nearest(name, list(self._entries))})"
            )
        module, _, attribute = self._entries[name].partition(":")
        shown = f"{self.kind} {name!r} ({self._entries[name]})"
        try:
            found = import_module(module)
        except Exception as error:  # a module of the user's may fail with any
            raise ConfigError(f"{shown} cannot be imported: {_one_line(error)}") from error
        try:
            return getattr(found, attribute)
        except AttributeError as error:
            raise ConfigError(f"{shown}: {module} has no {attribute!r}") from error

    def _load_plugins(self) -> None:
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        for point in entry_points(group=f"radio_distill.{self.kind}s"):
            self.add(point.name, point.value)
