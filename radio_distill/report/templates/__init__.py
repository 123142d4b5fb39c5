"""The pages' templates, and how they are filled in."""

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def render_template(name: str, **values: Any) -> str:
    """Fill in a template of this folder; every text that is not markup of its own is escaped."""
    return _environment().get_template(name).render(**values)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader(__name__, "")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
