"""Stage 3 and its scores for several teacher upsamplers, and the gain table (Δm) over one of them.

    radio-distill sweep demo --upsamplers bilinear tile s2 --baseline bilinear

Stages that are complete are passed over, so a sweep that was stopped goes on where it was.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from radio_distill.config import Recipe
from radio_distill.errors import ConfigError, DataError

from ..arguments import (
    add_recipe_argument,
    add_run_folder_argument,
    add_trust_argument,
    check_output,
    run_script,
)
from ..common import Asked, load_recipe, train_stage
from .evaluate import SCORES, score_checkpoints

if TYPE_CHECKING:
    from radio_distill.evals.gain import MultiTaskGain
    from radio_distill.train.checkpoint import Checkpoint

TAKES_FIELDS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill sweep``."""
    add_trust_argument(parser)
    add_recipe_argument(parser)
    parser.add_argument("--upsamplers", nargs="+", default=["bilinear", "tile", "s2"])
    parser.add_argument(
        "--baseline",
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
    output = [f"output={arguments.output}"] if arguments.output else []
    asked = Asked(arguments.recipe, (*output, *arguments.fields))
    recipe = load_recipe(asked.recipe, asked.fields)
    gain, path = sweep(
        recipe, arguments.upsamplers, arguments.baseline, asked=asked, retrain=arguments.retrain
    )
    show_gain(gain, path.parent)
    return 0


def with_upsampler(recipe: Recipe, name: str) -> Recipe:
    """Return the recipe with another upsampler in stage 3; files and options are of one alone."""
    stage = recipe.stages["stage3"]
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
        retrain: train anew what was made of another recipe or of other upsamplers than today's.

    Returns the gain over the baseline, and the file of all scores.

    Raises:
        ChangedError: a student was made of something else, and ``retrain`` is not set.
    """
    from radio_distill.train.checkpoint import find
    from upsamplers import UPSAMPLERS

    from .missing import check_stages

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
    way_out = "add --retrain to train it anew"
    found = {
        name: find(
            train_stage(
                "stage3", variant, resume=True, asked=asked, retrain=retrain, way_out=way_out
            )
        )
        for name, variant in variants.items()
    }
    evaluations = [recipe.evaluation] * len(found)
    (path,) = score_checkpoints([*found.values()], evaluations, references, references)
    return gain_of(path, [*found.values()], found[baseline]), path


def gain_of(
    path: Path,
    students: "Sequence[Checkpoint]",
    baseline: "Checkpoint",
    references: bool = False,
) -> "MultiTaskGain":
    """Compare some checkpoints with one of them, each together with its other seeds.

    Args:
        path: score file, or a folder of which all below it are read.
        students: checkpoints that were scored.
        baseline: one of them.
        references: show untrained students and teachers too, where they were scored.

    Raises:
        DataError: there are no scores of one of them.
    """
    from radio_distill.evals.gain import multi_task_gain
    from radio_distill.evals.scores import read_scores

    from .subjects import student_subject

    scores = read_scores([path])
    labels = {}
    for student in students:
        label = scores.label_of(student_subject(student))
        if label is None:
            raise DataError(
                f"{path} has no scores of {student.folder}; run radio-distill eval {student.folder}"
            )
        labels[student.folder] = label
    shown = [label for label, of in scores.subjects.items() if of[0].reference and references]
    chosen = scores.only([*labels.values(), *shown])
    return multi_task_gain(
        chosen.results,
        labels[baseline.folder],
        chosen.definitions,
        may_lack=shown,
        remarks=chosen.remarks(),
    )


def show_gain(gain: "MultiTaskGain", folder: Path) -> None:
    """Print the gain table and what does not count; write the first in four formats."""
    from radio_distill.report.gain_tables import gain_tables
    from radio_distill.report.tables import print_tables

    print_tables(gain_tables(gain))
    write_gain(gain, folder)


def write_gain(gain: "MultiTaskGain", folder: Path) -> None:
    """Write the gain table in four formats, and say where."""
    from radio_distill.report.gain_tables import gain_table

    table = gain_table(gain)
    for suffix, text in {
        "md": table.to_markdown(),
        "csv": table.to_csv(),
        "tex": table.to_latex(),
        "json": table.to_json(),
    }.items():
        (folder / f"gain.{suffix}").write_text(text, encoding="utf-8")
    print(f"also as Markdown, CSV, LaTeX and JSON: {folder}/gain.*")


def main(argv: Sequence[str] | None = None) -> int:
    """Run as a script; returns the exit status."""
    return run_script(sys.modules[__name__], argv)
