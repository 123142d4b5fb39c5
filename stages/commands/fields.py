"""List every field of a recipe with its unit, its default and what it does.

radio-distill fields stages.NAME
"""

import argparse

from rich.table import Table

from radio_distill.config import Recipe, describe_fields
from radio_distill.system.progress import table_console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill fields``."""
    parser.add_argument("prefix", nargs="?", default="", help="show only fields that begin so")


def run(arguments: argparse.Namespace) -> int:
    """Print the fields."""
    rows = [row for row in describe_fields(Recipe) if row[0].startswith(arguments.prefix)]
    table = Table("field", "default", "unit", "what it does", box=None, pad_edge=False)
    for name, default, unit, text in rows:
        table.add_row(f"--{name}", default, unit, text)
    table_console().print(table)
    return 0
