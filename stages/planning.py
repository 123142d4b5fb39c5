"""A recipe's models without data in their tensors, and what their stages cost.

Needs neither weights nor images nor a network.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import nn

from radio_distill.config import Facts, Recipe, for_stage, resolve_dtypes
from radio_distill.errors import RadioDistillError
from radio_distill.models.heads import DistilledStudent, build_student
from radio_distill.plan.cost import ModelCosts
from radio_distill.plan.memory import resident_memory, with_micro_batches
from radio_distill.plan.meter import fake_module, fake_tensors
from radio_distill.plan.time import dealing_speed
from radio_distill.plan.work import with_work
from radio_distill.protocols import Upsampler
from radio_distill.stage import Stage, resolve_stage
from teachers import build_module, teacher_specs
from teachers.base import FrozenTeacher
from upsamplers import UPSAMPLERS, build_upsampler

from .fits import fit_of


@dataclass(frozen=True)
class Models:
    """The models of a recipe of one student, without data in their tensors."""

    recipe: Recipe
    student: DistilledStudent
    teachers: dict[str, FrozenTeacher]
    problems: list[str]
    """What could not be built, and what stands for it."""

    def stages(self, can_compile: bool = False) -> dict[str, Stage]:
        """Resolve the stages, but for what the shards and the machine decide."""
        specs = {name: teacher.spec for name, teacher in self.teachers.items()}
        facts = Facts(can_compile=can_compile)
        return {name: resolve_stage(self.recipe, name, specs, facts) for name in self.recipe.stages}

    def tower(self, teacher: str) -> nn.Module:
        """Return a teacher's encoder."""
        tower = self.teachers[teacher].tower
        assert isinstance(tower, nn.Module), f"{teacher} is no module"
        return tower

    def teacher_bytes(self, teacher: str) -> int:
        """Return the bytes of a teacher's weights, in the types they are stored in."""
        return self._bytes[teacher]

    @property
    def all_teacher_bytes(self) -> int:
        """Bytes of all teachers, which every device holds."""
        return sum(self._bytes.values())

    @cached_property
    def _bytes(self) -> dict[str, int]:
        states = {name: self.tower(name).state_dict() for name in self.teachers}
        return {name: sum(part.nbytes for part in state.values()) for name, state in states.items()}


def build_models(
    recipe: Recipe, native: Literal["float32", "bfloat16"] = "bfloat16", of_stage: str = ""
) -> Models:
    """Build the models of a stage on the meta device, so without memory and without weights.

    They are those of all stages that train its student; without a stage, of the last one's.
    ``native`` is what ``auto`` means for number types, on the devices that are planned for.
    """
    part = resolve_dtypes(for_stage(recipe, of_stage), native)
    specs = teacher_specs(recipe, of_stage)
    logging.disable(logging.WARNING)  # libraries warn that a model has no weights
    try:
        with torch.device("meta"):
            student = build_student(replace(part.student, pretrained=""), specs)
            towers = {
                name: build_module(recipe.teachers[name], recipe=recipe) for name in part.teachers
            }
    finally:
        logging.disable(logging.NOTSET)
    teachers = {
        name: FrozenTeacher(towers[name], specs[name], config.dtype, config.micro_batch)
        for name, config in part.teachers.items()
    }
    return Models(part, student, teachers, [])


def _upsampler(models: Models, name: str) -> Upsampler:
    """Build a stage's upsampler, a fitted one without its weights, under fake tensors.

    One that cannot be built is replaced by ``tile``, and noted.
    """
    stage = models.recipe.stages[name]
    config, teachers = stage.upsampler, models.teachers
    used = {teacher: teachers[teacher] for item in stage.partitions for teacher in item.upsample}
    try:
        kind = UPSAMPLERS.get(config.name)
        if hasattr(kind, "untrained"):
            specs = {key: item.spec for key, item in used.items()}
            options = fit_of(models.recipe, "", config.name, config.factor).options
            return kind.untrained(config.name, config.factor, specs, options)
        return build_upsampler(config, used)
    except RadioDistillError as error:
        models.problems.append(f"stages.{name}.upsampler: {error} (above, `tile` stands for it)")
        plain = replace(config, name="tile", weights={}, sha256={}, sizes={}, options={})
        return build_upsampler(plain, used)


@contextmanager
def measured(models: Models, can_compile: bool = False) -> Iterator[ModelCosts]:
    """Give a recipe's models tensors of shapes without data, and what measures them.

    ``can_compile`` says that they are to run where ``engine.compile: auto`` compiles.
    """
    with fake_tensors():
        fake_module(models.student)
        for teacher in models.teachers:
            fake_module(models.tower(teacher))
        upsamplers = {name: _upsampler(models, name) for name in models.recipe.stages}
        stages = models.stages(can_compile)
        yield ModelCosts(stages, models.student, models.teachers, upsamplers)


def measure_stage(stage: Stage, devices: int, is_gpu: bool, gib: float) -> Stage:
    """Return a resolved stage with what its images cost, and the micro-batches that `auto` means.

    ``gib`` is the memory of a device; 0 where none is to be filled.
    """
    models = build_models(stage.recipe)
    with measured(models) as costs:
        stage = with_work(stage, costs, dealing_speed(is_gpu))
        if not gib:
            return stage
        resident = resident_memory(costs, stage, devices, models.all_teacher_bytes)
        return with_micro_batches(stage, costs, resident, gib)
