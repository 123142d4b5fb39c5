"""One self-contained HTML page of a run: gain table, scores, curves, feature pictures, recipe.

    radio-distill report runs/demo --baseline stage3-bilinear

The run must have been scored (`radio-distill eval`); its students and teachers are loaded again to
paint what they see at several resolutions.
"""

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from radio_distill import __version__
from radio_distill.errors import ConfigError, DataError
from radio_distill.progress import Progress
from stages.arguments import add_trust_argument
from stages.evaluate import SCORES, label_of
from stages.sweep import gain_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from radio_distill.evals.harness import Encoder
    from radio_distill.evals.report import Figure
    from radio_distill.evals.tables import Table
    from radio_distill.train.checkpoint import Checkpoint

SIZES = (224, 336, 448, 672)
"""Sides at which features are painted, in pixels; each encoder takes the nearest it can."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill report``."""
    add_trust_argument(parser)
    parser.add_argument("folder", type=Path, help="run folder")
    parser.add_argument("--baseline", help="subject of the gain table (default: the first stage 3)")
    parser.add_argument("--output", type=Path, help="file (default: report.html in the run folder)")
    parser.add_argument("--pictures", type=int, default=3, help="pictures to paint (default: 3)")
    parser.add_argument(
        "--source", metavar="DIR", help="where from (default: the recipe's evaluation.pictures)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page."""
    path = report(
        arguments.folder,
        arguments.baseline,
        arguments.output,
        arguments.pictures,
        arguments.source,
    )
    print(f"report: {path}")
    return 0


def report(
    folder: Path,
    baseline: str | None = None,
    output: Path | None = None,
    pictures: int = 3,
    source: str | None = None,
) -> Path:
    """Write the page of a run folder; returns its path."""
    from radio_distill.config import dump
    from radio_distill.evals.report import write_report

    students = _students(folder)
    newest = students[-1]
    return write_report(
        output or folder / "report.html",
        title=f"radio_distill: {newest.recipe.name}",
        summary=_summary(newest, students),
        tables=_tables(folder / SCORES, [label_of(student) for student in students], baseline),
        figures=_sheets(students, pictures, source or newest.recipe.evaluation.pictures),
        curves=_curves(folder),
        recipe_text=dump(newest.recipe),
    )


def _students(folder: Path) -> "list[Checkpoint]":
    """Open the newest checkpoint of each stage 3 of a run, or of its last stage."""
    from radio_distill.train.checkpoint import find

    stages = sorted(path.parent for path in folder.glob("stage*/checkpoints"))
    last = [path for path in stages if path.name.startswith("stage3")] or stages[-1:]
    last = [path for path in last if "." not in path.name]  # earlier runs, moved aside
    if not last:
        raise DataError(f"{folder} holds no stage; train one first: radio-distill train")
    return [find(path) for path in last]


def _tables(path: Path, students: Sequence[str], baseline: str | None) -> "list[Table]":
    from radio_distill.evals.harness import read_scores
    from stages.evaluate import tables_of

    scores = read_scores(path)
    scored = [name for name in students if name in scores]
    if not scored:
        raise DataError(f"{path} has no scores of {', '.join(students)}; run radio-distill eval")
    if baseline is not None and baseline not in scored:
        raise ConfigError(f"--baseline {baseline} is not among {', '.join(scored)}")
    gain = gain_of(path, scored, baseline or scored[0])
    return [gain.to_table(), *tables_of(scores)]


def _curves(folder: Path) -> "list[Figure]":
    from radio_distill.evals.report import training_curves
    from radio_distill.train.sinks import read_json_lines

    logs = sorted(
        path for path in folder.glob("stage*/metrics.jsonl") if "." not in path.parent.name
    )
    return training_curves({path.parent.name: read_json_lines(path) for path in logs})


def _sheets(students: "Sequence[Checkpoint]", count: int, source: str) -> "list[Figure]":
    """Paint the features of held-out pictures, teachers above students, one column a size."""
    from radio_distill.data.folder import load_pictures
    from radio_distill.evals.pictures import feature_sheet
    from radio_distill.evals.report import Figure

    encoders = _encoders(students)
    pictures = load_pictures(source, count)
    figures = []
    with Progress("pictures", len(pictures), unit="pictures") as bar:
        for number, (key, picture) in enumerate(pictures, 1):
            rows = {name: _maps(encoder, picture) for name, encoder in encoders.items()}
            sheet = feature_sheet(picture, rows, [f"{size} px" for size in SIZES])
            caption = (
                "Three principal components of the features as colours, one basis a row: equal "
                "colours across a row mean equal features at every resolution."
            )
            figures.append(Figure(key, caption, sheet))
            bar.update(number)
    return figures


def _encoders(students: "Sequence[Checkpoint]") -> "dict[str, Encoder]":
    from radio_distill.train.distributed import World, choose_device
    from radio_distill.train.restore import load_student

    from .scoring import student_encoder, teacher_encoders, untrained_student

    recipe = students[-1].recipe
    device = choose_device(recipe.engine.device, World())
    encoders = {encoder.name: encoder for encoder in teacher_encoders(recipe, device)}
    encoders["untrained student"] = student_encoder(
        untrained_student(students[-1], device), students[-1], device
    )
    for student in students:
        encoders[label_of(student)] = student_encoder(
            load_student(student, device), student, device
        )
    return encoders


def _maps(encoder: "Encoder", picture: "Image") -> "list[Tensor]":
    from radio_distill.evals.harness import to_pixels

    return [encoder(to_pixels(picture, (size, size))[None]).spatial[0] for size in SIZES]


def _summary(newest: "Checkpoint", students: "Sequence[Checkpoint]") -> list[tuple[str, str]]:
    import torch

    recipe = newest.recipe
    steps = ", ".join(
        f"{name} {stage.steps} steps of {sum(p.batch_size for p in stage.partitions)} images"
        for name, stage in recipe.stages.items()
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return [
        ("recipe", recipe.name),
        ("student", f"{recipe.student.architecture}, patch {recipe.student.patch_size}"),
        (
            "teachers",
            ", ".join(f"{name} ({teacher.preset})" for name, teacher in recipe.teachers.items()),
        ),
        ("training", steps),
        ("compared", ", ".join(label_of(student) for student in students)),
        (
            "machine",
            f"{device}, {torch.get_num_threads()} threads, Python {platform.python_version()}",
        ),
        ("versions", f"radio_distill {__version__}, torch {torch.__version__}"),
    ]
