"""Rows of the upsampler report's tables: which upsamplers they compare, and where their files are.

FeatSharp (arXiv 2502.16025), appendix B: Table 7 de-bias, Table 8 inputs, Table 9 upsamplers, Table
10 modules; and its Figure 13, the window of attention. Most fits serve several tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from radio_distill.config import FitConfig, Recipe
from radio_distill.errors import ConfigError
from radio_distill.registry import nearest

from ..fits import FITTED, changed_options, fit_folder, fit_name, fit_of

if TYPE_CHECKING:
    from radio_distill.types import Size, TeacherSpec
    from upsamplers.fitted_files import FittedHeader

TABLES = (7, 8, 9, 10)
"""Of FeatSharp (arXiv 2502.16025), appendix B: de-bias, inputs, upsamplers, modules."""
FIGURE = 13
"""Stands among the tables for Figure 13, which is asked for by its windows."""
DEFAULT = ("bilinear", "featup", "featsharp", "tile", "s2", "strided", "native")
FREE = ("bicubic", "tile", "s2", "strided", "native")
"""Upsamplers without parameters that Table 9 can show beside the fitted ones."""
INPUTS = ("bilinear", "featup", "tiles", "bilinear + tiles", "featup + tiles", "tiles + bilinear",
          "tiles + featup", "bilinear + featup + tiles", "featup + bilinear + tiles",
          "tiles + bilinear + featup")  # fmt: skip
"""Rows of Table 8; the first of a row is the residual path."""
BLOCKS = {"linear": "linear", "attention": "attention", "mlp": "MLP", "both": "attention + MLP"}
"""Rows of Table 10, whose inputs are bilinear + tiles."""


class Row(NamedTuple):
    """A row of a table: an upsampler and its label there."""

    label: str
    config: FitConfig
    """How it is fitted; of one without parameters, only name and factor count."""


@dataclass(frozen=True)
class Request:
    """The tables and images that a report shows."""

    tables: tuple[int, ...] = TABLES
    factors: tuple[int, ...] = (2, 4)
    upsamplers: tuple[str, ...] = ("bilinear", "featup", "featsharp")
    """Of Tables 7 and 9."""
    num_images: int = 4
    """Photographs that are painted."""
    windows: tuple[int, ...] = ()
    """Cells a side that FeatSharp's attention sees, in the rows of Figure 13."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a number or an upsampler that cannot be."""
        from upsamplers.networks import NETWORKS

        if not self.shown:
            raise ConfigError("--tables: name one, or the --windows of Figure 13")
        if self.num_images < 1:
            raise ConfigError(f"--num-images {self.num_images}: paint at least 1")
        for factor in self.factors:
            if factor < 2:
                raise ConfigError(f"--factors {factor}: an upsampler's factor is at least 2")
        for window in self.windows:
            if window not in range(1, 12, 2):
                raise ConfigError(f"--windows {window}: a window is odd, from 1 to 11")
        known = [*NETWORKS.names(), *FREE]
        for name in self.upsamplers:
            if name not in known:
                hint = nearest(name, known)
                raise ConfigError(f"--upsamplers {name}: cannot compare it ({hint})")

    @property
    def shown(self) -> tuple[int, ...]:
        """The tables, and the figure where it is asked for."""
        return (*self.tables, *((FIGURE,) if self.windows else ()))

    def rows(self, table: int, recipe: Recipe) -> dict[int, list[Row]]:
        """Return the rows of a table, for each factor."""
        names = self.windows if table == FIGURE else self.upsamplers
        return {factor: rows_of(table, recipe, factor, names) for factor in self.factors}

    def configs(self, recipe: Recipe) -> dict[str, FitConfig]:
        """Return every upsampler that the tables compare, by the name of its fit."""
        every = (self.rows(table, recipe).values() for table in self.shown)
        configs = (row.config for factors in every for rows in factors for row in rows)
        return {fit_name(config): config for config in configs}

    def fits(self, recipe: Recipe) -> dict[str, FitConfig]:
        """Return those of them that are fitted."""
        every = self.configs(recipe).items()
        return {name: config for name, config in every if is_network(config.upsampler)}


def is_network(upsampler: str) -> bool:
    """Return whether it is a network; Table 9 compares some that have no parameters too."""
    from upsamplers.networks import NETWORKS

    return upsampler in NETWORKS.names()


def rows_of(table: int, recipe: Recipe, factor: int, asked: Sequence[Any]) -> list[Row]:
    """Return the rows of one table at one factor.

    ``asked`` are the upsamplers of Tables 7 and 9, or the windows of Figure 13. What is not fitted
    is in Table 9 alone. The rows of Table 7 are pairs, without and with de-bias.
    """

    def fit(name: str, **options: Any) -> FitConfig:
        config = fit_of(recipe, recipe.fit.teacher, name, factor)
        return replace(config, options={**config.options, **options})

    inputs = ["bilinear", "tiles"]
    if table == 7:
        fitted = [fit(name) for name in asked if is_network(name)]
        pairs = ((config, de_bias) for config in fitted for de_bias in (False, True))
        return [Row(config.upsampler, replace(config, de_bias=bias)) for config, bias in pairs]
    if table == 8:
        return [Row(names, fit("featsharp", inputs=names.split(" + "))) for names in INPUTS]
    if table == 10:
        blocks = BLOCKS.items()
        return [Row(name, fit("featsharp", inputs=inputs, block=block)) for block, name in blocks]
    if table == FIGURE:
        from upsamplers.networks.featsharp import PRESETS

        usual = PRESETS[fit("featsharp").options.get("preset", "paper")]["window"]
        others = {window: {} if window == usual else {"window": window} for window in asked}
        plain = [Row(name, fit(name)) for name in ("bilinear", "featup")]
        return plain + [Row(f"window {n}", fit("featsharp", **own)) for n, own in others.items()]
    rows = []
    for name in asked:
        rows.append(Row(name, fit(name)))
        if name == "featsharp":
            rows.append(Row("featsharp, bilinear residual", fit(name, inputs=inputs)))
    return rows


def find(
    recipe: Recipe, spec: "TeacherSpec", size: "Size", config: FitConfig
) -> tuple[Path | None, str]:
    """Return the file of a fit: that of the run folder, or the one that comes with the project.

    Where the project's own was fitted at another size, the text says so.

    Raises:
        ConfigError: the run folder holds another fit under this name.
        WeightsError: a file of another teacher, or one that cannot be read.
    """
    from upsamplers.fitted_files import check_fitted_for, read_header, shipped

    path = fit_folder(recipe, config) / FITTED
    if path.is_file():
        header = read_header(path)
        check_fitted_for(header, config.upsampler, spec, config.factor)
        problem = _other_model(header, config) or _other_size(header, size)
        if problem:
            raise ConfigError(
                f"{path} was fitted {problem}; set the recipe's section fit as it was, or choose "
                "another run folder with --name"
            )
        return path, ""
    own = shipped(config.upsampler, config.factor, spec)
    if own is None or _other_model(read_header(own), config):
        return None, ""
    problem = _other_size(read_header(own), size)
    return (None, f"the project's own was fitted {problem}") if problem else (own, "")


def _other_model(header: "FittedHeader", config: FitConfig) -> str:
    """Say how a file's model differs from what is asked for; its header decides, not its name."""
    own = changed_options(config.upsampler, header.options)
    asked = changed_options(config.upsampler, config.options)
    if own != asked:
        return f"with the options {own}, not {asked}"
    if header.fit.get("de_bias", True) != config.de_bias:
        return f"{'without' if config.de_bias else 'with'} de-bias"
    return ""


def _other_size(header: "FittedHeader", size: "Size") -> str:
    return "" if header.size == size else "at {}x{} px, not at {}x{}".format(*header.size, *size)
