"""Compare the upsamplers of one teacher: FeatSharp's Tables 7 to 10, Figure 13, images, a page.

    radio-distill upsampler-report demo --teacher dino
    radio-distill upsampler-report mine --teacher siglip --factors 2 --tables 7 9 --fit
    radio-distill upsampler-report mine --teacher siglip --tables --windows 1 3 5 7 9 11 --fit

Fitted upsamplers are those of the recipe's run folder, else those that come with the project. What
is missing is listed with the command that fits it, or fitted here with --fit, where all fits of a
factor share the encoded images if the recipe has a pool (--fit.pool 1024). They are measured on
the recipe's held-out images (evaluation.images). Writes index.html, tables.md and scores.json
to RUN/upsampler_report/TEACHER.
"""

import argparse
import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from radio_distill.config import FitConfig, Recipe
from radio_distill.errors import ConfigError

from ..arguments import (
    add_images_argument,
    add_num_images_argument,
    add_recipe_argument,
    add_run_folder_argument,
    add_trust_argument,
)
from ..fit_upsampler import fit_recipe, fit_upsampler
from ..fits import fit_command
from ..recipes import Asked, load_recipe
from .upsampler_rows import DEFAULT, TABLES, Request, find

TAKES_FIELDS = True
logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill upsampler-report``."""
    add_trust_argument(parser)
    add_recipe_argument(parser)
    add = parser.add_argument
    add("--teacher", metavar="NAME", help="a teacher of the recipe")
    add("--factors", nargs="+", type=int, default=[2, 4], help="(default: 2 4)")
    add("--tables", nargs="*", type=int, choices=TABLES, default=TABLES, help="(default: all)")
    names = f"of Tables 7 and 9 (default: {' '.join(DEFAULT)})"
    add("--upsamplers", nargs="+", metavar="NAME", default=DEFAULT, help=names)
    windows = "compare these windows of FeatSharp's attention too, as in Figure 13: 1 3 5 7 9 11"
    add("--windows", nargs="+", type=int, default=[], metavar="CELLS", help=windows)
    add("--fit", action="store_true", help="fit what is missing; goes on where it was stopped")
    allow = "with --fit, go on although the recipe differs from a checkpoint's"
    add("--allow-changed-recipe", action="store_true", help=allow)
    add_images_argument(parser)
    add_num_images_argument(parser, 4)
    add_run_folder_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Fit what is missing where asked, measure, print, write."""
    request = Request(
        tuple(sorted(set(arguments.tables))),
        tuple(sorted(set(arguments.factors))),
        tuple(dict.fromkeys(arguments.upsamplers)),
        arguments.num_images,
        tuple(sorted(set(arguments.windows))),
    )
    given = {"fit.teacher": arguments.teacher, "evaluation.images": arguments.images}
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
