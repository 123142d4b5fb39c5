"""Compare the upsamplers of one teacher: FeatSharp's Tables 7 to 10, images, throughput, a page.

    radio-distill upsampler-report demo --teacher dino
    radio-distill upsampler-report mine --teacher siglip --factors 2 --tables 7 9 --fit

Fitted upsamplers are those of the recipe's run folder, else those that come with the project. What
is missing is listed with the command that fits it, or fitted here with --fit, where all fits of a
factor share the encoded images if the recipe has a pool (--fit.pool 1024). They are measured on
the recipe's held-out images (evaluation.images). Writes index.html, tables.md and scores.json
to RUN/upsampler_report/TEACHER.
"""

import argparse
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from radio_distill.config import FitConfig, Recipe
from radio_distill.errors import ConfigError
from radio_distill.registry import nearest

from ..arguments import (
    add_images_argument,
    add_num_images_argument,
    add_recipe_argument,
    add_run_folder_argument,
    add_trust_argument,
)
from ..fit_upsampler import fit_recipe, fit_upsampler
from ..fits import (
    FITTED,
    changed_options,
    fit_command,
    fit_folder,
    fit_name,
    fit_of,
)
from ..recipes import Asked, load_recipe

if TYPE_CHECKING:
    from radio_distill.types import Size, TeacherSpec
    from upsamplers.fitted import FittedHeader

TAKES_FIELDS = True
TABLES = (7, 8, 9, 10)
"""Of FeatSharp (arXiv 2502.16025), appendix B: de-bias, inputs, upsamplers, modules."""
DEFAULT = ("bilinear", "featup", "featsharp", "tile", "s2", "strided", "native")
FREE = ("bicubic", "tile", "s2", "strided", "native")
"""Upsamplers without parameters that Table 9 can show beside the fitted ones."""
INPUTS = ("bilinear", "featup", "tiles", "bilinear + tiles", "featup + tiles", "tiles + bilinear",
          "tiles + featup", "bilinear + featup + tiles", "featup + bilinear + tiles",
          "tiles + bilinear + featup")  # fmt: skip
"""Rows of Table 8; the first of a row is the residual path."""
BLOCKS = {"linear": "linear", "attention": "attention", "mlp": "MLP", "both": "attention + MLP"}
"""Rows of Table 10, whose inputs are bilinear + tiles."""

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill upsampler-report``."""
    add_trust_argument(parser)
    add_recipe_argument(parser)
    add = parser.add_argument
    add("--teacher", metavar="NAME", help="a teacher of the recipe")
    add("--factors", nargs="+", type=int, default=[2, 4], help="(default: 2 4)")
    add("--tables", nargs="+", type=int, choices=TABLES, default=TABLES, help="(default: all)")
    names = f"of Tables 7 and 9 (default: {' '.join(DEFAULT)})"
    add("--upsamplers", nargs="+", metavar="NAME", default=DEFAULT, help=names)
    add("--fit", action="store_true", help="fit what is missing; goes on where it was stopped")
    allow = "with --fit, go on although the recipe differs from a checkpoint's"
    add("--allow-changed-recipe", action="store_true", help=allow)
    add_images_argument(parser)
    add_num_images_argument(parser, 4)
    add("--no-throughput", action="store_true", help="leave the timing out")
    add_run_folder_argument(parser)


class Row(NamedTuple):
    """A row of a table: an upsampler and its label there."""

    label: str
    config: FitConfig
    """How it is fitted; of one without parameters, only name and factor count."""


@dataclass(frozen=True)
class Request:
    """The tables, images and timing that a report shows."""

    tables: tuple[int, ...] = TABLES
    factors: tuple[int, ...] = (2, 4)
    upsamplers: tuple[str, ...] = ("bilinear", "featup", "featsharp")
    """Of Tables 7 and 9."""
    num_images: int = 4
    """Photographs that are painted."""
    throughput: bool = True

    def __post_init__(self) -> None:
        """Raise ConfigError for a number or an upsampler that cannot be."""
        from upsamplers.networks import NETWORKS

        if self.num_images < 1:
            raise ConfigError(f"--num-images {self.num_images}: paint at least 1")
        for factor in self.factors:
            if factor < 2:
                raise ConfigError(f"--factors {factor}: an upsampler's factor is at least 2")
        known = [*NETWORKS.names(), *FREE]
        for name in self.upsamplers:
            if name not in known:
                hint = nearest(name, known)
                raise ConfigError(f"--upsamplers {name}: cannot compare it ({hint})")

    def rows(self, table: int, recipe: Recipe) -> dict[int, list[Row]]:
        """Return the rows of a table, for each factor."""
        return {factor: rows_of(table, recipe, factor, self.upsamplers) for factor in self.factors}

    def configs(self, recipe: Recipe) -> dict[str, FitConfig]:
        """Return every upsampler that the tables compare, by the name of its fit."""
        every = (self.rows(table, recipe).values() for table in self.tables)
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


def rows_of(table: int, recipe: Recipe, factor: int, upsamplers: Sequence[str]) -> list[Row]:
    """Return the rows of one table at one factor.

    ``upsamplers`` are those of Tables 7 and 9; what is not fitted is in Table 9 alone. The rows of
    Table 7 are pairs, without and with de-bias.
    """

    def fit(name: str, **options: Any) -> FitConfig:
        config = fit_of(recipe, recipe.fit.teacher, name, factor)
        return replace(config, options={**config.options, **options})

    inputs = ["bilinear", "tiles"]
    if table == 7:
        fitted = [fit(name) for name in upsamplers if is_network(name)]
        pairs = ((config, de_bias) for config in fitted for de_bias in (False, True))
        return [Row(config.upsampler, replace(config, de_bias=bias)) for config, bias in pairs]
    if table == 8:
        return [Row(names, fit("featsharp", inputs=names.split(" + "))) for names in INPUTS]
    if table == 10:
        blocks = BLOCKS.items()
        return [Row(name, fit("featsharp", inputs=inputs, block=block)) for block, name in blocks]
    rows = []
    for name in upsamplers:
        rows.append(Row(name, fit(name)))
        if name == "featsharp":
            rows.append(Row("featsharp, bilinear residual", fit(name, inputs=inputs)))
    return rows


def run(arguments: argparse.Namespace) -> int:
    """Fit what is missing where asked, measure, print, write."""
    request = Request(
        tuple(sorted(set(arguments.tables))),
        tuple(sorted(set(arguments.factors))),
        tuple(dict.fromkeys(arguments.upsamplers)),
        arguments.num_images,
        not arguments.no_throughput,
    )
    given = {
        "fit.teacher": arguments.teacher,
        "output": arguments.output,
        "evaluation.images": arguments.images,
    }
    fields = [f"{name}={value}" for name, value in given.items() if value] + arguments.fields
    recipe = fit_recipe(load_recipe(arguments.recipe, fields))
    if not recipe.evaluation.images:
        raise ConfigError(
            "evaluation.images: upsamplers are compared on held-out images; name a folder or shards"
        )
    from .upsampler_comparison import Comparison, write_report

    report = Comparison.of(recipe, request)
    spec, size, fits = report.teacher.spec, report.size, request.fits(recipe)
    files = {name: find(recipe, spec, size, config) for name, config in fits.items()}
    missing = [fits[name] for name, (path, _) in files.items() if path is None]
    report.announce(len(missing), arguments.fit)
    if missing and arguments.fit:
        fit_missing(recipe, missing, spec.channels, arguments.allow_changed_recipe)
        files = {name: find(recipe, spec, size, config) for name, config in fits.items()}
    report.files |= {name: path for name, (path, _) in files.items() if path is not None}
    for name, (path, reason) in files.items():
        if path is None:
            command = fit_command(Asked(arguments.recipe, tuple(fields)), recipe, fits[name])
            report.missing.append(f"{command}  # {reason}" if reason else command)
            logger.warning("missing: %s", report.missing[-1])
    if not report.files:
        raise ConfigError(
            f"nothing is fitted to teacher {spec.name!r} that these tables compare; run one of "
            "the commands above, or add --fit"
        )
    print(f"report: {write_report(report)}")
    return 0


def find(
    recipe: Recipe, spec: "TeacherSpec", size: "Size", config: FitConfig
) -> tuple[Path | None, str]:
    """Return the file of a fit: that of the run folder, or the one that comes with the project.

    Where the project's own was fitted at another size, the text says so.

    Raises:
        ConfigError: the run folder holds another fit under this name.
        WeightsError: a file of another teacher, or one that cannot be read.
    """
    from upsamplers.fitted import check_fitted_for, read_header, shipped

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


def fit_missing(
    recipe: Recipe, configs: Iterable[FitConfig], channels: int, allow_changed: bool
) -> None:
    """Fit one after the other; those of one factor share the pool of encoded images.

    One that was stopped goes on. Those with most tiles come first: the first fit fills the pool.
    """
    import torch

    from upsamplers.networks import build_network

    def order(config: FitConfig) -> tuple[int, int]:
        with torch.device("meta"):
            network = build_network(config.upsampler, channels, config.factor, config.options)
        return config.factor, -len(network.tile_levels)  # type: ignore[arg-type]

    pools: dict[int, list[Any]] = {}
    for config in sorted(configs, key=order):
        pool = pools.setdefault(config.factor, [])
        one = fit_recipe(replace(recipe, fit=config))
        fit_upsampler(one, resume=True, allow_changed=allow_changed, pool=pool)
