"""List every field of a recipe with its unit, its default and what it does.

radio-distill fields stages.NAME
"""

import argparse

from radio_distill.config import Recipe, describe_fields
from radio_distill.errors import ConfigError
from radio_distill.registry import nearest
from radio_distill.system.progress import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill fields``."""
    parser.add_argument("prefix", nargs="?", default="", help="show only fields that begin so")


def run(arguments: argparse.Namespace) -> int:
    """Print the fields."""
    rows = [row for row in describe_fields(Recipe) if row[0].startswith(arguments.prefix)]
    if not rows:
        names = [row[0] for row in describe_fields(Recipe)]
        raise ConfigError(
            f"no field begins with {arguments.prefix!r} ({nearest(arguments.prefix, names)})"
        )
    print_table(
        ("field", "default", "unit", "what it does"),
        ((f"--{name}", *others) for name, *others in rows),
    )
    return 0
