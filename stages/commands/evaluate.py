"""Score students, what they were before training, and their teachers.

    radio-distill eval runs/demo/stage3-tile --teachers --untrained
    radio-distill eval runs/mine/stage2 runs/other/stage2 --output two.jsonl
    radio-distill eval runs/mine/stage1/checkpoints/step-*

The recipe is each checkpoint's own; every field of its section `evaluation` can be set anew
(--evaluation.limit 50). Checkpoints that are scored together must be asked the same: where their
sections differ in what a benchmark reads, nothing is scored. The scores go to `scores.jsonl` in the
run folder of each, one line a number, with run, stage and step, and `radio-distill score` makes
tables of them. A student is encoded at the size asked for, as `radio_distill.load` does.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml

from radio_distill.config import EvaluationConfig, Recipe, build, dump, override
from radio_distill.evals.subjects import SCORES

from ..arguments import add_trust_argument

TAKES_FIELDS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill eval``."""
    add_trust_argument(parser)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        help="folders of runs (their last stage), of stages (their newest checkpoint), checkpoints",
    )
    parser.add_argument("--teachers", action="store_true", help="score the teachers too")
    parser.add_argument("--untrained", action="store_true", help="score an untrained student too")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"(default: {SCORES} in each run folder)"
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="NAME",
        help="what tables call them, one for each (default: STAGE, or RUN/STAGE/step-N)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Score what is asked for, and show the numbers."""
    from radio_distill.weights.files import find_checkpoint

    from .scoring import check_labels, score_checkpoints

    checkpoints = [find_checkpoint(path) for path in arguments.runs]
    check_labels(arguments.labels, len(checkpoints))
    evaluations = [evaluation_with(one.recipe, arguments.fields) for one in checkpoints]
    paths = score_checkpoints(
        checkpoints,
        evaluations,
        arguments.teachers,
        arguments.untrained,
        arguments.output,
        arguments.labels or (),
    )
    show(*paths)
    return 0


def evaluation_with(recipe: Recipe, fields: Sequence[str]) -> EvaluationConfig:
    """Return a recipe's section ``evaluation`` with ``evaluation.field=value`` applied."""
    data = override(yaml.safe_load(dump(recipe)), fields)
    changed: Recipe = build(Recipe, data)
    return changed.evaluation


def show(*paths: Path) -> None:
    """Print all scores of some files, a table for each group."""
    from radio_distill.evals.scores import read_scores
    from radio_distill.report.gain_tables import score_tables
    from radio_distill.report.tables import print_tables

    scores = read_scores(paths)
    print_tables(score_tables(scores.results, scores.definitions, scores.measured))
    for text in (*scores.notes, *(f"scores: {path}" for path in paths)):
        print(text)
