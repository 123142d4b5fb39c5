"""Compare what students see in one image at different resolutions.

    radio-distill mode-switching runs/low/stage3 runs/both/stage3-bilinear --labels 'only low' both

A student that was trained at one resolution speaks another language at others: it switches modes
(RADIOv2.5, arXiv 2412.07679, section 3). Two curves over the size show it, of the backbone's
features and over all images (see radio_distill/evals/agreement.py): agreement with the
reference size, and the shift of the mean feature from there. Written to RUN/mode_switching:

    curves.png, curves.svg      both, a line a student, teachers dashed
    photograph.png              one image's features at each size, one PCA basis a student
    curves.json                 the numbers

What heads predict is left out: it was seen to move with the size as the backbone's features do.
"""

import argparse
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from radio_distill.errors import ConfigError
from radio_distill.report.tables import Column, Table, print_tables
from radio_distill.system.files import replacing, write_text
from radio_distill.system.progress import Progress

from ..arguments import (
    add_images_argument,
    add_trust_argument,
    check_output,
    count_of,
    side_of,
    writing,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from radio_distill.data.folder import ImageRef
    from radio_distill.evals.encoder import Encoder
    from radio_distill.train.checkpoint import Checkpoint
    from radio_distill.types import Size

logger = logging.getLogger(__name__)

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
"""Default sizes, times the recipe's ``evaluation.size``."""
MEASURES: tuple[tuple[str, str, str, str, Literal["higher", "lower"]], ...] = (
    ("Agreement with", "cosine", "agreement", "mean", "higher"),
    ("Shift of the mean feature from", "shift", "mode_switch", "largest", "lower"),
)
"""Title, value of a :class:`SizeAgreement`, its name in files, what sums it up, what is better."""
SIDE = 160
"""Of one image on the sheet, in pixels."""


@dataclass(frozen=True)
class Curve:
    """One encoder at every size that it takes, two or more; measures are in %."""

    encoder: "Encoder"
    reference: "Size"
    values: "Mapping[str, Mapping[Size, float]]"
    """``values[measure][size]``, the reference among the sizes, which rise."""
    totals: Mapping[str, float]
    """The mean agreement and the largest shift, by measure."""
    is_teacher: bool

    def value_near(self, measure: str, side: int) -> float | None:
        """Return the value at the size taken for a side; None where that is a patch away."""
        size = self.encoder.nearest_size((side, side))
        is_near = max(abs(edge - side) for edge in size) < self.encoder.size_multiple
        return self.values[measure][size] if is_near else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill mode-switching``."""
    add_trust_argument(parser)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="folders of runs, stages, checkpoints")
    add(
        "--sizes", nargs="+", type=side_of, metavar="PX", help="default: 0.5 to 3 x evaluation.size"
    )
    add("--reference", type=side_of, metavar="PX", help="default: evaluation.size")
    add_images_argument(parser)
    add(
        "--num-images",
        type=count_of,
        metavar="N",
        help="most images; 0 for all (default: evaluation.limit)",
    )
    add(
        "--labels",
        nargs="+",
        metavar="NAME",
        help="names of the runs, one for each (default: RUN/STAGE)",
    )
    add("--teachers", action="store_true", help="measure the first run's teachers too")
    add(
        "--output", type=Path, metavar="DIR", help="default: mode_switching in the first run folder"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the tables, write the files."""
    from radio_distill.data.folder import list_images, spread
    from radio_distill.evals.checkpoint_subjects import run_folder
    from radio_distill.evals.encoder import open_image
    from radio_distill.report.feature_images import size_sheet
    from radio_distill.weights.files import find_checkpoint

    from .scoring import encoder_of, teacher_encoders

    runs = _labelled([find_checkpoint(path) for path in arguments.runs], arguments.labels)
    first = next(iter(runs.values()))
    evaluation = first.recipe.evaluation
    source = arguments.images or evaluation.images
    if not source:
        raise ConfigError("the recipe's evaluation.images is empty; name some by --images")
    most = evaluation.limit if arguments.num_images is None else arguments.num_images
    images = spread(list_images(source), most)
    folder = arguments.output or run_folder(first) / "mode_switching"
    check_output(folder / "curves.png")
    students = [encoder_of(checkpoint, label) for label, checkpoint in runs.items()]
    sizes = _sizes(students, evaluation.size, arguments.reference, arguments.sizes)
    teachers = teacher_encoders(first) if arguments.teachers else []
    curves = measure(students, images, sizes) + measure(teachers, images, sizes, True)
    print_tables(tables(curves, sizes, len(images)))
    encoders = {encoder.name: encoder for encoder in [*students, *teachers]}
    sheet = size_sheet(open_image(images[0]), encoders, sorted(sizes), SIDE)
    facts = {
        "runs": {label: str(checkpoint.folder) for label, checkpoint in runs.items()},
        "images": source,
        "num_images": len(images),
        "encoders": [_plain(curve) for curve in curves],
    }
    _write(folder, curves, sheet, facts)
    print(f"figure, photograph and numbers: {folder}")
    return 0


def _labelled(
    runs: "Sequence[Checkpoint]", labels: Sequence[str] | None
) -> "dict[str, Checkpoint]":
    """Name runs as the figure calls them; raises ConfigError where names do not tell them apart."""
    from radio_distill.evals.checkpoint_subjects import student_subject

    from .scoring import check_labels

    check_labels(labels, len(runs))
    subjects = map(student_subject, runs)
    names = labels or [f"{subject.run}/{subject.stage}" for subject in subjects]
    if not labels and len({run.step for run in runs}) > 1:
        names = [
            f"{name}/step-{run.step}" if names.count(name) > 1 else name
            for name, run in zip(names, runs, strict=True)
        ]
    if len(set(names)) < len(names):
        raise ConfigError(f"two runs are called alike ({', '.join(names)}); tell them by --labels")
    return dict(zip(names, runs, strict=True))


def _sizes(
    students: "Sequence[Encoder]", default: int, reference: int | None, sizes: Sequence[int] | None
) -> list[int]:
    """Return the sides to measure, the reference first.

    Given ones are taken as they are or refused; defaults move to what the first student takes,
    which is any multiple of its patch.
    """

    def nearest(student: "Encoder", side: float) -> int:
        return student.nearest_size((max(round(side), 1), max(round(side), 1)))[0]

    given = [side for side in (reference, *(sizes or [])) if side is not None]
    for side, student in itertools.product(given, students):
        if side != nearest(student, side):
            raise ConfigError(
                f"{student.name} cannot take {side} px: sizes are multiples of "
                f"{student.size_multiple} (nearest {nearest(student, side)})"
            )
    first = nearest(students[0], default) if reference is None else reference
    others = sizes or [nearest(students[0], default * scale) for scale in SCALES]
    sides = list(dict.fromkeys([first, *others]))
    if len(sides) < 2:
        raise ConfigError(f"--sizes: nothing to compare with the reference {first} px; add a size")
    return [first, *sorted(sides[1:])]


def measure(
    encoders: "Sequence[Encoder]",
    images: "Sequence[ImageRef]",
    sizes: Sequence[int],
    are_teachers: bool = False,
) -> list[Curve]:
    """Compare each encoder's features at every size with those at the first.

    An encoder that takes one size only is left out, with a warning.
    """
    from radio_distill.evals.agreement import across_sizes, largest_shift, mean_cosine

    curves = []
    for encoder in encoders:
        with Progress(encoder.name, len(sizes) * len(images)) as bar:
            rows = across_sizes(encoder, images, sizes, progress=bar.report)
        if len(rows) == 1:
            logger.warning("%s takes one size only: left out", encoder.name)
            continue
        rising = sorted(rows, key=lambda row: row.size)
        values = {
            measure: {row.size: 100 * getattr(row, measure) for row in rising}
            for _, measure, *_ in MEASURES
        }
        totals = {"cosine": mean_cosine(rows[1:]), "shift": largest_shift(rows)}
        curves.append(Curve(encoder, rows[0].size, values, totals, are_teachers))
    return curves


def tables(curves: Sequence[Curve], sizes: Sequence[int], num_images: int) -> list[Table]:
    """Make a table of each measure: rows are encoders, columns sizes but the first."""
    reference, *others = sizes
    note = (
        f"{num_images} images; an encoder whose patch does not divide a size takes the nearest "
        "multiple, and has no value where it takes none within a patch"
    )
    made = []
    for title, measure, _, kind, better in MEASURES:
        columns = [Column(f"{side} px", ".1f", better) for side in others]
        rows = [
            (
                curve.encoder.name,
                *(curve.value_near(measure, side) for side in others),
                curve.totals[measure],
            )
            for curve in curves
        ]
        columns = [Column("encoder"), *columns, Column(kind, ".1f", better)]
        made.append(Table(f"{title} {reference} px, %", tuple(columns), tuple(rows), (note,)))
    return made


def draw(curves: Sequence[Curve], png: Path, svg: Path) -> None:
    """Draw both measures over the size, in two panels; teachers are dashed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from radio_distill.report.charts import PALETTE

    reference = curves[0].reference[0]
    with rc_context({"svg.hashsalt": "radio_distill"}):  # the same file for the same numbers
        figure = Figure(figsize=(8.4, 3.8), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, (title, measure, *_) in zip(panels, MEASURES, strict=True):
            for curve, colour in zip(curves, itertools.cycle(PALETTE), strict=False):
                points = curve.values[measure]
                axes.plot(
                    [size[0] for size in points], [*points.values()],
                    "--" if curve.is_teacher else "-", color=colour, label=curve.encoder.name,
                    linewidth=1.6, marker="o", markersize=3,
                )  # fmt: skip
            axes.axvline(reference, color="#808080", linewidth=0.8, linestyle=":")
            axes.set_xlabel("input, px")
            axes.set_title(f"{title} {reference} px, %", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
        legend = panels[0].get_legend_handles_labels()
        figure.legend(*legend, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(png, format="png", dpi=150)
        figure.savefig(svg, format="svg", metadata={"Date": None})


def _write(folder: Path, curves: Sequence[Curve], sheet: "Image", facts: Mapping[str, Any]) -> None:
    """Write the figure, the photograph and the numbers; raises ConfigError."""
    with writing(folder):
        with replacing(folder / "curves.png") as png, replacing(folder / "curves.svg") as svg:
            draw(curves, png, svg)
        with replacing(folder / "photograph.png") as path:
            sheet.save(path, "PNG")
    write_text(folder / "curves.json", json.dumps(facts, indent=2) + "\n")


def _plain(curve: Curve) -> dict[str, Any]:
    """Return a curve as JSON holds it."""
    names = {measure: name for _, measure, name, *_ in MEASURES}
    return {
        "name": curve.encoder.name,
        "is_teacher": curve.is_teacher,
        "reference": curve.reference,
        **{name: curve.totals[measure] for measure, name in names.items()},
        "sizes": [
            {"size": size} | {name: curve.values[m][size] for m, name in names.items()}
            for size in curve.values["cosine"]
        ],
    }
