"""The parts of a stage, built from its recipe; the slow imports of the stages live behind it."""

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from radio_distill.config import EvaluationConfig, Recipe, of_summary, plain_teacher
from radio_distill.data.loader import ShardBatches
from radio_distill.distill.loss_weights import TermWeights
from radio_distill.distill.micro_batches import MicroBatchSchedule, teachers_of
from radio_distill.distill.randomness import StepRandomness
from radio_distill.distill.targets import TargetMaker
from radio_distill.distill.task import Distillation
from radio_distill.errors import ChangedError, ConfigError, DataError
from radio_distill.evals.encoder import student_encoder, targets_of
from radio_distill.evals.run import check_data, evaluate
from radio_distill.models.backbone import as_encoder
from radio_distill.models.body import Body
from radio_distill.models.ema import Ema
from radio_distill.models.heads import DistilledStudent, build_student
from radio_distill.normalize.fit import fit_normalizers, is_fitted
from radio_distill.normalize.normalizers import (
    Identity,
    LayerNorm,
    normalizers_of,
    recipe_normalizers,
    restore_normalizers,
)
from radio_distill.normalize.statistics import Moments
from radio_distill.protocols import LayeredTeacher, MovingNormalizer, Normalizer, Teacher
from radio_distill.stage import Stage
from radio_distill.system.compiled import compile_blocks
from radio_distill.system.distributed import World, all_gather_object, extend_timeouts, run_on_main
from radio_distill.system.files import make_private, reason_of
from radio_distill.system.memory import explain_oom
from radio_distill.train import checkpoint as checkpoints
from radio_distill.train.checkpoint import Checkpoint, Origin
from radio_distill.train.deepspeed_engine import build_engine, zero_hint
from radio_distill.train.optim import build_optimizer, parameter_groups
from radio_distill.train.restore import check_tensors, load_weights
from radio_distill.train.run_dir import RunLock
from radio_distill.train.trainer import Trainer
from radio_distill.types import Score, TeacherSpec
from radio_distill.weights.pretrained import initialise
from teachers import build_teacher
from teachers.base import LateTeacher
from upsamplers import build_upsampler

from .launch import Options, Train, launch
from .recipes import Asked, describe_stage
from .resume import (
    check_same_teachers,
    check_shards,
    check_stage_teachers,
    origin_of,
    start_checkpoint,
)

logger = logging.getLogger(__name__)


def train_stage(
    name: str,
    recipe: Recipe,
    options: Options | None = None,
    retrain: bool = False,
    way_out: str = "",
) -> Path:
    """Build the parts of a stage and train it; returns the last checkpoint's folder.

    Args:
        name: of a stage of the recipe.
        recipe: as a person wrote it; its run folder is used.
        options: how it is started.
        retrain: begin anew where there is nothing to go on with as asked; the earlier run is moved
            aside.
        way_out: what the caller's command offers in that case, where that is something of its own.

    Raises:
        ChangedError: in that case, without ``retrain``.
        ConfigError: an earlier stage, whose student is a teacher, has to be trained first.
    """
    stage, options = describe_stage(recipe, name), options or Options()
    check_stage_teachers(recipe, name, options.asked)
    try:
        return launch(stage, build_stage, options)
    except ChangedError as error:
        if not retrain:
            raise ChangedError(error.problem, way_out or error.way_out) from error
        logger.warning("%s is trained anew: %s", stage.folder, error.problem)
    return launch(stage, build_stage, replace(options, resume=False, allow_changed=False))


def build_stage(
    stage: Stage, world: World, device: torch.device, resumed: Checkpoint | None, options: Options
) -> Train:
    """Build the parts of a stage; returns what trains it."""
    task, origin = build_distillation(
        stage, world, device, resumed, options.allow_changed, options.asked
    )

    def train_with(lock: RunLock | None) -> Path:
        return Trainer(task.stage, task, world, lock, resumed, origin).run()

    return train_with


def build_distillation(
    stage: Stage,
    world: World,
    device: torch.device,
    resumed: Checkpoint | None,
    allow_changed: bool = False,
    asked: Asked | None = None,
) -> tuple[Distillation, Origin]:
    """Build everything that this process needs to train a stage; says where its student comes from.

    What is cheap to check is checked first: the checkpoint to start from, then images, then the
    teachers, then the room for a checkpoint; the statistics of the teachers, which take time, come
    last. Nothing in the stage's folder is touched.
    """
    start = resumed or start_checkpoint(stage, asked)
    torch.manual_seed(stage.base_seed)
    draws = StepRandomness.of_stage(stage)
    targets = build_targets(stage, world, device)
    schedule = MicroBatchSchedule(stage, world, draws)
    source = ShardBatches(
        stage.data,
        seed=stage.seed,
        images_per_step=stage.images_per_step,
        own=stage.own_sources,
        slices=schedule.slices,
    )
    check_same_shards(source.fingerprint)
    run_on_main(world, lambda: check_evaluation(stage.evaluation))
    specs = {name: teacher.spec for name, teacher in targets.teachers.items()}
    stage = replace(stage, specs=specs)  # with the fingerprints of weights, for checkpoints
    if resumed is not None:
        check_shards(resumed, source.fingerprint, allow_changed)
        check_same_teachers(resumed, specs, allow_changed)
    keeps_heads = resumed is not None or not stage.config.reset_heads
    model = _student_from(stage, specs, start, keeps_heads)
    if resumed is not None:
        check_tensors(resumed, model)
    config = stage.config
    run_on_main(world, lambda: check_room(stage.folder, model, bool(stage.ema_decay)))
    dispersions: dict[str, float] = {}
    if resumed is None:
        run_on_main(world, lambda: make_private(stage.run_folder))
        dispersions = _fit_scales(stage, targets, model, start, world, device)
        for teacher in targets.teachers.values():
            if isinstance(teacher, LateTeacher):
                teacher.release()
    keeps_ema = stage.ema_decay and (world.is_main or stage.loss.mesa)
    hint = "set ema_decay to 0, or take a smaller student"
    with explain_oom("the EMA of the student", "the start", hint):
        ema = Ema(model.to(device)) if keeps_ema else None
    with explain_oom("the start of the student", "the start", "set the stage's anchor to 0"):
        anchor = Ema(model.to(device)) if stage.anchor else None
    with explain_oom("the student and its optimizer", "the start", zero_hint(stage.engine)):
        groups = parameter_groups(model.to(device), config.weight_decay)
        optimizer = build_optimizer(stage.optimizer, groups, config.betas)
        clip = config.gradient_clip
        engine = build_engine(model, optimizer, stage.engine, clip, world, device)
    if ema is not None and stage.loss.mesa and stage.engine.compile is True:
        compile_blocks(ema.model)
    extend_timeouts(stage.watch.hang_seconds)
    weights = TermWeights(stage, dispersions, device)
    task = Distillation(
        stage, world, engine, targets, source, schedule, draws, weights, ema, anchor
    )
    if stage.evaluation.every:
        task.scores = partial(score_student, task)
    origin = Origin() if start is None else Origin(start.weights_sha256)
    if resumed is not None:
        _restore(task, resumed)
        origin = origin_of(resumed, stage, specs, source.fingerprint)
    return task, origin


def _student_from(
    stage: Stage, specs: Mapping[str, TeacherSpec], start: Checkpoint | None, with_heads: bool
) -> DistilledStudent:
    """Build the student of a stage: with a checkpoint's weights, else as its recipe begins.

    Without its heads, they are new.

    Raises:
        ConfigError: a partition has images of a size that the student does not take.
    """
    model = build_student(
        stage.student if start is None else replace(stage.student, pretrained=""),
        specs,
        learned_weights=stage.loss.weighting == "uncertainty",
        weight_noise=stage.augmentation.weight_noise,
        initialise=initialise,
    )
    _check_sizes(stage, model.student)
    if start is None:
        model.student.check_start(stage.student.pretrained)
    else:
        checkpoints.check_teachers(start, specs, with_heads)
        load_weights(model, start, with_heads)
    return model


def _check_sizes(stage: Stage, body: Body) -> None:
    for partition in stage.partitions:
        for size in partition.sizes:
            try:
                body.grid(size)
            except ConfigError as error:
                path = f"stages.{stage.name}.partitions.{partition.name}"
                raise ConfigError(f"{path}: {error}") from error


def _fit_scales(
    stage: Stage,
    targets: TargetMaker,
    model: DistilledStudent,
    start: Checkpoint | None,
    world: World,
    device: torch.device,
) -> dict[str, float]:
    """Fit the normalizers of a stage that begins, and fold heads that it keeps into the new scales.

    Returns the dispersions of the teachers' summaries, where the loss asks for them.
    """
    teachers, normalizers = targets.teachers, targets.normalizers
    dispersions = fit_normalizers(stage, teachers, normalizers, world, device)
    unseen = [name for name in normalizers if not is_fitted(stage, name)]
    if start is not None:
        logger.info("%s starts from %s", stage.name, start.folder)
    if start is None or stage.config.reset_heads:
        for name in unseen:
            _fit_standard(normalizers[name], name, teachers)
        return dispersions
    before = normalizers_of(start)
    for name in unseen:  # their heads stay as they were, in the space that they had
        if name in before:
            normalizers[name].load_state(before[name].state())
        else:
            _fit_standard(normalizers[name], name, teachers)
    refold_heads(model, before, normalizers)
    return dispersions


def _fit_standard(normalizer: Normalizer, name: str, teachers: Mapping[str, Teacher]) -> None:
    teacher, _, summary = name.partition(".")
    spec = teachers[teacher].spec
    normalizer.fit(Moments.standard(spec.summary_channels or 0 if summary else spec.channels))


def score_student(
    task: Distillation, step: int, tensors: Mapping[str, Tensor], beat: Callable[[], None]
) -> list[Score]:
    """Score a student of these weights with the benchmarks that are run during training.

    It is a student of its own, so that nothing of the one in training is touched: neither its
    weights and buffers nor its mode, and under ZeRO no part of them is missing. A benchmark of the
    user's that fails has no score of this step: the others have theirs, and the run goes on.
    """
    stage, device, specs = task.stage, task.engine.device, task.stage.specs
    config = during_training(stage.evaluation)
    learned = stage.loss.weighting == "uncertainty"
    model = build_student(replace(stage.student, pretrained=""), specs, learned_weights=learned)
    model.load_state_dict(tensors)
    heads = None
    if "fidelity" in config.benchmarks:
        teachers, normalizers = task.targets.teachers, task.targets.normalizers
        patch_size = stage.student.patch_size
        heads = targets_of(teachers, stage.teachers, config.size, patch_size, normalizers)
    backbone = as_encoder(model.to(device).eval(), stage.student, specs)

    def warn(name: str, error: Exception) -> None:
        logger.warning(
            "step %d has no score of benchmark %r, which failed with %s: %s; "
            "`radio-distill eval %s --evaluation.benchmarks %s` shows where",
            step, name, type(error).__name__, reason_of(error), stage.folder, name,
        )  # fmt: skip

    encoder = student_encoder(backbone, device, heads)
    return evaluate(encoder, config, lambda *_: beat(), failed=warn)


def during_training(config: EvaluationConfig) -> EvaluationConfig:
    """Return the section `evaluation` with the benchmarks that are run during training."""
    return replace(config, benchmarks=config.during or config.benchmarks)


def check_evaluation(config: EvaluationConfig) -> None:
    """Raise ConfigError or DataError for data that an evaluation during training lacks."""
    if config.every:
        check_data(during_training(config))


def refold_heads(
    model: DistilledStudent, before: Mapping[str, Normalizer], now: Mapping[str, Normalizer]
) -> None:
    """Make heads that were trained under earlier statistics predict the same under new ones.

    A stage estimates its statistics anew, and with them PHI-S's rotation changes; without this the
    heads of the stage before would have to be learned once more. Exact, since the normalizers are
    affine and a head ends in a linear layer. Ours: the papers freeze the body while heads relearn.
    A normalizer without inverse (layer_norm) has no statistics either, so nothing is to be done.
    """
    heads = {name: head.spatial for name, head in model.heads.items()}
    for name, head in model.heads.items():
        if head.summary is not None:
            heads[of_summary(name)] = head.summary
    for name, projector in heads.items():
        old, new = (found.get(name, Identity()) for found in (before, now))
        if not isinstance(new, LayerNorm):
            projector.exchange_last(partial(_refolded, old, new))


def _refolded(before: Normalizer, now: Normalizer, last: nn.Linear) -> nn.Linear:
    return now.unfold(before.fold(last))


def check_room(folder: Path, model: nn.Module, with_ema: bool = False) -> None:
    """Raise ConfigError where the disk of a folder has no room for one checkpoint of a model.

    Weights, two moments and the EMA are counted, in float32.
    """
    needed = sum(map(torch.Tensor.numel, model.parameters())) * 4 * (3 + with_ema)
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


def build_targets(stage: Stage, world: World, device: torch.device) -> TargetMaker:
    """Build the teachers of a stage, its upsampler, and unfitted normalizers."""
    teachers = _teachers_for(stage, world, device)
    upsampled = {
        name: teacher
        for name, teacher in teachers.items()
        if any(view.is_upsampled for _, view in stage.views(name))
    }
    upsampler = build_upsampler(stage.upsampler, upsampled, stage.engine.precision)
    specs = {name: teacher.spec for name, teacher in teachers.items()}
    normalizers = recipe_normalizers(stage.recipe, specs)
    for name in upsampled:
        if isinstance(normalizers[name], MovingNormalizer):
            raise ConfigError(
                f"teachers.{name}.feature_normalizer: {stage.recipe.normalizers[name]} follows the "
                "teacher's own grid, and here it is upsampled; take per_channel_standardise"
            )
    return TargetMaker(teachers, normalizers, upsampler)


def _teachers_for(stage: Stage, world: World, device: torch.device) -> dict[str, Teacher]:
    """Load the teachers that this process runs in a step; of the others it knows what they are.

    The first process reads those that none runs, since checkpoints name all of the recipe.
    """

    def load(name: str) -> LayeredTeacher:
        return build_teacher(name, stage.teachers[name], device, stage.engine.compile is True)

    names = teachers_of(stage, world)
    run_somewhere = set(all_gather_object(names))
    own = {name: load(name) for name in names}
    found = {name: teacher.spec for name, teacher in own.items()}
    if world.is_main:
        found |= {name: load(name).spec for name in stage.teachers if name not in run_somewhere}
    specs = dict(all_gather_object([*found.items()]))
    return {
        name: own[name] if name in own else LateTeacher(specs[name], partial(load, name))
        for name in stage.teachers
    }


def build_teachers(recipe: Recipe, device: torch.device) -> dict[str, Teacher]:
    """Build every teacher of a recipe."""
    configs = {name: plain_teacher(recipe, name) for name in recipe.teachers}
    return {name: build_teacher(name, config, device) for name, config in configs.items()}


def _restore(task: Distillation, resumed: Checkpoint) -> None:
    task.engine.load(resumed.tensors(checkpoints.STUDENT), resumed.tensors(checkpoints.OPTIMIZER))
    restore_normalizers(task.targets.normalizers, resumed)
    if task.ema is not None and resumed.has(checkpoints.EMA):
        task.ema.load_state_dict(resumed.tensors(checkpoints.EMA))
    if task.anchor is not None and resumed.has(checkpoints.ANCHOR):
        task.anchor.load_state_dict(resumed.tensors(checkpoints.ANCHOR))
    if resumed.has(checkpoints.LOSS):
        task.weights.load_state(resumed.tensors(checkpoints.LOSS))
    logger.info("resuming %s after step %d", task.stage.name, resumed.step)
