"""What a step is estimated to take on eight H100 and H200, and what each change of its schedule is.

python -m benchmarks.step_table
python -m benchmarks.step_table phi_s_b stage1 16 64 --devices 8

Nothing here is measured: operations, bytes and kernels are counted on tensors without data, rates
are assumed (see :mod:`radio_distill.plan.step_time`).
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from radio_distill.distill.micro_batches import assign_micro_batches
from radio_distill.plan.step_time import LAUNCH, Schedule, StepTime, step_time
from radio_distill.plan.time import DEVICES
from radio_distill.plan.work import with_work
from stages.planning import build_models, measured
from stages.recipes import load_recipe
from tools.published import markdown

KINDS = ("h100", "h200")
CASES = (("phi_s_b", "stage1", 16, 128), ("featsharp_radio_l", "stage3", 8, 32))
COLUMNS = (
    "recipe", "device", "schedule", "micro_batch", "ms / step", "useful", "bound by",
    "encode", "learn", "of both elementwise", "launches", "copies", "exchange", "optimizer",
)  # fmt: skip
SCHEDULES = {
    "waits, float copies": Schedule(waits=True, float_copies=True),
    "float copies": Schedule(float_copies=True),
    "neither": Schedule(),
    "neither, host x0.6": Schedule(launch=0.6 * LAUNCH),
}


def rows(recipe: str, name: str, sizes: Sequence[int], devices: int) -> Iterator[list[str]]:
    """Yield the rows of a stage: all schedules with the first size of a micro-batch."""
    models = build_models(load_recipe(recipe))
    with measured(models) as costs:
        stage = costs.stages[name]
        counted = {item.name: costs.partition(stage, item) for item in stage.partitions}
        stage = with_work(stage, costs)
        drawn = {item.name: item.sizes[0] for item in stage.partitions}
        for kind in KINDS:
            for size in sizes:
                engine = replace(stage.engine, micro_batch=size)
                resized = replace(stage, recipe=replace(stage.recipe, engine=engine))
                ranks = assign_micro_batches(resized, drawn, devices)
                for words, schedule in SCHEDULES.items():
                    if size == sizes[0] or schedule in list(SCHEDULES.values())[2:]:
                        took = step_time(
                            costs, resized, counted, ranks, DEVICES[kind].speed, schedule
                        )
                        yield [f"{recipe} {name}", kind, words, str(size), *_cells(took)]


def _cells(took: StepTime) -> list[str]:
    parts = (
        took.encode, took.learn, took.elementwise, took.launches, took.copies + took.floats,
        took.exchange, took.optimizer,
    )  # fmt: skip
    figures = [f"{1000 * part:,.0f}" for part in parts]
    return [f"{1000 * took.total:,.0f}", f"{took.useful:.0%}", took.bound, *figures]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("stage", nargs="?")
    parser.add_argument("micro_batch", nargs="*", type=int)
    parser.add_argument("--devices", type=int, default=8)
    asked = parser.parse_args(argv)
    cases = [(asked.recipe, asked.stage, *asked.micro_batch)] if asked.stage else CASES
    lines = [
        row
        for recipe, stage, *sizes in cases
        for row in rows(recipe, stage, sizes or [0], asked.devices)
    ]
    print("\n".join(markdown(COLUMNS, lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
