"""What a step is estimated to take on eight H100 and H200, and what each change of its schedule is.

python -m benchmarks.step_table
python -m benchmarks.step_table phi_s_b stage1 16 --devices 8

Nothing here is measured: operations, bytes and kernels are counted on tensors without data, rates
are assumed (see :mod:`radio_distill.plan.step_time`).
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Literal

from radio_distill.distill.micro_batches import assign_micro_batches
from radio_distill.plan.memory import resident_memory, with_micro_batches
from radio_distill.plan.step_time import LAUNCH, Schedule, StepTime, step_time
from radio_distill.plan.time import DEVICES, dealing_speed
from radio_distill.plan.work import with_work
from stages.planning import build_models, measured
from stages.recipes import load_recipe
from tools.published import markdown

KINDS = ("h100", "h200")
CASES: tuple[tuple[str, str, int], ...] = (
    ("phi_s_b", "stage1", 16),
    ("featsharp_radio_l", "stage3", 8),
)
COLUMNS = (
    "recipe", "device", "schedule", "micro_batch", "ms / step", "useful", "bound by",
    "encode", "learn", "of both elementwise", "other", "unequal work", "launches", "copies",
    "exchange", "optimizer",
)  # fmt: skip
SCHEDULES: dict[str, tuple[bool, Schedule]] = {
    "eager, waits, float copies": (False, Schedule(waits=True, float_copies=True)),
    "eager, float copies": (False, Schedule(float_copies=True)),
    "eager": (False, Schedule()),
    "compiled": (True, Schedule()),
    "compiled, host x0.6": (True, Schedule(launch=0.6 * LAUNCH)),
}


def rows(case: tuple[str, str, int], devices: int) -> Iterator[list[str]]:
    """Yield the rows of a stage: all schedules with few images a micro-batch, then with `auto`."""
    recipe, name, size = case
    models = build_models(load_recipe(recipe))
    with measured(models) as costs:
        whole = costs.stages[name]
        counted = {item.name: costs.partition(whole, item) for item in whole.partitions}
        drawn = {item.name: item.sizes[0] for item in whole.partitions}
        resident = resident_memory(costs, whole, devices, models.all_teacher_bytes)
        choices: tuple[int | Literal["auto"], ...] = (size, "auto")
        for kind, micro_batch, words in product(KINDS, choices, SCHEDULES):
            is_compiled, schedule = SCHEDULES[words]
            if micro_batch == "auto" and (schedule.waits or schedule.float_copies):
                continue
            engine = replace(whole.engine, micro_batch=micro_batch, compile=is_compiled)
            stage = replace(whole, recipe=replace(whole.recipe, engine=engine))
            stage = with_micro_batches(stage, costs, resident, DEVICES[kind].memory)
            stage = with_work(stage, costs, dealing_speed(is_gpu=True))
            ranks = assign_micro_batches(stage, drawn, devices)
            took = step_time(costs, stage, counted, ranks, DEVICES[kind].speed, schedule)
            yield [f"{recipe} {name}", kind, words, str(micro_batch), *_cells(took)]


def _cells(took: StepTime) -> list[str]:
    parts = (
        took.encode, took.learn, took.elementwise, took.other, took.waiting, took.launches,
        took.copies + took.floats, took.exchange, took.optimizer,
    )  # fmt: skip
    figures = [f"{1000 * part:,.0f}" for part in parts]
    return [f"{1000 * took.total:,.0f}", f"{took.useful:.0%}", took.bound, *figures]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("stage", nargs="?")
    parser.add_argument("micro_batch", nargs="?", type=int, default=16)
    parser.add_argument("--devices", type=int, default=8)
    asked = parser.parse_args(argv)
    cases = [(asked.recipe, asked.stage, asked.micro_batch)] if asked.stage else CASES
    lines = [row for case in cases for row in rows(case, asked.devices)]
    print("\n".join(markdown(COLUMNS, lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
