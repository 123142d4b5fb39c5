"""What the planner's time model says of a step on this CPU, against the step.

    python -m benchmarks.plan_check

Three rates are measured first, and put into the model: products of a layer's matrices, elementwise
operators on more than the caches hold, and an operator on next to nothing. Then small recipes take
steps with random weights on noise. All times are CPU time of one thread, so run it with
OMP_NUM_THREADS=1. What the model leaves out (views, losses) is measured too, as *left out*.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from benchmarks.synthetic import one_partition
from benchmarks.train_step import BACKWARD, FORWARD, REST, TARGETS, UPDATE, Clock, measure
from radio_distill.config import Recipe
from radio_distill.distill.micro_batches import assign_micro_batches
from radio_distill.plan.meter import Speed
from radio_distill.plan.step_time import StepTime, step_time
from radio_distill.plan.work import with_work
from stages.planning import build_models, measured
from stages.recipes import load_recipe
from tools.published import markdown

CASES = (
    ("demo", "stage1", "low", 16, ()),
    ("demo", "stage3", "high", 4, ()),
    ("demo", "stage1", "low", 8, ("student.architecture=vit_base_patch16_224",)),
)
COLUMNS = ("step", "part", "model, ms", "measured, ms", "model / measured")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the rates and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7, help="timed (default: 7)")
    steps = parser.parse_args(argv).steps
    assert torch.get_num_threads() == 1, "run with OMP_NUM_THREADS=1"
    speed = rates()
    print(
        f"{speed.float32 / 1e9:.1f} GFLOP/s of products, {speed.streaming / 1e9:.2f} GB/s of "
        f"elementwise operators, {speed.launch * 1e6:.1f} µs an operator\n"
    )
    rows = []
    for name, stage, partition, images, fields in CASES:
        recipe = load_recipe(name, ["engine.device=cpu", "engine.precision=float32", *fields])
        recipe = one_partition(recipe, stage, partition, images, 1, recipe.engine)
        taken = measure(recipe, stage, partition, images, 1, steps)
        said = predict(recipe, stage, speed)
        encoders = sum(took for part, took in taken.phases.items() if part.startswith("  "))
        student = taken.phases[FORWARD] + taken.phases[BACKWARD]
        title = f"{recipe.name} {stage}/{partition}, {recipe.student.architecture}, {images} images"
        parts = {
            "teachers": (said.encode, encoders),
            "student": (said.learn, student),
            "upsamplers, normalizers": (said.other, taken.phases[TARGETS] - encoders),
            "optimizer": (said.optimizer, taken.phases[UPDATE]),
            "left out": (0.0, taken.phases[REST]),
            "whole step": (said.total, taken.step),
        }
        for part, (model, real) in parts.items():
            figures = f"{1e3 * model:.1f}", f"{1e3 * real:.1f}", f"{model / real:.2f}"
            rows.append((title if part == "teachers" else "", part, *figures))
    print("\n".join(markdown(COLUMNS, rows)))
    return 0


def rates() -> Speed:
    """Return what one thread does in a second."""
    tokens, matrix = torch.randn(1024, 768), torch.randn(3072, 768)
    products = 2 * tokens.shape[0] * matrix.numel() / seconds(lambda: F.linear(tokens, matrix), 20)
    large = torch.randn(2**24)
    result = torch.empty_like(large)
    streaming = 8 * large.numel() / seconds(lambda: torch.mul(large, 2, out=result), 20)
    one = torch.ones(1, requires_grad=True)

    def operators() -> None:
        number = one
        for _ in range(100):
            number = number * one
        number.backward()  # two operators each, and one that adds gradients up

    launch = seconds(operators, 20) / 400
    return Speed(products, products, streaming, launch=launch)


def seconds(run: Callable[[], object], times: int) -> float:
    """Return the median CPU time of a call."""
    clock = Clock(torch.device("cpu"))
    run()
    return statistics.median(clock.time(run) for _ in range(times))


def predict(recipe: Recipe, name: str, speed: Speed) -> StepTime:
    """Return what the model says of a stage's step, each part with its own operators.

    On a device that is its own host the time of launching belongs to the part that launches.
    """
    models = build_models(recipe, "float32")
    with measured(models) as costs:
        stage = costs.stages[name]
        counted = {item.name: costs.partition(stage, item) for item in stage.partitions}
        stage = with_work(stage, costs, speed)
        sizes = {item.name: item.sizes[0] for item in stage.partitions}
        ranks = assign_micro_batches(stage, sizes, 1)
        return step_time(costs, stage, counted, ranks, speed)


if __name__ == "__main__":
    sys.exit(main())
