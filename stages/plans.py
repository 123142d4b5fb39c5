"""What a recipe costs on given devices: its stages, and a suite of benchmarks with its student."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from radio_distill.config import Recipe, for_stage
from radio_distill.evals.cost import Counted, Price, counted, priced
from radio_distill.evals.encoder import Encoder, student_encoder
from radio_distill.models.backbone import as_encoder
from radio_distill.models.heads import build_student
from radio_distill.plan.meter import fake_module, fake_tensors, share_equal_blocks
from radio_distill.plan.time import DeviceType, StagePlan, measurements, plan_stage
from radio_distill.system.progress import Progress, duration, titled_table
from radio_distill.types import Suite, format_size
from teachers import teacher_specs

from .planning import Models, measured


def plan_stages(
    models: Models,
    counts: Mapping[str, int],
    device: DeviceType,
    utilisation: float = 0.35,
    with_memory: bool = True,
) -> list[StagePlan]:
    """Plan every stage of one student, each on its own number of devices.

    Args:
        models: of the student.
        counts: devices of each stage; stages of other students are passed over.
        device: their kind.
        utilisation: share of the peak that is reached.
        with_memory: measure memory too, which is most of the work.
    """
    stages = models.stages()
    counts = {name: count for name, count in counts.items() if name in stages}
    total = sum(measurements(stages[name], with_memory) for name in counts)
    done = itertools.count(1)
    teacher_bytes = models.all_teacher_bytes  # counted before, since fake tensors take longer
    plans = []
    with (
        Progress("measuring models without data", total, "views") as bar,
        measured(models, can_compile=not device.is_host) as costs,
    ):
        for name, count in counts.items():
            plan = plan_stage(
                costs,
                name,
                count,
                device,
                teacher_bytes,
                utilisation,
                with_memory,
                lambda: bar.update(next(done)),
            )
            plans.append(plan)
    return plans


@contextmanager
def measured_student(recipe: Recipe) -> Iterator[Encoder]:
    """Give a recipe's last student as an encoder of tensors that have shapes and no data."""
    specs, recipe = teacher_specs(recipe), for_stage(recipe)
    with torch.device("meta"):
        student = build_student(replace(recipe.student, pretrained=""), specs)
    with fake_tensors():
        fake_module(student)
        share_equal_blocks(student)
        encoder = as_encoder(student, recipe.student, specs)
        encoder.takes_normalised = True  # pixels without data have no range
        yield student_encoder(encoder.eval())


def print_suite(
    console: Console,
    recipe: Recipe,
    suite: Suite,
    device: DeviceType,
    kind: str,
    among: Collection[str] = (),
) -> None:
    """Print what each benchmark of a suite takes with the student on one device, and all.

    ``among`` are those of the suite that are asked; empty for every one.
    """
    benchmarks, left_out = counted(recipe.evaluation, suite, among)
    with measured_student(recipe) as encoder:
        prices = priced(benchmarks, encoder, device)
    console.print(
        _table(benchmarks, prices, f"Suite {suite}, the student on one {kind}, estimated")
    )
    text = (
        "Images: where no data is named, those of the published set. Passes: images that the "
        "encoder sees. Reading: without augmentation, of one core; "
    )
    text += "part of the time. " if device.is_host else "beside the device's time. "
    text += (
        "Left out: losses and metrics, text towers, SAM's decoder and the teachers of fidelity. "
        "Each further encoder, such as the teachers of --teachers, and each seed takes it again."
    )
    console.print(text)
    for name, reason in left_out.items():
        console.print(f"- not in it: {name}: {reason}", markup=False, highlight=False)
    console.print()


def _table(benchmarks: Mapping[str, Counted], prices: Mapping[str, Price], title: str) -> Table:
    columns = (
        "benchmark", "images of", "images", "passes", "px", "steps", "encoder TFLOP", "time",
        "reading",
    )  # fmt: skip
    rows = []
    for name, price in prices.items():
        demand = price.demand
        rows.append(
            (
                name,
                "data named" if benchmarks[name].is_named else "published set",
                f"{demand.images:,}",
                f"{demand.num_passes:,}",
                ", ".join(map(format_size, demand.passes)),
                f"{demand.steps:,}" if demand.steps else "-",
                *_amounts([price]),
            )
        )
    demands = [price.demand for price in prices.values()]
    passes, steps = (sum(it.num_passes for it in demands), sum(it.steps for it in demands))
    sums = ("all", "", "", f"{passes:,}", "", f"{steps:,}", *_amounts(list(prices.values())))
    return titled_table(title, columns, rows, sums, left=("images of",))


def _amounts(prices: Sequence[Price]) -> list[str]:
    flops = sum(price.flops for price in prices) / 1e12
    times = (sum(getattr(price, of) for price in prices) for of in ("seconds", "reading"))
    return [f"{flops:,.0f}" if flops >= 100 else f"{flops:.3g}", *map(duration, times)]
