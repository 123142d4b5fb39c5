"""Recipes by name: those of a folder that comes with the project, and files of one's own."""

import logging
import os
from pathlib import Path

from ..errors import ConfigError
from ..registry import nearest

logger = logging.getLogger(__name__)


def recipe_names(shipped: Path) -> list[str]:
    """Names of the recipes in a folder."""
    return sorted(path.stem for path in shipped.glob("*.yaml"))


def find_recipe(name: str, shipped: Path) -> Path:
    """Return a recipe's file: a path, a name of the project's, or NAME of a ``NAME.yaml`` here.

    Args:
        name: as a person writes it.
        shipped: folder of the project's recipes.

    Raises:
        ConfigError: there is none.
    """
    if Path(name).suffix in (".yaml", ".yml") or os.sep in name:
        if not Path(name).is_file():
            raise ConfigError(f"no recipe file {name}")
        return Path(name)
    own = [path for path in (Path(f"{name}.yaml"), Path(name)) if path.is_file()]
    if name in recipe_names(shipped):
        if own:
            logger.warning("recipe %s is the project's own; yours is ./%s", name, own[0])
        return shipped / f"{name}.yaml"
    if not own:
        known = [*recipe_names(shipped), *recipe_names(Path())]
        raise ConfigError(
            f"unknown recipe {name!r} ({nearest(name, known)}), and no file {name}.yaml; "
            "`radio-distill init NAME` writes one to begin with"
        )
    return own[0]
