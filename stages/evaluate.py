"""Score students, what they were before training, and their teachers.

    radio-distill eval runs/demo/stage3-tile --teachers --untrained

The recipe is the checkpoint's own; every field of its section `evaluation` can be set anew
(--evaluation.limit 50). The scores go to `scores.jsonl` in the run folder, one line a number, and
`radio-distill score` makes tables of them.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

if __package__ in (None, ""):  # run as a file: put the checkout, and only it, first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from radio_distill.config import EvaluationConfig, Recipe, build, dump, override
from stages.arguments import add_trust_argument, run_script

if TYPE_CHECKING:
    from radio_distill.evals.mtl_gain import Metric
    from radio_distill.evals.tables import Table
    from radio_distill.train.checkpoint import Checkpoint
    from radio_distill.types import Score

TAKES_FIELDS = True
SCORES = "scores.jsonl"
UNTRAINED = "untrained student"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill eval``."""
    add_trust_argument(parser)
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, help="folders of stages or of single checkpoints"
    )
    parser.add_argument("--teachers", action="store_true", help="score the teachers too")
    parser.add_argument("--untrained", action="store_true", help="score an untrained student too")
    parser.add_argument("--output", type=Path, help=f"file (default: {SCORES} in the run folder)")


def run(arguments: argparse.Namespace) -> int:
    """Score what is asked for, and show the numbers."""
    from radio_distill.train.checkpoint import find

    found = [find(path) for path in arguments.checkpoints]
    evaluation = evaluation_with(found[0].recipe, arguments.fields)
    path = score_checkpoints(
        found, evaluation, arguments.teachers, arguments.untrained, arguments.output
    )
    show(path)
    return 0


def evaluation_with(recipe: Recipe, fields: Sequence[str]) -> EvaluationConfig:
    """Return a recipe's section ``evaluation`` with ``evaluation.field=value`` applied."""
    data = override(yaml.safe_load(dump(recipe)), fields)
    changed: Recipe = build(Recipe, data)
    return changed.evaluation


def score_checkpoints(
    found: "Sequence[Checkpoint]",
    evaluation: EvaluationConfig,
    teachers: bool = False,
    untrained: bool = False,
    output: Path | None = None,
) -> Path:
    """Score checkpoints of one recipe; returns the file that the scores went to."""
    from radio_distill.evals.harness import write_scores
    from radio_distill.train.distributed import World, choose_device
    from radio_distill.train.restore import load_student

    from .build import build_teachers
    from .scoring import score_student, score_teacher, untrained_student

    recipe = found[0].recipe
    device = choose_device(recipe.engine.device, World())
    path = output or run_folder(found[0]) / SCORES
    known = build_teachers(recipe, device)
    for checkpoint in found:
        label = label_of(checkpoint)
        model = load_student(checkpoint, device)
        write_scores(
            path, label, score_student(model, checkpoint, evaluation, known, device, label)
        )
    if untrained:
        model = untrained_student(found[0], device)
        scores = score_student(model, found[0], evaluation, known, device, UNTRAINED)
        write_scores(path, UNTRAINED, scores)
    if teachers:
        for name, teacher in known.items():
            without_fidelity = tuple(b for b in evaluation.benchmarks if b != "fidelity")
            config = replace(evaluation, benchmarks=without_fidelity)
            write_scores(path, f"teacher {name}", score_teacher(teacher, config, device))
    return path


def run_folder(checkpoint: "Checkpoint") -> Path:
    """Return the folder that a run lies in now, whatever its recipe says."""
    parents = checkpoint.folder.absolute().parents
    return parents[2] if parents[0].name == "checkpoints" else parents[0]


def label_of(checkpoint: "Checkpoint") -> str:
    """Name a checkpoint in tables: its stage's folder, ``stage3-tile``."""
    return checkpoint.folder.parent.parent.name


def results_and_definitions(
    scores: "Mapping[str, Sequence[Score]]",
) -> "tuple[dict[str, dict[str, float]], dict[str, Metric]]":
    """Return ``{subject: {metric: value}}`` and what each metric is, as gain tables want them."""
    from radio_distill.evals.mtl_gain import Metric

    results = {
        subject: {score.name: score.value for score in rows} for subject, rows in scores.items()
    }
    definitions = {
        score.name: Metric(
            group=score.group,
            higher_is_better=score.higher_is_better,
            unit=score.unit,
            headline=score.headline,
        )
        for rows in scores.values()
        for score in rows
    }
    return results, definitions


def tables_of(scores: "Mapping[str, Sequence[Score]]") -> "list[Table]":
    """Lay out scores, a table for each group, and say under each what its numbers were taken of."""
    from radio_distill.evals.mtl_gain import score_tables

    notes: dict[str, dict[str, None]] = {}
    for score in (score for rows in scores.values() for score in rows if score.details):
        details = ", ".join(f"{name} {value}" for name, value in score.details.items())
        line = f"{score.benchmark}: images {score.num_samples}, {details}"
        notes.setdefault(score.group, {})[line] = None
    return [
        replace(table, notes=(*table.notes, *notes.get(table.title, ())))
        for table in score_tables(*results_and_definitions(scores))
    ]


def show(path: Path) -> None:
    """Print the scores of a file, a table for each group."""
    from radio_distill.evals.harness import read_scores
    from radio_distill.evals.tables import print_tables

    print_tables(tables_of(read_scores(path)))
    print(f"scores: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run as a script; returns the exit status."""
    return run_script(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main())
