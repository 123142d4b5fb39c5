"""Say what a recipe costs, before anything runs. Needs neither weights nor images nor a network.

radio-distill plan phi_s_b --devices 32 64 128 --device a100-80 --price 2.5
"""

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from radio_distill.config import Recipe, StageConfig
from radio_distill.errors import ConfigError, RadioDistillError
from radio_distill.registry import nearest
from stages.common import load_recipe

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import nn

    from radio_distill.models.distilled import DistilledStudent
    from radio_distill.protocols import Upsampler
    from radio_distill.train.plan import DeviceType, StagePlan
    from teachers.base import FrozenTeacher

TAKES_FIELDS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill plan``."""
    parser.add_argument("recipe", nargs="?", default="demo", help="name or file (default: demo)")
    parser.add_argument(
        "--devices",
        type=int,
        nargs="+",
        default=[8],
        metavar="N",
        help="how many devices, for all stages or for each (default: 8)",
    )
    parser.add_argument(
        "--device",
        default="h100",
        metavar="TYPE",
        help="a100-40, a100-80, h100, h200, rtx4090, or cpu: two cores (default: h100)",
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        default=0.35,
        metavar="SHARE",
        help="share of the device's peak that training reaches (default: 0.35, assumed)",
    )
    parser.add_argument("--price", type=float, default=0, help="price of a device for an hour")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    from rich.console import Console

    from stages.missing import find_missing

    recipe = load_recipe(arguments.recipe, arguments.fields)
    device, counts = _check_arguments(arguments, recipe)
    console = Console() if Console().is_terminal else Console(width=150)
    with console.status("measuring the models on tensors without data"):
        models = build_models(recipe)
        plans = plan_stages(models, counts, device, arguments.utilisation)
    console.print(student_table(models))
    console.print(teacher_table(models, plans))
    console.print(partition_table(plans))
    console.print(memory_table(plans, device))
    console.print(time_table(plans, arguments.price))
    console.print(
        f"At an assumed {arguments.utilisation:.0%} of the {device.bfloat16:g} TFLOP/s (bfloat16) "
        f"and {device.float32:g} TFLOP/s (float32) of one {arguments.device}; without decoding, "
        "communication and evaluation.\n"
    )
    _print_missing(console, [*find_missing(recipe), *models.problems])
    return 0


def _check_arguments(
    arguments: argparse.Namespace, recipe: Recipe
) -> "tuple[DeviceType, dict[str, int]]":
    """Return the kind of device, and how many of them each stage has."""
    from radio_distill.train.plan import DEVICES

    if arguments.device not in DEVICES:
        raise ConfigError(
            f"--device: unknown {arguments.device!r} ({nearest(arguments.device, list(DEVICES))})"
        )
    if not 0 < arguments.utilisation <= 1:
        raise ConfigError(f"--utilisation: {arguments.utilisation} is not between 0 and 1")
    stages, counts = list(recipe.stages), list(arguments.devices)
    if len(counts) not in (1, len(stages)) or min(counts) < 1:
        raise ConfigError(
            f"--devices: give one positive number, or {len(stages)}: {', '.join(stages)}"
        )
    counts = counts * len(stages) if len(counts) == 1 else counts
    return DEVICES[arguments.device], dict(zip(stages, counts, strict=True))


@dataclass(frozen=True)
class Models:
    """What a recipe trains with, without data in its tensors."""

    recipe: Recipe
    student: "DistilledStudent"
    teachers: "dict[str, FrozenTeacher]"
    upsamplers: "dict[str, Upsampler]"
    """By stage."""
    problems: list[str]
    """What could not be built, and what stands for it."""

    def teacher_bytes(self, name: str) -> int:
        """Return the bytes of a teacher's weights, in the types they are stored in."""
        return sum(tensor.nbytes for tensor in _tower(self.teachers[name]).state_dict().values())


def build_models(recipe: Recipe) -> Models:
    """Build a recipe's models on the meta device, so without memory and without weights."""
    import torch

    from radio_distill.models.distilled import build_student
    from teachers import build_module, teacher_spec
    from teachers.base import FrozenTeacher

    specs = {name: teacher_spec(name, config) for name, config in recipe.teachers.items()}
    with _quiet(), torch.device("meta"):
        student = build_student(replace(recipe.student, pretrained=""), specs)
        towers = {name: build_module(config) for name, config in recipe.teachers.items()}
    teachers = {
        name: FrozenTeacher(towers[name], specs[name], config.dtype, config.micro_batch)
        for name, config in recipe.teachers.items()
    }
    problems: list[str] = []
    upsamplers = {
        name: _upsampler(name, stage, teachers, problems) for name, stage in recipe.stages.items()
    }
    return Models(recipe, student, teachers, upsamplers, problems)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries from warning that a model has no weights."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _upsampler(
    name: str, stage: StageConfig, teachers: "Mapping[str, FrozenTeacher]", problems: list[str]
) -> "Upsampler":
    """Build a stage's upsampler; one that cannot be built is replaced by ``tile``, and noted."""
    from upsamplers import build_upsampler

    config = stage.upsampler
    used = {teacher: teachers[teacher] for item in stage.partitions for teacher in item.upsample}
    try:
        return build_upsampler(config, used)
    except RadioDistillError as error:
        problems.append(f"stages.{name}.upsampler: {error} (above, `tile` stands for it)")
        return build_upsampler(replace(config, name="tile", weights={}, options={}), used)


def _tower(teacher: "FrozenTeacher") -> "nn.Module":
    from torch import nn

    assert isinstance(teacher.tower, nn.Module), f"{teacher.spec.name} is no module"
    return teacher.tower


def plan_stages(
    models: Models, counts: Mapping[str, int], device: "DeviceType", utilisation: float
) -> "list[StagePlan]":
    """Plan every stage, each on its own number of devices."""
    from radio_distill.train.costs import ModelCosts
    from radio_distill.train.measure import fake_module, fake_tensors
    from radio_distill.train.plan import plan_stage

    teacher_bytes = sum(map(models.teacher_bytes, models.teachers))
    with fake_tensors():
        fake_module(models.student)
        for teacher in models.teachers.values():
            fake_module(_tower(teacher))
        costs = ModelCosts(models.recipe, models.student, models.teachers, models.upsamplers)
        return [
            plan_stage(costs, name, counts[name], device, teacher_bytes, utilisation)
            for name in models.recipe.stages
        ]


def _table(title: str, *columns: str) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def student_table(models: Models) -> "Table":
    """Describe the student."""
    config, student = models.recipe.student, models.student
    table = _table("Student", "architecture", "body", "heads", "patch", "prefix tokens", "start")
    table.add_row(
        config.architecture,
        _count(student.student),
        _count(student.adaptors),
        f"{config.patch_size} px",
        str(student.student.num_prefix_tokens),
        config.pretrained or "random",
    )
    return table


def teacher_table(models: Models, plans: "Sequence[StagePlan]") -> "Table":
    """Describe the teachers: a row for each way in which one is used."""
    table = _table(
        "Teachers", "name", "preset", "parameters", "GiB", "input", "target grid",
        "images / picture", "GFLOP / picture", "licence",
    )  # fmt: skip
    costs = (cost for plan in plans for item in plan.partitions for cost in item.teachers)
    for cost in sorted(
        set(costs), key=lambda cost: (list(models.teachers).index(cost.name), cost.grid)
    ):
        teacher = models.teachers[cost.name]
        table.add_row(
            cost.name,
            models.recipe.teachers[cost.name].preset,
            _count(_tower(teacher)),
            f"{models.teacher_bytes(cost.name) / 2**30:.1f}",
            _size(cost.size),
            _size(cost.grid),
            str(cost.calls),
            f"{(cost.encode_flops + cost.other_flops) / 1e9:,.1f}",
            teacher.spec.licence,
        )
    return table


def partition_table(plans: "Sequence[StagePlan]") -> "Table":
    """Describe the partitions."""
    table = _table(
        "Partitions (shares of the work make good `ranks`)", "stage", "partition", "student",
        "images / step", "tokens / picture", "student GFLOP", "teachers GFLOP", "share of work",
    )  # fmt: skip
    for plan in plans:
        total = plan.student_flops + plan.teacher_flops
        for cost in plan.partitions:
            images = cost.partition.batch_size
            work = images * (cost.student_flops + cost.teacher_flops)
            table.add_row(
                plan.name,
                cost.partition.name,
                _size(cost.partition.size),
                f"{images:,}",
                f"{cost.tokens:,}",
                f"{cost.student_flops / 1e9:,.1f}",
                f"{cost.teacher_flops / 1e9:,.1f}",
                f"{work / total:.1%}",
            )
    return table


def memory_table(plans: "Sequence[StagePlan]", device: "DeviceType") -> "Table":
    """Say what lies on the fullest device."""
    parts = ("weights", "gradients", "optimizer", "teachers", "step")
    table = _table("Memory of a device, GiB", "stage", *parts, "total", "of", "")
    for plan in plans:
        memory = plan.memory
        sizes = [*(getattr(memory, part) for part in parts), memory.total]
        verdict = "fits" if memory.fits(device) else "[bold red]does not fit[/]: lower micro_batch"
        table.add_row(
            plan.name, *(f"{size / 2**30:.2f}" for size in sizes), f"{device.memory:g}", verdict
        )
    return table


def time_table(plans: "Sequence[StagePlan]", price: float) -> "Table":
    """Say how long each stage takes."""
    table = _table(
        "Time", "stage", "devices", "steps", "images / step", "tokens / step", "student FLOP",
        "teachers FLOP", "s / step", "devices busy", "hours", "device hours",
        *(["price"] if price else []),
    )  # fmt: skip
    for plan in plans:
        table.add_row(
            plan.name, str(plan.devices), f"{plan.steps:,}", f"{plan.images:,}", f"{plan.tokens:,}",
            _flops(plan.student_flops), _flops(plan.teacher_flops),
            f"{plan.step_seconds:.3g}", f"{plan.busy:.0%}", *_hours([plan], price),
        )  # fmt: skip
    table.add_row("all", *[""] * 8, *_hours(plans, price), style="bold")
    return table


def _hours(plans: "Sequence[StagePlan]", price: float) -> list[str]:
    device_hours = sum(plan.device_hours for plan in plans)
    cells = [_number(sum(plan.hours for plan in plans)), _number(device_hours)]
    return [*cells, f"{device_hours * price:,.2f}"] if price else cells


def _print_missing(console: "Console", lines: list[str]) -> None:
    console.print("Missing:" if lines else "Nothing is missing.", style="bold")
    for line in lines:
        console.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _flops(value: float) -> str:
    unit, size = next(
        item
        for item in (("P", 1e15), ("T", 1e12), ("G", 1e9))
        if value >= item[1] or item[0] == "G"
    )
    return f"{value / size:,.3g} {unit}"


def _size(size: tuple[int, int]) -> str:
    return "x".join(map(str, size))


def _count(module: "nn.Module") -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:,.1f} M"
