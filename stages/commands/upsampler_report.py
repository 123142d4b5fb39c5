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
from collections.abc import Mapping
from pathlib import Path

from radio_distill.config import FitConfig, Recipe
from radio_distill.errors import ConfigError

from ..arguments import (
    add_num_images_argument,
    add_recipe_argument,
    add_run_folder_argument,
    add_trust_argument,
)
from ..common import Asked, load_recipe
from ..fit_upsampler import fit_recipe, input_size
from ..upsampler_files import fit_command
from .upsampler_fits import TABLES, Request, Subject, find, fit_missing

TAKES_FIELDS = True
DEFAULT = ("bilinear", "featup", "featsharp", "tile", "s2", "strided", "native")

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill upsampler-report``."""
    add_trust_argument(parser)
    add = parser.add_argument
    add_recipe_argument(parser)
    add("--teacher", metavar="NAME", help="a teacher of the recipe")
    add("--factors", nargs="+", type=int, default=[2, 4], help="(default: 2 4)")
    add(
        "--tables", nargs="+", type=int, choices=TABLES, default=list(TABLES), help="(default: all)"
    )
    add(
        "--upsamplers",
        nargs="+",
        metavar="NAME",
        default=list(DEFAULT),
        help=f"of Tables 7 and 9 (default: {' '.join(DEFAULT)})",
    )
    add("--fit", action="store_true", help="fit what is missing; goes on where it was stopped")
    add(
        "--allow-changed-recipe",
        action="store_true",
        help="with --fit, go on although the recipe differs from a checkpoint's",
    )
    add_num_images_argument(parser, 4)
    add("--no-throughput", action="store_true", help="leave the timing out")
    add_run_folder_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Fit what is missing where asked, measure, print, write."""
    request = Request(
        tuple(sorted(set(arguments.tables))),
        tuple(sorted(set(arguments.factors))),
        tuple(dict.fromkeys(arguments.upsamplers)),
        arguments.num_images,
        not arguments.no_throughput,
    )
    given = {"fit.teacher": arguments.teacher, "output": arguments.output}
    fields = [f"{name}={value}" for name, value in given.items() if value] + arguments.fields
    recipe = fit_recipe(load_recipe(arguments.recipe, fields))
    subject, fits = _subject(recipe), request.fits(recipe)
    files, missing = _locate(subject, fits)
    _check_masks(subject.recipe, request)
    _announce(subject, request, len(files), len(missing), arguments.fit)
    if missing and arguments.fit:
        fit_missing(subject, [fits[name] for name in missing], arguments.allow_changed_recipe)
        files, missing = _locate(subject, fits)
    commands = []
    for name, reason in missing.items():
        command = fit_command(Asked(arguments.recipe, tuple(fields)), recipe, fits[name])
        commands.append(f"{command}  # {reason}" if reason else command)
        logger.warning("missing: %s", commands[-1])
    if not files:
        raise ConfigError(
            f"nothing is fitted to teacher {subject.name!r} that these tables compare; run one of "
            "the commands above, or add --fit"
        )
    from .upsampler_page import report

    print(f"report: {report(subject, request, files, commands)}")
    return 0


def _subject(recipe: Recipe) -> Subject:
    from radio_distill.system.distributed import World, choose_device
    from teachers import build_teacher

    if not recipe.evaluation.images:
        raise ConfigError(
            "evaluation.images: upsamplers are compared on held-out images; name a folder or shards"
        )
    name, device = recipe.fit.teacher, choose_device(recipe.engine.device, World())
    teacher = build_teacher(name, recipe.teachers[name], device)
    return Subject(recipe, teacher, input_size(recipe, teacher), device)


def _locate(
    subject: Subject, fits: Mapping[str, FitConfig]
) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the files of fits, and those that are missing with the reason, if there is one."""
    files, missing = {}, {}
    for name, config in fits.items():
        path, reason = find(subject, config)
        if path is None:
            missing[name] = reason
        else:
            files[name] = path
    return files, missing


def _check_masks(recipe: Recipe, request: Request) -> None:
    """Read the segmentation set's masks before anything is fitted; raises DataError."""
    from radio_distill.evals.masks import open_set

    evaluation = recipe.evaluation
    if 9 in request.tables and evaluation.segmentation:
        open_set(evaluation.segmentation, evaluation.limit, evaluation.segmentation_ignore)


def _announce(subject: Subject, request: Request, found: int, missing: int, fit: bool) -> None:
    from radio_distill.data.folder import load_images

    config, evaluation = subject.recipe.fit, subject.recipe.evaluation
    images = len(load_images(evaluation.images, evaluation.limit or None))
    plan = f"{missing} to fit, {config.steps} steps of {config.batch_size} images each"
    logger.info(
        "teacher %s at %s px, factors %s: %d fitted upsamplers found, %s; %d held-out images",
        subject.name,
        "x".join(map(str, subject.size)),
        ", ".join(map(str, request.factors)),
        found,
        plan if fit and missing else f"{missing} missing",
        images,
    )
