"""Say what a recipe costs, before anything runs. Needs neither weights nor images nor a network.

radio-distill plan phi_s_b --devices 32 64 128 --device a100-80 --price 2.5
"""

import argparse
import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from radio_distill.config import Recipe, by_student, share_of
from radio_distill.errors import ConfigError
from radio_distill.hints import hints
from radio_distill.registry import nearest
from radio_distill.system.progress import duration, titled_table

from ..arguments import add_recipe_argument, add_trust_argument
from ..recipes import Asked, load_recipe
from .evaluate import add_suite_argument, chosen_benchmarks

if TYPE_CHECKING:
    from torch import nn

    from radio_distill.plan.time import DeviceType, StagePlan
    from radio_distill.stage import Partition, Stage

    from ..planning import Models

TAKES_FIELDS = True
EMULATION = 5
"""Times that bfloat16 takes longer than float32 on a processor without it; measured, 4 to 11."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill plan``."""
    add = parser.add_argument
    add_trust_argument(parser)
    add_recipe_argument(parser)
    add(
        "--devices",
        type=int,
        nargs="+",
        metavar="N",
        help="how many devices, for all stages or for each (default: 8)",
    )
    add(
        "--device",
        metavar="TYPE",
        help="a100-40, a100-80, h100, h200, rtx4090, or cpu: two cores, with bfloat16 only where "
        "this processor has it (default: h100)",
    )
    add(
        "--utilisation",
        type=float,
        default=0.35,
        metavar="SHARE",
        help="share of the device's peak that training reaches (default: 0.35, assumed)",
    )
    add("--price", type=float, default=0, help="price of a device for an hour")
    add_suite_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    if not 0 < arguments.utilisation <= 1:
        raise ConfigError(f"--utilisation: {arguments.utilisation} is not between 0 and 1")
    if not 0 <= arguments.price < math.inf:
        raise ConfigError(f"--price: {arguments.price} is no price")
    from radio_distill.plan.step_time import LAUNCH

    from ..planning import build_models
    from ..plans import plan_stages
    from .missing import find_missing

    asked = Asked(arguments.recipe, tuple(arguments.fields))
    recipe = load_recipe(asked.recipe, asked.fields)
    kind = arguments.device or "h100"
    device, counts = _device(kind), _counts(arguments.devices or [8], recipe)
    console = Console() if Console().is_terminal else Console(width=150)
    with _without_collector():
        models = [build_models(recipe, device.native_dtype, of[0]) for of in by_student(recipe)]
        if not (arguments.devices and arguments.device):
            console.print(_assumed(arguments, counts, kind), soft_wrap=True)
        plans = [
            plan
            for one in models
            for plan in plan_stages(one, counts, device, arguments.utilisation)
        ]
    for table in _tables(models, plans, device, arguments.price):
        console.print(table)
    console.print(
        f"At an assumed {arguments.utilisation:.0%} of the {device.bfloat16:g} TFLOP/s (bfloat16) "
        f"and {device.float32:g} TFLOP/s (float32) of one {kind}; without "
        "communication and evaluation; no step is shorter than its launches and copies. Times "
        "hold the statistics of the teachers, which each stage begins with."
    )
    speed = device.speed
    console.print(
        f"A step's parts at rates of their own, assumed too: {speed.bfloat16 / 1e12:.3g} TFLOP/s "
        f"(bfloat16) and {speed.float32 / 1e12:.3g} (float32) of products, "
        f"{speed.streaming / 1e12:.3g} TB/s of elementwise operators (part of teachers' and "
        f"student's time), {1e6 * LAUNCH:g} µs of the host for each, {speed.link / 1e9:.3g} GB/s "
        "of gradients within a node. Useful: teachers and student.\n"
    )
    if arguments.suite:
        from ..plans import print_suite

        with _without_collector():
            among = chosen_benchmarks(recipe.evaluation, asked.fields)
            print_suite(console, recipe, arguments.suite, device, kind, among)
    for plan in plans:
        for line in hints(plan.stage):
            console.print(f"Note: {line}", markup=False, highlight=False, soft_wrap=True)
    found = find_missing(recipe, asked)
    problems = [problem for one in models for problem in one.problems]
    built = [problem.partition(" (above, ")[0] for problem in problems]
    lacking = [line for line in found.missing if line not in built]
    missing = [*lacking, *found.unfitted, *problems]
    console.print("Missing:" if missing else "Nothing is missing.", style="bold")
    _print_lines(console, missing)
    if found.notes:
        console.print("Not here yet:", style="bold")
        _print_lines(console, found.notes)
    return 0


@contextmanager
def _without_collector() -> Iterator[None]:
    """Look for no cycles in the block: among millions of small fake tensors that is slow."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _print_lines(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)


def _assumed(arguments: argparse.Namespace, counts: Mapping[str, int], kind: str) -> str:
    """Say what stands for the devices that nobody named, and what this machine has."""
    import torch

    parts = []
    if not arguments.devices:
        parts.append(f"{next(iter(counts.values()))} devices (--devices N)")
    if not arguments.device:
        parts.append(f"their kind, {kind} (--device TYPE)")
    here = "no GPU (--devices 1 --device cpu)"
    if torch.cuda.is_available():
        here = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"Assumed, since not named: {' and '.join(parts)}; this machine has {here}.\n"


def _device(kind: str) -> "DeviceType":
    from radio_distill.plan.time import DEVICES

    if kind not in DEVICES:
        raise ConfigError(f"--device: unknown {kind!r} ({nearest(kind, list(DEVICES))})")
    device = DEVICES[kind]
    if kind == "cpu":
        from radio_distill.system.precision import is_native

        if not is_native("bfloat16", "cpu"):
            return replace(device, bfloat16=device.float32 / EMULATION)
    return device


def _counts(counts: list[int], recipe: Recipe) -> dict[str, int]:
    """Return how many devices each stage has."""
    stages = list(recipe.stages)
    if len(counts) not in (1, len(stages)) or min(counts) < 1:
        each = f", or {len(stages)}: {', '.join(stages)}" if len(stages) > 1 else ""
        raise ConfigError(f"--devices: give one positive number{each}")
    counts = counts * len(stages) if len(counts) == 1 else counts
    return dict(zip(stages, counts, strict=True))


def _tables(
    models: "Sequence[Models]", plans: "Sequence[StagePlan]", device: "DeviceType", price: float
) -> list[Table]:
    """Make every table, in the order they are read.

    Args:
        models: of each student of the recipe.
        plans: of its stages.
        device: kind of device.
        price: of one device for an hour; 0 leaves the column out.
    """
    return [
        _student_table(models),
        _teacher_table(models, plans),
        _partition_table(plans),
        _memory_table(plans, device),
        _time_table(plans, price),
        _step_table(plans),
        _resolved_table(plans),
    ]


def _student_table(models: "Sequence[Models]") -> Table:
    """Describe the students."""
    columns = ("architecture", "stages", "body", "heads", "patch", "prefix tokens", "start")
    rows = []
    for one in models:
        config, student = one.recipe.student, one.student
        rows.append(
            (
                config.architecture,
                ", ".join(one.recipe.stages),
                _count(student.student),
                _count(student.adaptors),
                f"{config.patch_size} px",
                str(student.student.num_prefix_tokens),
                config.pretrained or "random",
            )
        )
    return titled_table("Student", columns, rows)


def _teacher_table(models: "Sequence[Models]", plans: "Sequence[StagePlan]") -> Table:
    """Describe the teachers: a row for each way in which one is used."""
    columns = (
        "name", "preset", "parameters", "GiB", "input", "target grid", "images / image",
        "GFLOP / image", "licence",
    )  # fmt: skip
    costs = dict.fromkeys(
        cost for plan in plans for item in plan.partitions for cost in item.teachers
    )
    rows, of_teacher = [], {name: one for one in models for name in one.teachers}
    for name, one in of_teacher.items():
        for cost in (cost for cost in costs if cost.view.teacher == name):
            images = cost.view.images_per_input
            rows.append(
                (
                    name,
                    one.recipe.teachers[name].preset,
                    _count(one.tower(name)),
                    f"{one.teacher_bytes(name) / 2**30:.1f}",
                    _size(cost.view.encoded),
                    _size(cost.view.grid),
                    str(cost.calls) if images == 1 else f"1/{images}",
                    f"{cost.flops / 1e9:,.1f}",
                    one.teachers[name].spec.licence,
                )
            )
    return titled_table("Teachers", columns, rows)


def _partition_table(plans: "Sequence[StagePlan]") -> Table:
    """Describe the partitions; where a size is drawn, by their means."""
    columns = (
        "stage", "partition", "student", "rendered at", "images / step", "micro-batch",
        "tokens / image", "student GFLOP", "teachers GFLOP", "share of work",
    )  # fmt: skip
    rows = []
    for plan in plans:
        total = plan.student_flops + plan.teacher_flops
        for cost in plan.partitions:
            images = cost.partition.batch_size
            work = images * (cost.student_flops + cost.teacher_flops)
            rows.append(
                (
                    plan.stage.name,
                    cost.partition.name,
                    ", ".join(map(_size, cost.partition.sizes)),
                    ", ".join(map(_size, cost.rendered)),
                    f"{images:,}",
                    _micro_batches(plan.stage, cost.partition),
                    f"{cost.tokens:,.0f}",
                    f"{cost.student_flops / 1e9:,.1f}",
                    f"{cost.teacher_flops / 1e9:,.1f}",
                    f"{work / total:.1%}",
                )
            )
    return titled_table("Partitions", columns, rows)


def _micro_batches(stage: "Stage", partition: "Partition") -> str:
    """Return the most images of a pass, in the order of the sizes where they differ."""
    limits = [stage.micro_batch(partition.name, size) for size in partition.sizes]
    return ", ".join(
        str(limit or "all") for limit in (limits if len({*limits}) > 1 else limits[:1])
    )


_HINT = "lower engine.micro_batch or raise engine.zero_stage"


def _memory_table(plans: "Sequence[StagePlan]", device: "DeviceType") -> Table:
    """Say what lies on the fullest device."""
    parts = ("weights", "gradients", "optimizer", "average", "teachers", "step")
    rows = []
    for plan in plans:
        memory = plan.memory
        sizes = [*(getattr(memory, part) for part in parts), memory.total]
        verdict = "fits" if memory.fits(device.memory) else f"[bold red]does not fit[/]: {_HINT}"
        amounts = (f"{size / 2**30:.2f}" for size in sizes)
        rows.append((plan.stage.name, *amounts, f"{device.memory:g}", verdict))
    columns = ("stage", *parts, "total", "of", "")
    return titled_table("Memory of a device, GiB", columns, rows)


def _time_table(plans: "Sequence[StagePlan]", price: float) -> Table:
    """Say how long each stage takes."""
    columns = (
        "stage", "devices", "steps", "images / step", "tokens / step", "student FLOP",
        "teachers FLOP", "a step", "devices busy", "decoding cores", "time", "device time",
        *(["price"] if price else []),
    )  # fmt: skip
    rows = [
        (
            plan.stage.name, str(plan.devices), f"{plan.stage.steps:,}",
            f"{plan.stage.images_per_step:,}", f"{plan.tokens:,.0f}",
            _flops(plan.student_flops), _flops(plan.teacher_flops),
            duration(plan.step_seconds), f"{plan.busy:.0%}",
            f"{plan.decoding_cores:.1f}", *_times([plan], price),
        )
        for plan in plans
    ]  # fmt: skip
    return titled_table("Time", columns, rows, ("all", *[""] * 9, *_times(plans, price)))


def _step_table(plans: "Sequence[StagePlan]") -> Table:
    """Say where a step's time is expected to go, and what bounds it."""
    parts = {
        "encode": "teachers", "learn": "student", "other": "other", "waiting": "unequal work",
        "elementwise": "elementwise", "launches": "launches", "copies": "copies",
        "exchange": "exchange", "optimizer": "optimizer", "waits": "waits",
    }  # fmt: skip
    rows = []
    for plan in plans:
        step = plan.parts
        times = (_milliseconds(getattr(step, part)) for part in parts)
        first = (plan.stage.name, _milliseconds(step.total), f"{step.useful:.0%}", step.bound)
        rows.append((*first, *times))
    title = "A step's parts, estimated, ms (launches and copies go beside the devices' work)"
    return titled_table(title, ("stage", "all", "useful", "bound by", *parts.values()), rows)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.{0 if seconds > 0.1 else 1}f}"


def _resolved_table(plans: "Sequence[StagePlan]") -> Table:
    """Say what each stage makes of fields that are `auto`, and of shares."""
    columns = (
        "stage", "body frozen for", "images of statistics", "precision", "ZeRO stage", "log every",
        "save every",
    )  # fmt: skip
    rows = []
    for plan in plans:
        stage = plan.stage
        images = share_of(stage.normalizer.images, stage.steps * stage.images_per_step)
        rows.append(
            (
                stage.name,
                f"{stage.frozen_steps:,} of {stage.steps:,} steps",
                f"{images:,}",
                stage.engine.precision,
                str(stage.engine.zero_stage) if plan.devices > 1 else "-",
                f"{stage.log.every} steps",
                f"{stage.log.save_every} steps",
            )
        )
    return titled_table("Resolved; the shards may hold fewer images", columns, rows)


def _times(plans: "Sequence[StagePlan]", price: float) -> list[str]:
    device_hours = sum(plan.device_hours for plan in plans)
    cells = [duration(3600 * sum(plan.hours for plan in plans)), duration(3600 * device_hours)]
    return [*cells, f"{device_hours * price:,.2f}"] if price else cells


def _flops(value: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12)):
        if value >= size:
            return f"{value / size:,.3g} {unit}"
    return f"{value / 1e9:.3g} G"


def _size(size: tuple[int, int]) -> str:
    return "x".join(map(str, size))


def _count(module: "nn.Module") -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:,.1f} M"
