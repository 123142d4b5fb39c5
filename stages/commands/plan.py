"""Say what a recipe costs, before anything runs. Needs neither weights nor images nor a network.

radio-distill plan phi_s_b --devices 32 64 128 --device a100-80 --price 2.5
"""

import argparse
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from radio_distill.config import Facts, Recipe, resolve_dtypes
from radio_distill.errors import ConfigError, RadioDistillError
from radio_distill.hints import hints
from radio_distill.registry import nearest

from ..arguments import add_recipe_argument, add_trust_argument
from ..recipes import Asked, load_recipe

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from radio_distill.models.heads import DistilledStudent
    from radio_distill.plan.cost import ModelCosts
    from radio_distill.plan.time import DeviceType, StagePlan
    from radio_distill.protocols import Upsampler
    from radio_distill.stage import Stage
    from teachers.base import FrozenTeacher

TAKES_FIELDS = True
EMULATION = 5
"""Times that bfloat16 takes longer than float32 on a processor without it; measured, 4 to 11."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill plan``."""
    add_trust_argument(parser)
    add_recipe_argument(parser)
    parser.add_argument(
        "--devices",
        type=int,
        nargs="+",
        metavar="N",
        help="how many devices, for all stages or for each (default: 8)",
    )
    parser.add_argument(
        "--device",
        metavar="TYPE",
        help="a100-40, a100-80, h100, h200, rtx4090, or cpu: two cores, with bfloat16 only where "
        "this processor has it (default: h100)",
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
    if not 0 < arguments.utilisation <= 1:
        raise ConfigError(f"--utilisation: {arguments.utilisation} is not between 0 and 1")
    return _print_plan(arguments)


def _print_plan(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from .missing import find_missing
    from .plan_tables import all_tables

    asked = Asked(arguments.recipe, tuple(arguments.fields))
    recipe = load_recipe(asked.recipe, asked.fields)
    kind = arguments.device or "h100"
    device, counts = _device(kind), _counts(arguments.devices or [8], recipe)
    console = Console() if Console().is_terminal else Console(width=150)
    models = build_models(recipe, device.native_dtype)
    if not (arguments.devices and arguments.device):
        console.print(_assumed(arguments, counts, kind), soft_wrap=True)
    plans = plan_stages(models, counts, device, arguments.utilisation)
    for table in all_tables(models, plans, device, arguments.price):
        console.print(table)
    console.print(
        f"At an assumed {arguments.utilisation:.0%} of the {device.bfloat16:g} TFLOP/s (bfloat16) "
        f"and {device.float32:g} TFLOP/s (float32) of one {kind}; without "
        "communication and evaluation. Times hold the statistics of the teachers, which each stage "
        "begins with.\n"
    )
    for name in recipe.stages:
        for line in hints(models.stage(name)):
            console.print(f"Note: {line}", markup=False, highlight=False, soft_wrap=True)
    found = find_missing(recipe, asked)
    built = [problem.partition(" (above, ")[0] for problem in models.problems]
    lacking = [line for line in found.missing if line not in built]
    missing = [*lacking, *found.unfitted, *models.problems]
    console.print("Missing:" if missing else "Nothing is missing.", style="bold")
    _print_lines(console, missing)
    if found.notes:
        console.print("Not here yet:", style="bold")
        _print_lines(console, found.notes)
    return 0


def _print_lines(console: "Console", lines: Sequence[str]) -> None:
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
        raise ConfigError(
            f"--devices: give one positive number, or {len(stages)}: {', '.join(stages)}"
        )
    counts = counts * len(stages) if len(counts) == 1 else counts
    return dict(zip(stages, counts, strict=True))


@dataclass(frozen=True)
class Models:
    """What a recipe trains with, without data in its tensors."""

    recipe: Recipe
    student: "DistilledStudent"
    teachers: "dict[str, FrozenTeacher]"
    problems: list[str]
    """What could not be built, and what stands for it."""

    def stage(self, name: str) -> "Stage":
        """Resolve a stage, but for what the shards and the machine decide."""
        from radio_distill.stage import resolve_stage

        specs = {teacher: item.spec for teacher, item in self.teachers.items()}
        return resolve_stage(self.recipe, name, specs, Facts())

    def tower(self, teacher: str) -> "nn.Module":
        """Return a teacher's encoder."""
        from torch import nn

        tower = self.teachers[teacher].tower
        assert isinstance(tower, nn.Module), f"{teacher} is no module"
        return tower

    def teacher_bytes(self, teacher: str) -> int:
        """Return the bytes of a teacher's weights, in the types they are stored in."""
        return sum(tensor.nbytes for tensor in self.tower(teacher).state_dict().values())

    @property
    def all_teacher_bytes(self) -> int:
        """Bytes of all teachers, which every device holds."""
        return sum(map(self.teacher_bytes, self.teachers))


def build_models(recipe: Recipe, native: Literal["float32", "bfloat16"] = "bfloat16") -> Models:
    """Build a recipe's models on the meta device, so without memory and without weights.

    ``native`` is what ``auto`` means for number types, on the devices that are planned for.
    """
    import torch

    from radio_distill.models.heads import build_student
    from teachers import build_module, teacher_spec
    from teachers.base import FrozenTeacher

    recipe = resolve_dtypes(recipe, native)
    specs = {name: teacher_spec(name, config) for name, config in recipe.teachers.items()}
    with _quiet(), torch.device("meta"):
        student = build_student(replace(recipe.student, pretrained=""), specs)
        towers = {name: build_module(config) for name, config in recipe.teachers.items()}
    teachers = {
        name: FrozenTeacher(towers[name], specs[name], config.dtype, config.micro_batch)
        for name, config in recipe.teachers.items()
    }
    return Models(recipe, student, teachers, [])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries from warning that a model has no weights."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _upsampler(models: Models, name: str) -> "Upsampler":
    """Build a stage's upsampler, a fitted one without its weights, under fake tensors.

    One that cannot be built is replaced by ``tile``, and noted.
    """
    from upsamplers import UPSAMPLERS, build_upsampler

    stage = models.recipe.stages[name]
    config, teachers = stage.upsampler, models.teachers
    used = {teacher: teachers[teacher] for item in stage.partitions for teacher in item.upsample}
    try:
        kind = UPSAMPLERS.get(config.name)
        if hasattr(kind, "untrained"):
            return kind.untrained(config.factor, {key: item.spec for key, item in used.items()})
        return build_upsampler(config, used)
    except RadioDistillError as error:
        models.problems.append(f"stages.{name}.upsampler: {error} (above, `tile` stands for it)")
        plain = replace(config, name="tile", weights={}, sha256={}, sizes={}, options={})
        return build_upsampler(plain, used)


@contextmanager
def measured(models: Models) -> "Iterator[ModelCosts]":
    """Give a recipe's models tensors of shapes without data, and what measures them."""
    from radio_distill.plan.cost import ModelCosts
    from radio_distill.plan.measure import fake_module, fake_tensors

    with fake_tensors():
        fake_module(models.student)
        for teacher in models.teachers:
            fake_module(models.tower(teacher))
        upsamplers = {name: _upsampler(models, name) for name in models.recipe.stages}
        yield ModelCosts(models.recipe, models.student, models.teachers, upsamplers)


def plan_stages(
    models: Models,
    counts: Mapping[str, int],
    device: "DeviceType",
    utilisation: float = 0.35,
    with_memory: bool = True,
) -> "list[StagePlan]":
    """Plan every stage, each on its own number of devices.

    Args:
        models: of the recipe.
        counts: devices of each stage.
        device: their kind.
        utilisation: share of the peak that is reached.
        with_memory: measure memory too, which is most of the work.
    """
    from radio_distill.plan.time import measurements, plan_stage
    from radio_distill.system.progress import Progress

    stages = [models.recipe.stages[name] for name in counts]
    total, done = sum(measurements(stage, with_memory) for stage in stages), itertools.count(1)
    plans = []
    with (
        Progress("measuring models without data", total, "passes") as bar,
        measured(models) as costs,
    ):
        for name, count in counts.items():
            plan = plan_stage(
                costs,
                name,
                count,
                device,
                models.all_teacher_bytes,
                utilisation,
                with_memory,
                lambda: bar.update(next(done)),
            )
            plans.append(plan)
    return plans
