"""Write a recipe to begin with: one stage, one teacher, and a word on each line.

radio-distill init mine
radio-distill shards ~/Images data/mine
radio-distill plan mine
radio-distill train mine
"""

import argparse
import re
from pathlib import Path

from radio_distill.config.recipes import recipe_names
from radio_distill.errors import ConfigError
from radio_distill.system.files import reason_of

STARTER = Path(__file__).with_name("starter.yaml")
NAME = "mine"
"""What the starter calls itself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill init``."""
    parser.add_argument("name", nargs="?", default=NAME, help=f"of the recipe (default: {NAME})")


def run(arguments: argparse.Namespace) -> int:
    """Write ``NAME.yaml`` into this folder; a file that is there stays as it is."""
    path = write_starter(arguments.name.removesuffix(".yaml"))
    print(
        f"{path}: change it, then radio-distill plan {path.stem}; radio-distill train {path.stem}"
    )
    return 0


def write_starter(name: str) -> Path:
    """Write the starter under a name.

    Raises:
        ConfigError: a name that is no plain one or that the project's recipes have, or a file that
            is there or cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
        raise ConfigError(f"{name!r} is no name for a recipe: use letters, digits, - and _")
    if name in recipe_names():
        raise ConfigError(f"recipe {name!r} comes with the project; choose another name")
    path = Path(f"{name}.yaml")
    text = STARTER.read_text(encoding="utf-8")
    text = text.replace(f"name: {NAME}\n", f"name: {name}\n").replace(
        f"data/{NAME}", f"data/{name}"
    )
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"{path} is there; choose another name, or move it") from error
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {reason_of(error)}") from error
    return path
