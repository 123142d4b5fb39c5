"""Stage 3 and its scores for several teacher upsamplers, and the gain table (Δm) over one of them.

    radio-distill sweep demo --upsamplers bilinear tile s2 --baseline bilinear --seeds 3
    radio-distill sweep mine --suite quick --evaluation.data '{spair: /data/SPair-71k}'

The stages before it are trained once, for all upsamplers and seeds. Stages that are complete are
passed over, so a sweep that was stopped goes on where it was.
"""

import argparse
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from radio_distill.config import Recipe, stages_needed
from radio_distill.errors import ConfigError
from radio_distill.evals.gain import MultiTaskGain
from radio_distill.evals.subjects import SCORES
from radio_distill.report.gain_tables import gain_tables
from radio_distill.report.tables import print_tables
from radio_distill.system.files import make_private
from radio_distill.types import Suite

from ..arguments import (
    add_recipe_argument,
    add_run_folder_argument,
    add_trust_argument,
    check_output,
)
from ..recipes import Asked, load_recipe
from .evaluate import add_suite_argument, in_suite

TAKES_FIELDS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill sweep``."""
    add = parser.add_argument
    add_trust_argument(parser)
    add_recipe_argument(parser)
    add("--upsamplers", nargs="+", metavar="NAME", default=["bilinear", "tile", "s2"])
    add(
        "--baseline",
        metavar="NAME",
        default="bilinear",
        help="what the others are compared with: tile, stage3-tile",
    )
    add("--seeds", type=int, default=1, metavar="N", help="of stage 3 (default: %(default)s)")
    add_suite_argument(parser)
    add_run_folder_argument(parser)
    add(
        "--retrain",
        action="store_true",
        help="train anew what was made of another recipe or upsampler; the earlier run is moved "
        "aside",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the sweep and print the table."""
    from radio_distill.system.distributed import world_from

    from .scoring import write_gain

    asked = Asked(arguments.recipe, tuple(arguments.fields))
    recipe = load_recipe(asked.recipe, asked.fields)
    gain = sweep(
        recipe, arguments.upsamplers, arguments.baseline, arguments.seeds, asked,
        retrain=arguments.retrain, suite=arguments.suite,
    )  # fmt: skip
    if world_from(os.environ).is_main:
        print_tables(gain_tables(gain))
        write_gain(gain, recipe.folder)
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


def with_seed(recipe: Recipe, asked: Asked, number: int) -> tuple[Recipe, Asked]:
    """Return the recipe of one seed of stage 3; the first is the recipe's own.

    Others lie in folders of the run, and start and learn from what its stage 3 does.
    """
    if number == 0:
        return recipe, asked
    seed = recipe.seed + number
    own = replace(recipe, name=f"seed-{seed}", output=str(recipe.folder), seed=seed)
    make_private(own.folder)
    for name in stages_needed(recipe, "stage3")[:-1]:
        start = own.stage_folder(name)
        with suppress(FileExistsError):  # of another process, or of a sweep before
            start.symlink_to(Path("..") / start.name)
    fields = (f"name={own.name}", f"output={own.output}", f"seed={seed}")
    return own, Asked(asked.recipe, (*asked.fields, *fields))


def sweep(
    recipe: Recipe,
    upsamplers: Sequence[str],
    baseline: str,
    seeds: int,
    asked: Asked,
    references: bool = False,
    retrain: bool = False,
    suite: Suite | None = None,
) -> MultiTaskGain:
    """Train stage 3 with each upsampler and seed, score, compare.

    Args:
        recipe: its stage 3 is run once for each upsampler and seed, the stages before it once.
        upsamplers: names.
        baseline: one of them.
        seeds: how many; all start from the same weights.
        asked: how the recipe was named on the command line, for the commands in messages.
        references: score the teachers and an untrained student too.
        retrain: train anew what was made of another recipe or of other upsamplers.
        suite: benchmarks that students are scored on; None for those of the recipe.

    Returns the gain over the baseline; the scores lie in the run folder.

    Raises:
        ChangedError: a student was made of something else, and ``retrain`` is not set.
    """
    from radio_distill.evals.run import check_data
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
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: at least one is needed")
    check_output(recipe.folder / SCORES, "--override output=DIR")
    for name in upsamplers:
        UPSAMPLERS.get(name)  # an unknown name ends here, before anything is trained
    upsamplers = list(dict.fromkeys(upsamplers))
    variants = {name: with_upsampler(recipe, name) for name in upsamplers}
    stages = stages_needed(recipe, "stage3")
    for variant in variants.values():
        check_stages(variant, stages, asked, resume=True)
    evaluation = in_suite(suite, recipe.evaluation, asked.fields)
    check_data(evaluation)
    train = partial(train_stage, retrain=retrain, way_out="add --retrain to train it anew")
    for stage in stages[:-1]:
        train(stage, recipe, Options(resume=True, asked=asked))
    for number in range(seeds):
        own, own_asked = with_seed(recipe, asked, number)
        options = Options(resume=True, asked=own_asked)
        students = [
            find(train("stage3", with_upsampler(own, name), options)) for name in upsamplers
        ]
        with_references = references and number == 0
        score_checkpoints(students, [evaluation] * len(students), with_references, with_references)
    students = [find(variant.stage_folder("stage3")) for variant in variants.values()]
    return gain_of(recipe.folder, students, students[upsamplers.index(baseline)], references)
