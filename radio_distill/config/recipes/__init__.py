"""Recipes by name: those of a folder that comes with the project, and files of one's own."""

import logging
import os
from pathlib import Path

from ...errors import ConfigError
from ...registry import nearest

logger = logging.getLogger(__name__)


RECIPES = Path(__file__).parent
"""Folder of the project's own recipes."""


def recipe_names(folder: Path = RECIPES) -> list[str]:
    """List the names of the recipes in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """Return a recipe's file: a path, a name of the project's, or NAME of a ``NAME.yaml`` here.

    Args:
        name: as a person writes it.

    Raises:
        ConfigError: there is none.
    """
    if Path(name).suffix in (".yaml", ".yml") or os.sep in name:
        if not Path(name).is_file():
            raise ConfigError(f"no recipe file {name}")
        return Path(name)
    own = [path for path in (Path(f"{name}.yaml"), Path(name)) if path.is_file()]
    if name in recipe_names():
        if own:
            logger.warning("recipe %s is the project's own; yours is ./%s", name, own[0])
        return RECIPES / f"{name}.yaml"
    if not own:
        known = [*recipe_names(), *recipe_names(Path())]
        raise ConfigError(
            f"unknown recipe {name!r} ({nearest(name, known)}), and no file {name}.yaml; "
            "`radio-distill init NAME` writes one to begin with"
        )
    return own[0]
