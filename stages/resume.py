"""What a stage goes on from: its own newest checkpoint, or the one of the stage before.

A run goes on only with what it began with. Everything that changes a number is compared with what
the checkpoint says: the recipe, the files of fitted upsamplers and the student that the stage
started from before anything is built; shards and teachers' weights once they are open.
"""

import glob
import logging
import os
import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from radio_distill.config import Recipe, differences, for_stage, keep_resolved, section_of
from radio_distill.config.flat import NO_NUMBER, ROUNDING, is_within
from radio_distill.errors import ChangedError, CheckpointError, ConfigError, UnreadableError
from radio_distill.stage import Stage
from radio_distill.system.distributed import World, run_on_main
from radio_distill.system.files import free_name, sha256_of
from radio_distill.train import checkpoint as checkpoints
from radio_distill.train.checkpoint import Checkpoint, Origin
from radio_distill.train.run_dir import FRESH, was_requeued
from radio_distill.types import TeacherSpec
from upsamplers.fitted_files import path_of

from .recipes import Asked, untrained_teachers

_NOT_OF_STAGES = ("fit",)  # what was fitted is compared by its checksum
_NOT_OF_FITS = ("stages", "student", "loss", "augmentation", "fit.images_every")
_BY_CHECKSUM = ("data.shards", "data.curation")  # wherever they lie

logger = logging.getLogger(__name__)


def checkpoint_to_resume(world: World, stage: Stage, allow_changed: bool) -> Checkpoint | None:
    """Return a stage's newest whole checkpoint, the same on every process.

    Args:
        world: this process's place; every process must call.
        stage: with the files of its upsampler; where a field is `auto` it means what the checkpoint
            says.
        allow_changed: only say what has changed.

    Raises:
        ChangedError: on every process, for a changed recipe, and where an earlier run was moved
            aside and this one has no checkpoint yet.
    """
    checkpoint = run_on_main(world, lambda: _newest(stage))
    if checkpoint is None:
        logging.info("nothing to resume in %s; starting anew", stage.folder)
        return None
    changed, rounding = changes_since(checkpoint, stage)
    changed += run_on_main(world, lambda: _changed_start(checkpoint, stage))
    if changed and not allow_changed:
        raise ChangedError(
            f"the recipe differs from that of {checkpoint.folder} ({'; '.join(changed)}); take the "
            "change back"
        )
    for teacher in _unknown_files(checkpoint, stage):
        logging.warning(
            "%s, of an earlier version, does not say which upsampler of teacher %r it was trained "
            "with; whether it is today's cannot be told",
            checkpoint.folder,
            teacher,
        )
    for line in changed:
        logging.warning("changed since the checkpoint: %s", line)
    for line in rounding:
        logging.info("changed since the checkpoint, sums may be rounded otherwise: %s", line)
    if checkpoint.world_size != world.world_size:
        logging.info(
            "%d processes go on where %d were; sums may be rounded otherwise",
            world.world_size,
            checkpoint.world_size,
        )
    for name, now in checkpoints.versions().items():
        before = checkpoint.versions.get(name, now)
        if before != now:
            level = logging.WARNING if name == "radio-distill" else logging.INFO
            message = "%s was %s when the checkpoint was written, and is %s"
            logging.log(level, message, name, before, now)
    return checkpoint


def changes_since(checkpoint: Checkpoint, stage: Stage) -> tuple[list[str], list[str]]:
    """List the fields in which a stage differs from its checkpoint and that change its numbers.

    Returns:
        Those that change what is computed, and those that only change how sums are rounded.
    """
    old = checkpoint.recipe
    new = _same_files(old, replace(stage, recipe=keep_resolved(stage.recipe, old)))
    known = [name for name, spec in checkpoint.teachers.items() if spec.weights_hash]
    by_checksum = (*_BY_CHECKSUM, *(f"teachers.{name}.weights" for name in known))
    ignored = (*NO_NUMBER, *by_checksum, *(_NOT_OF_FITS if stage.is_fit else _NOT_OF_STAGES))
    changed, rounding = list[str](), list[str]()
    for line in differences(old, new):
        path = line.partition(":")[0].split(".")
        if is_within(path, ignored) or (path[0] == "stages" and path[1] != stage.name):
            continue
        line = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", line)
        (rounding if is_within(path, ROUNDING) else changed).append(line)
    return changed, rounding


def _same_files(old: Recipe, stage: Stage) -> Recipe:
    """Return a stage's recipe with the old one's words for what is the same in its upsampler.

    Files are told apart by their checksums, wherever they lie. What only one of the recipes knows
    the checksum of is taken to be the same: see :func:`_unknown_files`. The upsampler of a stage
    that upsamples nothing is no difference at all.
    """
    if stage.is_fit or stage.name not in old.stages:
        return stage.recipe
    before, after = old.stages[stage.name].upsampler, stage.upsampler
    if not any(view.is_upsampled for name in stage.specs for _, view in stage.views(name)):
        changed = before
    else:
        known = {name: after.sha256.get(name, checksum) for name, checksum in before.sha256.items()}
        changed = replace(after, weights=before.weights, sizes=before.sizes, sha256=known)
    stages = {**stage.recipe.stages, stage.name: replace(stage.config, upsampler=changed)}
    return replace(stage.recipe, stages=stages)


def _unknown_files(checkpoint: Checkpoint, stage: Stage) -> list[str]:
    """Name the teachers of whose upsampler a checkpoint does not say which file it was.

    Earlier versions did not write it down.
    """
    if stage.is_fit or stage.name not in checkpoint.recipe.stages:
        return []
    known = checkpoint.recipe.stages[stage.name].upsampler.sha256
    return [name for name in stage.upsampler.sha256 if name not in known]


def _start_folder(stage: Stage) -> Path | None:
    """Return the folder that a stage's student starts from, None for a new one."""
    start = "" if stage.is_fit else stage.config.start_from
    if not start:
        return None
    recipe = stage.recipe
    return recipe.stage_folder(start) if start in recipe.stages else Path(start).expanduser()


def _changed_start(checkpoint: Checkpoint, stage: Stage) -> list[str]:
    """Say where the student that a stage started from was trained anew, or on, since."""
    folder, before = _start_folder(stage), checkpoint.origin.start
    if folder is None or not before:
        return []
    now = checkpoints.student_checksum(folder)
    if now in ("", before):
        return []
    field = f"stages.{stage.name}.start_from"
    return [f"{field}: the student of {folder}: {before[:12]}... -> {now[:12]}..."]


def start_checkpoint(stage: Stage, asked: Asked | None = None) -> Checkpoint | None:
    """Open the checkpoint that a stage starts from, or return None for a new student.

    Raises:
        ConfigError: where the stage before has not been run, with the command that runs it.
        CheckpointError: where its checkpoint may not be read.
    """
    folder = _start_folder(stage)
    if folder is None:
        return None
    try:
        return checkpoints.find(folder)
    except UnreadableError:
        raise
    except CheckpointError as error:
        start, recipe = stage.config.start_from, stage.recipe
        hint = f"set stages.{stage.name}.start_from"
        if start in recipe.stages:
            hint = f"run it first: {(asked or Asked(recipe.name)).train(start)}"
            hint += ", or `make demo`, which runs all stages" if recipe.name == "demo" else ""
        raise ConfigError(f"{stage.name} starts from {start}, but {error}; {hint}") from error


def check_stage_teachers(recipe: Recipe, name: str, asked: Asked | None = None) -> None:
    """Raise ConfigError, with the command to run, where a stage learns from students of others.

    That is, where one of them is not trained yet, or has another section than when it was.
    """
    asked = asked or Asked(recipe.name)
    problems = [*untrained_teachers(recipe, name, (), asked)]
    for teacher, config in for_stage(recipe, name).teachers.items():
        stage = recipe.teachers[teacher].stage
        if not stage or problems:
            continue
        trained, part = checkpoints.find(Path(config.weights)), for_stage(recipe, stage)
        for line in differences(replace(part, student=trained.recipe.student), part):
            if not is_within(line.partition(":")[0].split("."), ROUNDING):
                problems.append(
                    f"{section_of(recipe, stage)}{line.removeprefix('student')}, since "
                    f"{trained.folder} was trained; take the change back, or train it anew: "
                    f"{asked.train(stage)}"
                )
    if problems:
        raise ConfigError(*problems)


def _newest(stage: Stage) -> Checkpoint | None:
    folder = stage.folder
    checkpoint = checkpoints.newest(folder / "checkpoints", stage.name)
    is_jobs_own = was_requeued(folder)
    if checkpoint is not None and os.environ.get(FRESH) and not is_jobs_own:
        logging.info("%s is of another run: this job was submitted to start anew", folder)
        return None
    if checkpoint is not None or is_jobs_own:
        return checkpoint
    aside = aside_with_checkpoints(folder, stage.order)
    if aside is not None:
        put_back = f"mv {shlex.quote(str(aside))} {shlex.quote(str(folder))}"
        if folder.exists():
            free = shlex.quote(str(free_name(folder, stage.order)))
            put_back = f"mv {shlex.quote(str(folder))} {free} && {put_back}"
        raise ChangedError(
            f"{folder} has no whole checkpoint to resume, but {aside} has: a start without "
            f"--resume moved it aside; put it back with `{put_back}`",
            "start anew without that flag",
        )
    return None


def aside_with_checkpoints(folder: Path, stages: Collection[str] = ()) -> Path | None:
    """Return the run that was moved aside last, of those with a checkpoint; no other stage."""
    numbered: dict[int, Path] = {}
    for path in folder.parent.glob(f"{glob.escape(folder.name)}.*/checkpoints/step-*"):
        run = path.parents[1]
        number = run.name.rpartition(".")[2]
        if number.isdecimal() and run.name not in stages:
            numbered[int(number)] = run
    return numbered[max(numbered)] if numbered else None


def check_shards(resumed: Checkpoint, fingerprint: str, allow_changed: bool) -> None:
    """Raise ChangedError where the shards are not those that the checkpoint was trained on."""
    if resumed.shards in ("", fingerprint):
        return
    if not allow_changed:
        raise ChangedError(
            f"data.shards: contents or order of the shards, or data.curation, changed since "
            f"{resumed.folder}, so the order of the images would be another; put them back"
        )
    logger.warning("the shards changed since the checkpoint: images may be met again, or never")


def changed_teachers(resumed: Checkpoint, teachers: Mapping[str, TeacherSpec]) -> list[str]:
    """List the teachers that have other weights than those that a checkpoint was trained with.

    A teacher without a fingerprint in the checkpoint is taken for the same.
    """
    known = {name: spec.weights_hash for name, spec in resumed.teachers.items()}
    return [
        name
        for name, spec in teachers.items()
        if known.get(name) and known[name] != spec.weights_hash
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


def origin_of(
    resumed: Checkpoint, stage: Stage, teachers: Mapping[str, TeacherSpec], shards: str
) -> Origin:
    """Return where a resumed student came from: what its checkpoint says, and what is changed now.

    Args:
        resumed: the checkpoint.
        stage: that goes on.
        teachers: with their weights.
        shards: their fingerprint.
    """
    changed = [
        *changes_since(resumed, stage)[0],
        *(["data.shards: their contents"] if resumed.shards not in ("", shards) else []),
        *(f"teachers.{name}: its weights" for name in changed_teachers(resumed, teachers)),
    ]
    lines = tuple(f"after step {resumed.step}: {line}" for line in changed)
    return replace(resumed.origin, changed=(*resumed.origin.changed, *lines))


def changed_since(checkpoint: Checkpoint) -> list[str]:
    """Say how what a checkpoint was made of is not what its recipe would make it of today.

    Files of its upsamplers that were exchanged, and what was changed on its way.
    """
    lines = [f"{checkpoint.folder} was changed {line}" for line in checkpoint.origin.changed]
    if checkpoint.stage not in checkpoint.recipe.stages:
        return lines
    config = checkpoint.recipe.stages[checkpoint.stage].upsampler
    for name, known in config.sha256.items():
        path = path_of(config.weights.get(name, ""))
        if path.is_file() and sha256_of(path) != known:
            lines.append(
                f"{checkpoint.folder} was trained with another {config.name} of teacher {name!r} "
                f"than lies at {path} now"
            )
    return lines
