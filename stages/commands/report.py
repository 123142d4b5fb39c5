"""One self-contained HTML page of a run: gain table, scores, curves, feature images, recipe.

    radio-distill report runs/demo --baseline bilinear
    radio-distill report scores.jsonl at-448.jsonl --output public.html

The run must have been scored (`radio-distill eval`); its students and teachers are loaded again to
paint what they see at several resolutions. Files of scores without a run have a page of their
scores alone; where an encoder has scores at several sizes, it shows them over the size.
"""

import argparse
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from radio_distill.config import dump
from radio_distill.errors import ConfigError, DataError
from radio_distill.evals.gain import MultiTaskGain, multi_task_gain
from radio_distill.evals.score_set import ScoreSet
from radio_distill.evals.scores import read_scores
from radio_distill.evals.subjects import SCORES, UNTRAINED, matches
from radio_distill.report.charts import size_curves, training_curves
from radio_distill.report.gain_tables import gain_tables, headline_table, score_tables
from radio_distill.report.page import Figure, Section, machine_facts, write_page
from radio_distill.report.tables import Table
from radio_distill.system.progress import Progress
from radio_distill.train.stage_folders import stage_folders

from ..arguments import (
    add_images_argument,
    add_num_images_argument,
    add_trust_argument,
    check_output,
)

if TYPE_CHECKING:
    from radio_distill.train.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

SIZES = (224, 336, 448, 672)
"""Sides at which features are painted, in pixels."""
EXAMPLES = 2
"""Examples of each benchmark and model on a page."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill report``."""
    add = parser.add_argument
    add_trust_argument(parser)
    add("paths", nargs="+", type=Path, help="run folder; or files and folders of scores")
    add(
        "--baseline",
        help="model that the others are compared with (default: the first of a run's last stage)",
    )
    add("--output", type=Path, metavar="FILE", help="(default: report.html beside the scores)")
    add_num_images_argument(parser, 3)
    add_images_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the page."""

    asked, first = arguments, arguments.paths[0]
    is_run = first.is_dir() and (stage_folders(first) or not any(first.rglob(SCORES)))
    if len(asked.paths) == 1 and is_run:
        path = report(first, asked.baseline, asked.output, asked.num_images, asked.images)
    else:
        path = score_page(asked.paths, asked.baseline, asked.output)
    print(f"report: {path}")
    return 0


def report(
    folder: Path,
    baseline: str | None = None,
    output: Path | None = None,
    num_images: int = 3,
    images: str | None = None,
) -> Path:
    """Write the page of a run folder; returns its path."""
    from radio_distill.train.checkpoint import find
    from radio_distill.train.trackers import LOG, read_json_lines

    stages = stage_folders(folder)
    if not stages:
        if (folder / "checkpoints").exists():
            raise DataError(
                f"{folder} is a stage of a run; name the run: {folder.absolute().parent}"
            )
        raise DataError(f"{folder} holds no stage; train one first: radio-distill train")
    students = {path.name: find(path) for path in [*stages.values()][-1]}
    output = output or folder / "report.html"
    check_output(output)
    newest = [*students.values()][-1]
    gain, scores = _compared(folder, students, baseline)
    logged = itertools.chain.from_iterable(stage_folders(folder, LOG).values())
    curves = training_curves({path.name: read_json_lines(path / LOG) for path in logged})
    sheets, heads = _sheets(students, num_images, images or newest.recipe.evaluation.images)
    sections = [
        Section("result", "Result", gain_tables(gain)),
        Section("run", "What was run", facts=_facts(newest, students)),
        Section("training", "Training", panels=curves),
        *_score_sections(scores),
        Section("features", "Features", sheets=sheets),
        Section("heads", "Heads", sheets=heads),
        Section("recipe", "Recipe", settings=dump(newest.recipe)),
    ]
    return write_page(output, f"radio_distill: {newest.recipe.name}", sections)


def score_page(paths: Sequence[Path], baseline: str | None, output: Path | None) -> Path:
    """Write the page of files and folders of scores; returns its path."""

    beside = paths[0] if paths[0].is_dir() else paths[0].parent
    output = output or beside / "report.html"
    check_output(output)
    scores = read_scores(paths)
    tables: list[Table] = []
    if baseline is not None:
        scores.check_alike()
        named = scores.named(baseline, "baseline")
        lacking, remarks = scores.teachers, scores.remarks()
        tables = gain_tables(
            multi_task_gain(
                scores.results, named, scores.definitions, may_lack=lacking, remarks=remarks
            )
        )
    sections = [Section("result", "Result", tables), *_score_sections(scores)]
    return write_page(output, "radio_distill: scores", sections)


def _score_sections(scores: ScoreSet) -> list[Section]:
    """Lay out scores, the same over the size of the input, and examples."""
    from radio_distill.report.examples import LEGEND, find_examples

    read = scores.results, scores.definitions, scores.measured
    examples = find_examples(scores, EXAMPLES)
    return [
        Section("scores", "Scores", [headline_table(*read), *score_tables(*read)]),
        Section("sizes", "Scores over the size of the input", panels=size_curves(scores)),
        Section(
            "examples", "Examples", facts=[*LEGEND.items()] if examples else (), sheets=examples
        ),
    ]


def _compared(
    folder: Path, students: "Mapping[str, Checkpoint]", baseline: str | None
) -> tuple[MultiTaskGain, ScoreSet]:
    """Compare those students that were scored; and return all scores of the run."""
    from radio_distill.evals.checkpoint_subjects import student_subject

    from .scoring import gain_of

    scores = read_scores([folder])  # other seeds of a run may lie in folders of it
    scored = {
        name: student
        for name, student in students.items()
        if scores.label_of(student_subject(student)) is not None
    }
    missing = [name for name in students if name not in scored]
    command = f"radio-distill eval {' '.join(str(folder / name) for name in missing)}"
    if not scored:
        steps = ", ".join(f"{name} at step {students[name].step}" for name in missing)
        raise DataError(f"{folder / SCORES} has no scores of {steps}; run {command}")
    if missing:
        logger.warning("not scored, so not in the tables: %s; %s", ", ".join(missing), command)
    chosen = [name for name in scored if baseline is None or matches(baseline, name)]
    if not chosen:
        raise ConfigError(f"--baseline {baseline} is not among {', '.join(scored)}")
    if baseline is not None and len(chosen) > 1:
        raise ConfigError(f"--baseline {baseline} may be {' or '.join(chosen)}; name one")
    gain = gain_of(folder, [*scored.values()], scored[chosen[0]], references=True)
    return gain, scores


def _sheets(
    students: "Mapping[str, Checkpoint]", num_images: int, source: str
) -> tuple[list[Figure], list[Figure]]:
    """Paint held-out images: features over the size, teachers above students; and heads."""
    from radio_distill.data.folder import load_images
    from radio_distill.report.feature_images import head_sheet, size_sheet

    from ..build import build_teachers
    from .scoring import device_of, encoder_of, targets_for, teacher_encoders

    newest = [*students.values()][-1]
    side = newest.recipe.evaluation.dense_size
    teachers = build_teachers(newest.recipe, device_of(newest))
    encoders = {encoder.name: encoder for encoder in teacher_encoders(newest, teachers)}
    encoders[UNTRAINED] = encoder_of(newest, untrained=True)
    trained = {
        name: encoder_of(student, name, targets=targets_for(student, side, teachers))
        for name, student in students.items()
    }
    encoders |= trained
    bodies = [student.recipe.student for student in students.values()]
    max_sizes = sorted({body.max_size for body in bodies if body.body == "vit"})
    caption = (
        "Three principal components of the features as colours, one basis a row: equal colours "
        "across a row mean equal features at every resolution. A column is the size that encoders "
        "were given; an encoder that takes other sizes says which, and its cell stays empty where "
        "it takes none near the column's."
    )
    if max_sizes:
        sides = " and ".join(map(str, max_sizes))
        caption += f" A student's positions are stretched above student.max_size ({sides} px)."
    of_heads = (
        "Three principal components of the student's own map, and of what each head makes of it "
        "beside its teacher's map, both normalised: in a column, equal colours mean equal features."
    )
    images = load_images(source, num_images)
    figures, heads = [], []
    with Progress("images", len(images), unit="images") as bar:
        for number, (key, image) in enumerate(images, 1):
            figures.append(Figure(key, caption, size_sheet(image, encoders, SIZES)))
            for name, encoder in trained.items():
                sheet = head_sheet(image, encoder, (side, side))
                heads.append(Figure(f"{key}: {name}", of_heads, sheet))
            bar.update(number)
    return figures, heads


def _facts(newest: "Checkpoint", students: "Mapping[str, Checkpoint]") -> list[tuple[str, str]]:
    """Say what was run, where, as names and texts."""
    from .scoring import device_of

    recipe = newest.recipe
    teachers = [f"{name} ({teacher.preset})" for name, teacher in recipe.teachers.items()]
    training = [
        f"{name} {stage.steps} steps of {stage.images_per_step} images"
        for name, stage in recipe.stages.items()
    ]
    return [
        ("recipe", recipe.name),
        ("student", f"{recipe.student.architecture}, patch {recipe.student.patch_size}"),
        ("teachers", ", ".join(teachers)),
        ("training", ", ".join(training)),
        ("compared", ", ".join(f"{name} at step {one.step}" for name, one in students.items())),
        *machine_facts(device_of(newest)),
    ]
