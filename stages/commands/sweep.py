"""Stage 3 and its scores for several teacher upsamplers, and the gain table (Δm) over one of them.

    radio-distill sweep demo --upsamplers bilinear tile s2 --baseline bilinear

Stages that are complete are passed over, so a sweep that was stopped goes on where it was.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from radio_distill.config import Recipe
from radio_distill.errors import ConfigError
from radio_distill.evals.subjects import SCORES

from ..arguments import (
    add_recipe_argument,
    add_run_folder_argument,
    add_trust_argument,
    check_output,
)
from ..recipes import Asked, load_recipe

if TYPE_CHECKING:
    from radio_distill.evals.gain import MultiTaskGain

TAKES_FIELDS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill sweep``."""
    add_trust_argument(parser)
    add_recipe_argument(parser)
    parser.add_argument(
        "--upsamplers", nargs="+", metavar="NAME", default=["bilinear", "tile", "s2"]
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        default="bilinear",
        help="what the others are compared with: tile, stage3-tile",
    )
    add_run_folder_argument(parser)
    parser.add_argument(
        "--retrain",
        action="store_true",
        help="train anew what was made of another recipe or upsampler; the earlier run is moved "
        "aside",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the sweep and print the table."""
    from radio_distill.report.gain_tables import gain_tables
    from radio_distill.report.tables import print_tables

    from .scoring import write_gain

    output = [f"output={arguments.output}"] if arguments.output else []
    asked = Asked(arguments.recipe, (*output, *arguments.fields))
    recipe = load_recipe(asked.recipe, asked.fields)
    gain, path = sweep(
        recipe, arguments.upsamplers, arguments.baseline, asked=asked, retrain=arguments.retrain
    )
    print_tables(gain_tables(gain))
    write_gain(gain, path.parent)
    return 0


def with_upsampler(recipe: Recipe, name: str) -> Recipe:
    """Return the recipe with another upsampler in stage 3; files and options are of one alone."""
    stage = recipe.stages.get("stage3")
    if stage is None:
        raise ConfigError("sweep: stage3 is trained with each upsampler, and the recipe has none")
    if name == stage.upsampler.name:
        return recipe
    other = replace(stage.upsampler, name=name, weights={}, sha256={}, sizes={}, options={})
    changed = replace(stage, upsampler=other)
    return replace(recipe, stages={**recipe.stages, "stage3": changed})


def sweep(
    recipe: Recipe,
    upsamplers: Sequence[str],
    baseline: str,
    references: bool = False,
    asked: Asked | None = None,
    retrain: bool = False,
) -> "tuple[MultiTaskGain, Path]":
    """Train stage 3 with each upsampler, score, compare.

    Args:
        recipe: its stage 3 is run once for each upsampler.
        upsamplers: names.
        baseline: one of them.
        references: score the teachers and an untrained student too.
        asked: how the recipe was named on the command line, for the commands in messages.
        retrain: train anew what was made of another recipe or of other upsamplers.

    Returns the gain over the baseline, and the file of all scores.

    Raises:
        ChangedError: a student was made of something else, and ``retrain`` is not set.
    """
    from radio_distill.train.checkpoint import find
    from upsamplers import UPSAMPLERS

    from ..build import train_stage
    from ..launch import Options
    from .missing import check_stages
    from .scoring import gain_of, score_checkpoints

    baseline = baseline.removeprefix("stage3-")
    if baseline not in upsamplers:
        raise ConfigError(
            f"--baseline {baseline} is not among --upsamplers {' '.join(upsamplers)}; add it"
        )
    check_output(recipe.folder / SCORES, "--override output=DIR")
    for name in upsamplers:
        UPSAMPLERS.get(name)  # an unknown name ends here, before anything is trained
    variants = {name: with_upsampler(recipe, name) for name in upsamplers}
    for variant in variants.values():
        check_stages(variant, ["stage3"], asked, resume=True)
    options = Options(resume=True, asked=asked)
    way_out = "add --retrain to train it anew"
    trained = {
        name: find(train_stage("stage3", variant, options, retrain=retrain, way_out=way_out))
        for name, variant in variants.items()
    }
    students = [*trained.values()]
    (path,) = score_checkpoints(
        students, [recipe.evaluation] * len(students), references, references
    )
    return gain_of(path, students, trained[baseline]), path
