"""A stage's task without files: random weights for student and teachers, random images."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from radio_distill.config import EngineConfig, Facts, Recipe
from radio_distill.data.loader import Slices
from radio_distill.distill.loss_weights import TermWeights
from radio_distill.distill.micro_batches import MicroBatchSchedule
from radio_distill.distill.randomness import StepRandomness
from radio_distill.distill.targets import TargetMaker
from radio_distill.distill.task import Distillation
from radio_distill.errors import ConfigError
from radio_distill.models.ema import Ema
from radio_distill.models.heads import build_student
from radio_distill.normalize.normalizers import build_normalizers
from radio_distill.normalize.statistics import Moments
from radio_distill.protocols import Upsampler
from radio_distill.registry import nearest
from radio_distill.stage import Stage, check_has_stage, resolve_stage
from radio_distill.system import precision
from radio_distill.system.compiled import compile_blocks
from radio_distill.system.distributed import World, join
from radio_distill.train.deepspeed_engine import build_engine
from radio_distill.train.optim import build_optimizer, parameter_groups
from radio_distill.types import ImageBatch, View
from teachers import build_module, teacher_specs
from teachers.base import FrozenTeacher
from upsamplers import UPSAMPLERS, build_upsampler


@dataclass
class RandomImages:
    """Noise of the sizes that the micro-batches of a step ask for; a ``protocols.BatchSource``."""

    slices: Slices
    fingerprint: str = ""
    bad: dict[str, int] = field(default_factory=dict)

    def batches(self, start_step: int) -> Iterator[list[ImageBatch]]:
        """Yield the micro-batches of each step, without end."""
        while True:
            yield [
                self._batch(item.stop - item.start, item.views or ())
                for item in self.slices(start_step)
            ]
            start_step += 1

    def _batch(self, images: int, views: Iterable[View]) -> ImageBatch:
        generator = torch.Generator().manual_seed(0)
        pixels = {
            view: torch.randint(
                256, (images, 3, *view.size), generator=generator, dtype=torch.uint8
            ).contiguous(memory_format=torch.channels_last)
            for view in views
        }
        return ImageBatch(pixels, ("noise",) * images)


def one_partition(
    recipe: Recipe, stage: str, partition: str, images: int, passes: int, engine: EngineConfig
) -> Recipe:
    """Return a recipe whose stage has one partition, of some passes over ``images`` each.

    The stage is long, and all of the student learns from the first step on.

    Raises:
        ConfigError: the recipe has no such stage, or the stage no such partition.
    """
    check_has_stage(recipe, stage)
    config = recipe.stages[stage]
    chosen = {item.name: item for item in config.partitions}
    name = partition or next(iter(chosen))
    if name not in chosen:
        raise ConfigError(f"{stage} has no partition {name!r} ({nearest(name, list(chosen))})")
    alone = replace(chosen[name], batch_size=images * passes, images_of="")
    changed = replace(config, partitions=(alone,), start_from="", steps=10_000, freeze_body_steps=0)
    stages = {**recipe.stages, stage: changed}
    return replace(recipe, stages=stages, engine=replace(engine, micro_batch=images))


def build_task(recipe: Recipe, stage_name: str, device: torch.device) -> Distillation:
    """Build what one process trains a stage with, as :mod:`stages.build` does out of files."""
    facts = Facts(native_dtype=precision.native_dtype(device), images_in_shards=10**6)
    stage = resolve_stage(recipe, stage_name, teacher_specs(recipe, stage_name), facts)
    world, config = World(), stage.config
    if stage.engine.name == "deepspeed":
        os.environ.update(RANK="0", WORLD_SIZE="1")
        join(world, device, alone=True)
    torch.manual_seed(0)
    teachers = _teachers(stage, device)
    normalizers = build_normalizers(stage.normalizer.name, teachers)
    for name, teacher in teachers.items():
        normalizers[name].fit(Moments.standard(teacher.spec.channels))
    targets = TargetMaker(teachers, normalizers, _upsampler(stage, teachers))
    model = build_student(
        replace(stage.student, pretrained=""),
        stage.specs,
        learned_weights=stage.loss.weighting == "uncertainty",
        weight_noise=stage.augmentation.weight_noise,
    ).to(device)
    ema = Ema(model) if stage.ema_decay else None
    groups = parameter_groups(model, config.weight_decay)
    optimizer = build_optimizer(stage.optimizer, groups, config.betas)
    engine = build_engine(model, optimizer, stage.engine, config.gradient_clip, world, device)
    draws = StepRandomness.of_stage(stage)
    schedule = MicroBatchSchedule(stage, world, draws)
    dispersions = {name: 1.0 for name in teachers if stage.losses[name].summary == "angle"}
    weights = TermWeights(stage, dispersions, device)
    source = RandomImages(schedule.slices)
    return Distillation(stage, world, engine, targets, source, schedule, draws, weights, ema)


def _teachers(stage: Stage, device: torch.device) -> dict[str, FrozenTeacher]:
    """Build the teachers of the stage's partitions; those that nobody shows are left out."""
    shown = {name for item in stage.partitions for name in item.teachers}
    teachers = {}
    for name, config in stage.teachers.items():
        if name in shown:
            dtype = precision.resolved_dtype(config.dtype, device)
            tower = build_module(config, device)
            if stage.engine.compile is True:
                compile_blocks(tower)
            teachers[name] = FrozenTeacher(tower, stage.specs[name], dtype, config.micro_batch).to(
                device
            )
    return teachers


def _upsampler(stage: Stage, teachers: Mapping[str, FrozenTeacher]) -> Upsampler | None:
    """Build the upsampler of a stage, a fitted one with random weights; None where none is used."""
    used = {
        name: teacher
        for name, teacher in teachers.items()
        if any(view.is_upsampled for _, view in stage.views(name))
    }
    if not used:
        return None
    config, kind = stage.upsampler, UPSAMPLERS.get(stage.upsampler.name)
    if hasattr(kind, "untrained"):
        specs = {name: teacher.spec for name, teacher in used.items()}
        untrained: Upsampler = kind.untrained(config.name, config.factor, specs)
        return untrained
    return build_upsampler(config, used, stage.engine.precision)
