"""How long training waits for checkpoints, for students of several sizes.

For each student the same steps are trained without checkpoints, and with one every so many steps.
"Waits" is the share of the time in which the training loop copied its state, or waited until the
checkpoint before was on the disk (``checkpoint_wait_share`` of metrics.jsonl). "Slower" is how much
longer a step took than without checkpoints: it holds what the thread that writes takes from the
others too, where they share cores, and whatever else the machine did meanwhile. The last column is
the smallest distance of checkpoints at which the wait stays below 2 %, if each costs what these
did. The checkpoint that ends a stage is left out: nothing can hide it.

    python -m benchmarks.checkpoint_wait [demo] [--students vit_base_patch16_224] [--every 10 50]

The steps are short for the student's size, with few images and the demo's small teachers, so that
the shares are upper bounds: on real data a step takes longer and its state is as large. Every field
of the recipe can be set, as in ``radio-distill train``. Runs are written to OUTPUT, and deleted.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from radio_distill.config import Recipe
from radio_distill.report.tables import Cell, Column, Table, print_tables
from stages.arguments import run_script
from stages.build import train_stage
from stages.recipes import load_recipe
from tools.demo_images import write_demo_images

TAKES_FIELDS = True
STUDENTS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
WARM_UP = 2
"""Steps of which the time is not measured: the first ones allocate."""
BOUND = 0.02


class Timing(NamedTuple):
    """One run."""

    seconds: float
    """Of a step."""
    waited: float
    """Share of the time."""
    seconds_each: float
    """Waited for one checkpoint."""
    megabytes: float
    """Of a checkpoint."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", default="demo", help="name or file (default: demo)")
    parser.add_argument("--stage", default="stage1", metavar="NAME")
    parser.add_argument("--students", nargs="+", default=STUDENTS, metavar="ARCHITECTURE")
    parser.add_argument("--every", nargs="+", type=int, default=[10, 50], metavar="K")
    parser.add_argument("--steps", type=int, default=101, metavar="N")
    parser.add_argument("--batch", type=int, default=4, metavar="IMAGES")
    parser.add_argument("--output", type=Path, default=Path("runs/checkpoint_wait"), metavar="DIR")


def run(arguments: argparse.Namespace) -> int:
    rows: list[tuple[Cell, ...]] = []
    for student in arguments.students:
        without = measure(arguments, student, 0)
        for every in arguments.every:
            rows.append(_row(student, every, without, measure(arguments, student, every)))
    columns = (
        Column("Student"),
        Column("Checkpoint, MB", ".0f"),
        Column("Every", "d"),
        Column("s / step without", ".3f"),
        Column("with", ".3f"),
        Column("Slower", "+.1%"),
        Column("s / checkpoint", ".2f"),
        Column("Waits", ".2%", "lower"),
        Column("Below 2 % from every", "d"),
    )
    note = f"{arguments.recipe}, about {arguments.steps} steps of {arguments.batch} images"
    print_tables([Table("Waiting for checkpoints", columns, tuple(rows), (note,))])
    return 0


def measure(arguments: argparse.Namespace, student: str, every: int) -> Timing:
    """Train a student with a checkpoint every so many steps; 0 for none."""
    num_saves = max(1, arguments.steps // every) if every else 0
    measured = num_saves * every + 1 if every else arguments.steps
    # Some steps more: the checkpoint that ends the stage must not wait for the one before.
    recipe = _recipe(arguments, student, every, measured + max(every // 2, 1))
    folder = train_stage(arguments.stage, recipe).parents[1]
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[WARM_UP - 1 : measured]]
    size = sum(path.stat().st_size for path in (folder / "checkpoints").glob("*/*"))
    shutil.rmtree(recipe.folder)
    # The share of each line is that of the time since the line before.
    waited = sum(
        row["checkpoint_wait_share"] * (row["time"] - before["time"])
        for before, row in pairwise(rows)
    )
    seconds = rows[-1]["time"] - rows[0]["time"]
    return Timing(
        seconds / (len(rows) - 1), waited / seconds, waited / max(num_saves, 1), size / 1e6
    )


def _recipe(arguments: argparse.Namespace, student: str, every: int, steps: int) -> Recipe:
    fields = [
        f"name={student}-{every}",
        f"output={arguments.output}",
        f"normalizer.cache={arguments.output / 'statistics'}",
        f"student.architecture={student}",
        f"stages.{arguments.stage}.steps={steps}",
        f"stages.{arguments.stage}.partitions.0.batch_size={arguments.batch}",
        "log.every=1",
        f"log.save_every={every or 2 * steps}",
        "log.keep_last=1",
        "log.trackers=[]",
        "watch.slow_share=0",  # a step that saves is slower, and here each has a log line
    ]
    recipe = load_recipe(arguments.recipe, [*fields, *arguments.fields])
    if recipe.data.shards == load_recipe("demo").data.shards:
        write_demo_images()
    return recipe


def _row(student: str, every: int, without: Timing, timing: Timing) -> tuple[Cell, ...]:
    slower = timing.seconds / without.seconds - 1
    enough = max(1, math.ceil(every * timing.waited / BOUND))
    return (
        student,
        timing.megabytes,
        every,
        without.seconds,
        timing.seconds,
        slower,
        timing.seconds_each,
        timing.waited,
        enough,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run as a script; returns the exit status."""
    return run_script(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main())
