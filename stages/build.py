"""The parts of a stage, built from its recipe; the slow imports of the stages live behind it."""

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from radio_distill.config import Recipe
from radio_distill.data.loader import ShardBatches
from radio_distill.distill.loss_weights import TermWeights
from radio_distill.distill.micro_batches import Work
from radio_distill.distill.randomness import StepRandomness
from radio_distill.distill.statistics import (
    build_normalizers,
    first_partition,
    fit_normalizers,
    refold_heads,
    standard_moments,
)
from radio_distill.distill.targets import TargetMaker, check_partition
from radio_distill.errors import ChangedError, ConfigError, DataError
from radio_distill.models.ema import Ema
from radio_distill.models.heads import build_student
from radio_distill.protocols import Teacher
from radio_distill.stage import images_per_step
from radio_distill.system.distributed import World, all_gather_object, extend_timeouts, run_on_main
from radio_distill.system.files import make_private
from radio_distill.system.memory import explain_oom
from radio_distill.train import checkpoint as checkpoints
from radio_distill.train.checkpoint import Checkpoint, Origin
from radio_distill.train.engine import build_engine
from radio_distill.train.loop import StageRun, stage_seed, zero_hint
from radio_distill.train.restore import (
    check_tensors,
    load_weights,
    normalizers_of,
    restore_normalizers,
)
from radio_distill.types import TeacherSpec
from radio_distill.weights.pretrained import initialise
from teachers import build_teacher, teacher_spec
from upsamplers import build_upsampler

from .common import Asked, changes_that_matter, stage_of, start_checkpoint

logger = logging.getLogger(__name__)


def build_run(
    stage: str,
    recipe: Recipe,
    folder: Path,
    world: World,
    device: torch.device,
    resumed: Checkpoint | None,
    allow_changed: bool = False,
    asked: Asked | None = None,
) -> StageRun:
    """Build everything that this process needs to train a stage.

    What is cheap to check is checked first: the checkpoint to start from, then images, then the
    teachers, then the room for a checkpoint; the statistics of the teachers, which take time, come
    last. Nothing in ``folder`` is touched.
    """
    config = stage_of(recipe, stage)
    start = resumed or start_checkpoint(recipe, stage, asked)
    check_teachers(recipe, stage)
    torch.manual_seed(recipe.seed)
    seed, images = stage_seed(recipe, stage), images_per_step(config)
    draws = StepRandomness(seed, recipe.augmentation, images, recipe.student.patch_size)
    targets = build_targets(recipe, stage, device)
    work = Work(recipe, stage, world, targets, draws)
    source = ShardBatches(recipe.data, seed=seed, images_per_step=images, slices=work.slices)
    check_same_shards(source.fingerprint)
    if resumed is not None:
        check_shards(resumed, source.fingerprint, allow_changed)
    specs = {name: teacher.spec for name, teacher in targets.teachers.items()}
    if resumed is not None:
        check_same_teachers(resumed, specs, allow_changed)
    student = recipe.student if start is None else replace(recipe.student, pretrained="")
    model = build_student(
        student,
        specs,
        learned_weights=recipe.loss.weighting == "uncertainty",
        weight_noise=recipe.augmentation.weight_noise,
        initialise=initialise,
    )
    if start is not None:
        checkpoints.check_teachers(start, specs)
        load_weights(model, start)
    if resumed is not None:
        check_tensors(resumed, model)
    run_on_main(world, lambda: check_room(folder, model, bool(config.ema_decay)))
    dispersions: dict[str, float] = {}
    if resumed is None:
        run_on_main(world, lambda: make_private(recipe.folder))
        cache = Path(recipe.normalizer.cache or recipe.folder / "statistics")
        dispersions = fit_normalizers(targets, recipe, stage, world, device, cache)
        if start is not None:
            logger.info("%s starts from %s", stage, start.folder)
            before = normalizers_of(start)
            for name in unseen_teachers(recipe, stage):
                targets.normalizers[name].load_state(before[name].state())
            refold_heads(model, before, targets.normalizers)
        else:
            for name in unseen_teachers(recipe, stage):
                targets.normalizers[name].fit(standard_moments(specs[name].channels))
    averages = config.ema_decay and (world.is_main or recipe.loss.mesa)
    hint = "set ema_decay to 0, or take a smaller student"
    with explain_oom("the averaged student", "the start", hint):
        ema = Ema(model.to(device)) if averages else None
    with explain_oom("the student and its optimizer", "the start", zero_hint(recipe)):
        engine = build_engine(model, recipe.engine, config, world, device)
    extend_timeouts(recipe.watch.hang_seconds)
    weights = TermWeights(recipe, work.partitions, dispersions, device)
    run = StageRun(
        recipe, stage, folder, world, engine, targets, source, work, draws, weights, ema, resumed
    )
    if resumed is not None:
        _restore(run, resumed)
        run.origin = origin_of(resumed, recipe, specs, source.fingerprint)
    elif start is not None:
        run.origin = Origin(start.weights_sha256)
    return run


def origin_of(
    resumed: Checkpoint, recipe: Recipe, teachers: Mapping[str, TeacherSpec], shards: str
) -> Origin:
    """Return where a resumed student came from: what its checkpoint says, and what is changed now.

    Args:
        resumed: the checkpoint.
        recipe: that the run goes on with, resolved.
        teachers: with their weights.
        shards: their fingerprint.
    """
    changed = [
        *changes_that_matter(resumed.recipe, recipe, resumed.stage)[0],
        *(["data.shards: their contents"] if resumed.shards not in ("", shards) else []),
        *(f"teachers.{name}: its weights" for name in changed_teachers(resumed, teachers)),
    ]
    lines = tuple(f"after step {resumed.step}: {line}" for line in changed)
    return replace(resumed.origin, changed=(*resumed.origin.changed, *lines))


def check_room(folder: Path, model: nn.Module, with_average: bool = False) -> None:
    """Raise ConfigError where the disk of a folder has no room for one checkpoint of a model.

    Weights, two moments and the average are counted, in float32.
    """
    needed = sum(map(torch.Tensor.numel, model.parameters())) * 4 * (3 + with_average)
    places = (folder.absolute(), *folder.absolute().parents)
    free = shutil.disk_usage(next(path for path in places if os.path.exists(path))).free
    if free < needed:
        raise ConfigError(
            f"{folder}: no space left on device for a checkpoint of {needed / 1e9:.3g} GB "
            f"({free / 1e9:.3g} GB are free); make room, or choose another disk with --output"
        )


def check_same_shards(fingerprint: str) -> None:
    """Raise DataError on every process where not all of them found the same shards."""
    found = all_gather_object([fingerprint])
    if len(set(found)) > 1:
        other = next(rank for rank, value in enumerate(found) if value != found[0])
        raise DataError(
            f"data.shards: process {other} found other shards than process 0; let all nodes "
            "see the same files, whole"
        )


def check_shards(resumed: Checkpoint, fingerprint: str, allow_changed: bool) -> None:
    """Raise ChangedError where the shards are not those that the checkpoint was trained on."""
    if resumed.shards in ("", fingerprint):
        return
    if not allow_changed:
        raise ChangedError(
            f"data.shards: contents or order of the shards changed since {resumed.folder}, so the "
            "order of the images would be another; put the shards back"
        )
    logger.warning("the shards changed since the checkpoint: images may be met again, or never")


def changed_teachers(resumed: Checkpoint, teachers: Mapping[str, TeacherSpec]) -> list[str]:
    """List the teachers that have other weights than those that a checkpoint was trained with."""
    return [
        name
        for name, spec in teachers.items()
        if name in resumed.teachers and resumed.teachers[name].weights_hash != spec.weights_hash
    ]


def check_same_teachers(
    resumed: Checkpoint, teachers: Mapping[str, TeacherSpec], allow_changed: bool
) -> None:
    """Raise ChangedError where teachers have other weights than the checkpoint was trained with."""
    for name in changed_teachers(resumed, teachers):
        if not allow_changed:
            raise ChangedError(
                f"teachers.{name}: its weights are not those that {resumed.folder} was trained "
                "with; put them back"
            )
        logger.warning("teacher %r has other weights than when the checkpoint was written", name)


def unseen_teachers(recipe: Recipe, stage: str) -> list[str]:
    """List the teachers that no partition of a stage shows (AM-RADIO's first has no SAM).

    Their heads stay as they were, in the space that they had.
    """
    config = stage_of(recipe, stage)
    return [name for name in recipe.teachers if first_partition(config, name) is None]


def check_teachers(recipe: Recipe, stage: str) -> None:
    """Raise ConfigError where teachers cannot give what a stage's partitions ask of them."""
    specs = {name: teacher_spec(name, config) for name, config in recipe.teachers.items()}
    for partition in stage_of(recipe, stage).partitions:
        check_partition(partition, recipe.teachers, specs, recipe.student.patch_size)


def build_targets(recipe: Recipe, stage: str, device: torch.device) -> TargetMaker:
    """Build the teachers of a stage, its upsampler, and unfitted normalizers."""
    config = stage_of(recipe, stage)
    teachers = build_teachers(recipe, device)
    upsampled = {
        name: teachers[name] for partition in config.partitions for name in partition.upsample
    }
    return TargetMaker(
        teachers,
        recipe.teachers,
        build_upsampler(config.upsampler, upsampled, recipe.engine.precision),
        build_normalizers(recipe),
        recipe.student.patch_size,
    )


def build_teachers(recipe: Recipe, device: torch.device) -> dict[str, Teacher]:
    """Build every teacher of a recipe."""
    return {name: build_teacher(name, config, device) for name, config in recipe.teachers.items()}


def _restore(run: StageRun, resumed: Checkpoint) -> None:
    run.engine.load(resumed.tensors(checkpoints.STUDENT), resumed.tensors(checkpoints.OPTIMIZER))
    restore_normalizers(run.targets.normalizers, resumed)
    if run.ema is not None and resumed.has(checkpoints.EMA):
        run.ema.load_state_dict(resumed.tensors(checkpoints.EMA))
    if resumed.has(checkpoints.LOSS):
        run.weights.load_state(resumed.tensors(checkpoints.LOSS))
    logger.info("resuming %s after step %d", run.stage, resumed.step)
