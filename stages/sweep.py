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

if __package__ in (None, ""):  # run as a file: put the checkout, and only it, first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from radio_distill.config import Recipe
from radio_distill.errors import ConfigError
from stages.arguments import add_trust_argument, run_script
from stages.common import load_recipe, train_stage
from stages.evaluate import results_and_definitions, score_checkpoints

if TYPE_CHECKING:
    from radio_distill.evals.mtl_gain import GainTable

TAKES_FIELDS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill sweep``."""
    add_trust_argument(parser)
    parser.add_argument("recipe", nargs="?", default="demo", help="name or file (default: demo)")
    parser.add_argument("--upsamplers", nargs="+", default=["bilinear", "tile", "s2"])
    parser.add_argument("--baseline", default="bilinear", help="what the others are compared with")


def run(arguments: argparse.Namespace) -> int:
    """Run the sweep and print the table."""
    recipe = load_recipe(arguments.recipe, arguments.fields)
    gain, path = sweep(recipe, arguments.upsamplers, arguments.baseline)
    show_gain(gain, path.parent)
    return 0


def with_upsampler(recipe: Recipe, name: str) -> Recipe:
    """Return the recipe with another upsampler in stage 3."""
    stage = recipe.stages["stage3"]
    changed = replace(stage, upsampler=replace(stage.upsampler, name=name))
    return replace(recipe, stages={**recipe.stages, "stage3": changed})


def sweep(
    recipe: Recipe, upsamplers: Sequence[str], baseline: str, references: bool = False
) -> "tuple[GainTable, Path]":
    """Train stage 3 with each upsampler, score, compare.

    Args:
        recipe: its stage 3 is run once for each upsampler.
        upsamplers: names.
        baseline: one of them.
        references: score the teachers and an untrained student too.

    Returns the gain over the baseline, and the file of all scores.
    """
    from radio_distill.train.checkpoint import find
    from upsamplers import UPSAMPLERS

    if baseline not in upsamplers:
        raise ConfigError(
            f"--baseline {baseline} is not among --upsamplers {' '.join(upsamplers)}; add it"
        )
    for name in upsamplers:
        UPSAMPLERS.get(name)  # an unknown name ends here, before anything is trained
    folders = [
        train_stage("stage3", with_upsampler(recipe, name), resume=True) for name in upsamplers
    ]
    found = [find(folder) for folder in folders]
    path = score_checkpoints(found, recipe.evaluation, references, references)
    return gain_of(path, [f"stage3-{name}" for name in upsamplers], f"stage3-{baseline}"), path


def gain_of(path: Path, subjects: Sequence[str], baseline: str) -> "GainTable":
    """Compare some subjects of a score file with one of them."""
    from radio_distill.evals.harness import read_scores
    from radio_distill.evals.mtl_gain import multi_task_gain

    scores = read_scores(path)
    chosen = {subject: scores[subject] for subject in subjects}
    results, definitions = results_and_definitions(chosen)
    return multi_task_gain(results, baseline, definitions)


def show_gain(gain: "GainTable", folder: Path) -> None:
    """Print the gain table, and write it in four formats into ``folder``."""
    from radio_distill.evals.tables import print_tables

    table = gain.to_table()
    print_tables([table])
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


if __name__ == "__main__":
    sys.exit(main())
