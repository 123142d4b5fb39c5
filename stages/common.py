"""What every stage does: find the recipe, check the packages, train, resume.

The only code that knows teachers, upsamplers and the library at once.
"""

import argparse
import glob
import logging
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radio_distill.config import (
    Facts,
    FitConfig,
    Recipe,
    StageConfig,
    check,
    differences,
    dtypes_of,
    dump,
    keep_resolved,
    load,
    place_indexes,
)
from radio_distill.config.recipes import find_recipe
from radio_distill.errors import ChangedError, CheckpointError, ConfigError
from radio_distill.hints import hints
from radio_distill.registry import nearest
from radio_distill.system.files import (
    check_writable,
    free_name,
    make_private,
    move_aside,
    reason_of,
    replacing,
)
from radio_distill.system.trust import trusting_pickles

from .arguments import FIELDS_HELP, Parser, add_training_arguments, run_command

if TYPE_CHECKING:
    import torch

    from radio_distill.stage import Stage
    from radio_distill.system.distributed import World
    from radio_distill.train.checkpoint import Checkpoint
    from radio_distill.train.run_dir import RunLock

FITTED = "upsampler.safetensors"
"""Name of the file in the folder of a fit."""


@dataclass(frozen=True)
class Asked:
    """How a recipe was named on a command line, for the commands in messages."""

    recipe: str
    fields: tuple[str, ...] = ()
    """As ``field.name=value``."""

    def flags(self, *without: str) -> list[str]:
        """Return the fields as arguments, but for those that begin with one of some texts."""
        words = []
        for field in self.fields:
            if not field.startswith(without):
                name, _, value = field.partition("=")
                words += [f"--{name}", value]
        return words

    def train(self, stage: str) -> str:
        """Return the command that trains a stage, as it can be pasted."""
        words = ["radio-distill", "train", self.recipe, "--stages", stage, *self.flags()]
        return shlex.join(words)


def load_recipe(name: str, overrides: Sequence[str] = (), stage: str = "") -> Recipe:
    """Load a recipe by name or path, with overrides of the form ``field.name=value``."""
    return load(find_recipe(name), overrides, stage)


def fit_of(recipe: Recipe, teacher: str, upsampler: str, factor: int) -> FitConfig:
    """Return how a recipe fits an upsampler; its options are those of ``fit.upsampler`` alone."""
    options = recipe.fit.options if upsampler == recipe.fit.upsampler else {}
    return replace(recipe.fit, teacher=teacher, upsampler=upsampler, factor=factor, options=options)


def fit_folder(recipe: Recipe, config: FitConfig) -> Path:
    """Return the folder that an upsampler is fitted in, inside the run folder."""
    return recipe.folder / "fit" / fit_name(config)


def fit_name(config: FitConfig) -> str:
    """Name a fit: TEACHER-UPSAMPLER-FACTORx, and what changes the model from its defaults.

    For instance ``dino-featsharp-2x-inputs_bilinear_tiles-no_debias``.
    """
    parts = [f"{config.teacher}-{config.upsampler}-{config.factor}x"]
    for name, value in changed_options(config.upsampler, config.options).items():
        parts.append(f"{name}_{'_'.join(map(str, value)) if isinstance(value, list) else value}")
    if not config.de_bias:
        parts.append("no_debias")
    return re.sub(r"[^\w.+-]+", "_", "-".join(parts))


def changed_options(upsampler: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options of a network that are not its defaults, sorted by name."""
    if not options:
        return {}
    from upsamplers.networks import NETWORKS

    known = signature(NETWORKS.get(upsampler)).parameters
    defaults = {name: _plain(item.default) for name, item in known.items()}
    given = {name: _plain(options[name]) for name in sorted(options)}
    return {
        name: value
        for name, value in given.items()
        if name not in defaults or defaults[name] != value
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def stage_of(recipe: Recipe, stage: str) -> StageConfig:
    """Return a stage's section of the recipe."""
    if stage not in recipe.stages:
        raise ConfigError(
            f"recipe {recipe.name!r} has no {stage} ({nearest(stage, list(recipe.stages))})"
        )
    return recipe.stages[stage]


def describe_stage(recipe: Recipe, name: str) -> "Stage":
    """Resolve a stage as far as its recipe alone says; what is `auto` stays so.

    Raises ConfigError or WeightsError for a teacher that cannot be described, and for one that
    cannot give what a partition asks of it.
    """
    from radio_distill.stage import resolve_stage
    from teachers import teacher_spec

    shown = {name for item in stage_of(recipe, name).partitions for name in item.teachers}
    specs = {name: teacher_spec(name, recipe.teachers[name]) for name in shown}
    return resolve_stage(recipe, name, specs)


def add_stage_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a stage script and ``radio-distill train`` take."""
    add_training_arguments(parser)
    parser.add_argument(
        "--teacher-upsampler", metavar="NAME", help="upsampler of the upsampled teachers"
    )


def stage_main(stage: str, argv: Sequence[str] | None = None) -> int:
    """Run one stage from the command line."""
    parser = Parser(
        prog=f"stages/{stage}.py",
        description=f"Train {stage} of a recipe.",
        epilog=f"{FIELDS_HELP}\nIn FIELD, `stage` stands for this stage: --stage.steps 100.",
    )
    add_stage_arguments(parser)

    def command() -> None:
        arguments, fields = parser.parse(argv, takes_fields=True)
        with trusting_pickles(arguments.trust_checkpoint):
            recipe, asked = recipe_from(arguments, fields, stage)
            train_stage(
                stage,
                recipe,
                arguments.resume,
                arguments.allow_changed_recipe,
                arguments.take_over,
                asked,
            )

    return run_command(command)


def recipe_from(
    arguments: argparse.Namespace, fields: Sequence[str], stage: str = ""
) -> tuple[Recipe, Asked]:
    """Load the recipe that parsed arguments and further ``field.name=value`` describe."""
    overrides = list(fields)
    if arguments.teacher_upsampler:
        from upsamplers import UPSAMPLERS

        UPSAMPLERS.get(arguments.teacher_upsampler)  # an unknown name ends here
        target = stage or "stage3"
        overrides.insert(0, f"stages.{target}.upsampler.name={arguments.teacher_upsampler}")
    if arguments.output:
        overrides.insert(0, f"output={arguments.output}")
    recipe = load_recipe(arguments.recipe, overrides, stage)
    if arguments.teacher_upsampler:
        _check_upsamples(recipe, stage or "stage3")
    named = [
        f"stages.{stage}{item[5:]}" if item.startswith("stage.") else item for item in overrides
    ]
    return recipe, Asked(arguments.recipe, tuple(named))


def _check_upsamples(recipe: Recipe, stage: str) -> None:
    """Raise ConfigError where an upsampler was asked for that nothing would go through."""
    if not any(partition.upsample for partition in stage_of(recipe, stage).partitions):
        raise ConfigError(
            f"--teacher-upsampler: no partition of {stage} upsamples a teacher; name some in "
            f"stages.{stage}.partitions.N.upsample"
        )


def train_stage(
    stage: str,
    recipe: Recipe,
    resume: bool = False,
    allow_changed: bool = False,
    take_over: bool = False,
    asked: Asked | None = None,
    retrain: bool = False,
    way_out: str = "",
) -> Path:
    """Build the parts of a stage and train it; returns the last checkpoint's folder.

    Everything is checked and built before the folder is touched: an earlier run in it is moved
    aside, and the folder claimed, just before the first step.

    Args:
        stage: of the recipe.
        recipe: as a person wrote it; its run folder is used.
        resume: go on from the newest checkpoint; a stage that is complete returns at once.
        allow_changed: go on although recipe, shards or upsampler are not the checkpoint's.
        take_over: claim the folder although a living process owns it; that one stops.
        asked: how the recipe was named on the command line, for the commands in messages.
        retrain: begin anew where there is nothing to go on with as asked; the earlier run is moved
            aside.
        way_out: what the caller's command offers in that case, where that is something of its own.

    Raises:
        ChangedError: in that case, without ``retrain``.
    """
    try:
        return _train_stage(stage, recipe, resume, allow_changed, take_over, asked)
    except ChangedError as error:
        if not retrain:
            raise ChangedError(error.problem, way_out or error.way_out) from error
        logging.warning("%s is trained anew: %s", recipe.stage_folder(stage), error.problem)
    return _train_stage(stage, recipe, False, False, take_over, asked)


def _train_stage(
    stage: str,
    recipe: Recipe,
    resume: bool,
    allow_changed: bool,
    take_over: bool,
    asked: Asked | None,
) -> Path:
    from radio_distill.system.distributed import (
        choose_device,
        join,
        run_on_main,
        world_from,
    )
    from radio_distill.train.engine import engine_name

    from .build import build_run
    from .commands.doctor import check_packages
    from .upsampler_files import with_files

    check_packages()
    config = stage_of(recipe, stage)
    folder = recipe.stage_folder(stage)
    world = world_from(os.environ)
    engine = engine_name(recipe.engine, config, world.world_size)  # what cannot be ends here
    if not world.is_main:
        logging.getLogger().setLevel(logging.WARNING)
    device = choose_device(recipe.engine.device, world)
    join(world, device, recipe.watch.hang_seconds, alone=engine == "deepspeed")
    recipe, problems = with_files(recipe, stage, asked)
    checkpoint = None
    if resume:
        checkpoint = checkpoint_to_resume(world, folder, recipe, stage, allow_changed)
    if checkpoint is not None and checkpoint.step >= config.steps:
        logging.info("%s is complete: %s", folder.name, checkpoint.folder)
        return checkpoint.folder
    if problems:
        raise ConfigError(*problems)
    run_on_main(world, lambda: check_folder(folder, checkpoint, take_over))
    from radio_distill.train.loop import train

    with saying_what_is_left(folder, begun=False):
        settled = resolve_at_start(recipe, stage, folder, world, device, checkpoint)
        run = build_run(settled, world, device, checkpoint, allow_changed, asked)
        with (
            owning(world, folder, settled.recipe, checkpoint, take_over) as run.ownership,
            saying_what_is_left(folder, begun=True),
        ):
            last = train(run)
    logging.info("%s: %s", folder.name, last)
    return last


def resolve_at_start(
    recipe: Recipe,
    name: str,
    folder: Path,
    world: "World",
    device: "torch.device",
    checkpoint: "Checkpoint | None",
) -> "Stage":
    """Resolve a stage with all that is known when it starts; opens the shards.

    What is hardly meant is logged.

    Args:
        recipe: as a person wrote it.
        name: of a stage of the recipe, or ``fit``.
        folder: of the stage.
        world: this process's place; every process must call.
        device: where it computes.
        checkpoint: what the run goes on from.
    """
    from radio_distill.data.sources import open_sources
    from radio_distill.stage import resolve_stage
    from radio_distill.system.distributed import cores_of_process, run_on_main
    from radio_distill.system.precision import native_dtype
    from teachers import teacher_spec

    specs = {teacher: teacher_spec(teacher, config) for teacher, config in recipe.teachers.items()}
    resolve_stage(recipe, name, specs)  # what teachers cannot give ends here
    recipe = place_indexes(recipe)
    # The first to open shards writes their indexes; the others find them.
    in_shards = run_on_main(world, lambda: open_sources(recipe.data).num_images)
    facts = Facts(
        native_dtype=native_dtype(device),
        images_in_shards=in_shards,
        cores=cores_of_process(os.environ),
    )
    earlier = checkpoint.recipe if checkpoint else None
    stage = resolve_stage(recipe, name, specs, facts, earlier, folder)
    check(stage.recipe)  # what a checkpoint said may not go with what is asked for now
    for line in hints(stage, in_shards):
        logging.warning("%s", line)
    if world.is_main:
        warn_of_emulation(dtypes_of(stage.recipe), device)
    return stage


def warn_of_emulation(dtypes: Mapping[str, str], device: "torch.device") -> None:
    """Say in one line which fields ask for a number type that the device emulates, and its cost."""
    from radio_distill.system.precision import emulation_warning

    if line := emulation_warning(dtypes, device):
        logging.warning("%s", line)


_WITHOUT_EFFECT = (
    "output",
    "log",
    "watch",
    "evaluation",
    "data.shards",  # what they hold is compared by their fingerprint, wherever they lie
    "data.index",
    "data.workers",
    "data.max_bad_share",
    "data.max_bad_shards",
    "data.read_timeout",
    "normalizer.cache",
)
_WITHOUT_EFFECT_ON_STAGES = ("fit",)  # what was fitted is compared by its sum
_WITHOUT_EFFECT_ON_FITS = ("stages", "student", "loss", "augmentation", "fit.images_every")
_ROUNDING = (
    "engine.name",
    "engine.zero_stage",
    "engine.micro_batch",
    "engine.device",
    "engine.compile",
    "student.gradient_checkpointing",
    "teachers.*.micro_batch",
    "stages.*.upsampler.micro_batch",
)


def changes_that_matter(old: Recipe, new: Recipe, stage: str) -> tuple[list[str], list[str]]:
    """List the fields in which two recipes differ and that change a stage's numbers.

    Args:
        old: of a checkpoint, so resolved; where ``new`` says `auto` it means what ``old`` says.
        new: with the files of its upsampler, see :func:`stages.upsampler_files.with_files`.
        stage: a stage of both, or ``fit``.

    Returns:
        Those that change what is computed, and those that only change how sums are rounded.
    """
    from .upsampler_files import same_files

    is_fit = stage not in new.stages
    ignored = (
        *_WITHOUT_EFFECT,
        *(_WITHOUT_EFFECT_ON_FITS if is_fit else _WITHOUT_EFFECT_ON_STAGES),
    )
    lines = [
        re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", line)
        for line in differences(old, same_files(old, keep_resolved(new, old), stage))
        if not _within(line, ignored)
        and (not line.startswith("stages.") or line.startswith(f"stages.{stage}."))
    ]
    rounding = [line for line in lines if _within(line, _ROUNDING)]
    return [line for line in lines if line not in rounding], rounding


def _within(line: str, fields: Sequence[str]) -> bool:
    """Tell whether the field that a line is about is one of some, or within one."""
    names = line.partition(":")[0].split(".")
    return any(
        all(fnmatchcase(name, part) for name, part in zip(names, field.split("."), strict=False))
        for field in fields
        if len(field.split(".")) <= len(names)
    )


def checkpoint_to_resume(
    world: "World", folder: Path, recipe: Recipe, stage: str, allow_changed: bool
) -> "Checkpoint | None":
    """Return the newest whole checkpoint in ``folder``, the same on every process.

    Raises:
        ChangedError: on every process, for a changed recipe, and where an earlier run was moved
            aside and this one has no checkpoint yet.
    """
    from radio_distill.system.distributed import run_on_main
    from radio_distill.train import checkpoint as checkpoints

    from .upsampler_files import unknown_files

    checkpoint = run_on_main(world, lambda: _newest_to_resume(folder, stage))
    if checkpoint is None:
        logging.info("nothing to resume in %s; starting anew", folder)
        return None
    changed, rounding = changes_that_matter(checkpoint.recipe, recipe, stage)
    changed += run_on_main(world, lambda: _changed_start(checkpoint, recipe, stage))
    if changed and not allow_changed:
        raise ChangedError(
            f"the recipe differs from that of {checkpoint.folder} ({'; '.join(changed)}); take the "
            "change back"
        )
    for teacher in unknown_files(checkpoint, recipe, stage):
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


def _changed_start(checkpoint: "Checkpoint", recipe: Recipe, stage: str) -> list[str]:
    """Say where the student that a stage started from was trained anew, or on, since."""
    from radio_distill.train.checkpoint import student_checksum

    start = recipe.stages[stage].start_from if stage in recipe.stages else ""
    before = checkpoint.origin.start
    if not (start and before):
        return []
    path = recipe.stage_folder(start) if start in recipe.stages else Path(start)
    now = student_checksum(path)
    if now in ("", before):
        return []
    return [f"stages.{stage}.start_from: the student of {path}: {before[:12]}... -> {now[:12]}..."]


def _newest_to_resume(folder: Path, stage: str) -> "Checkpoint | None":
    from radio_distill.train import checkpoint as checkpoints
    from radio_distill.train.run_dir import FRESH, was_requeued

    checkpoint = checkpoints.newest(folder / "checkpoints", stage)
    is_jobs_own = was_requeued(folder)
    if checkpoint is not None and os.environ.get(FRESH) and not is_jobs_own:
        logging.info("%s is of another run: this job was submitted to start anew", folder)
        return None
    if checkpoint is not None or is_jobs_own:
        return checkpoint
    aside = _aside_with_checkpoints(folder)
    if aside is not None:
        put_back = f"mv {shlex.quote(str(aside))} {shlex.quote(str(folder))}"
        if folder.exists():
            free = shlex.quote(str(free_name(folder)))
            put_back = f"mv {shlex.quote(str(folder))} {free} && {put_back}"
        raise ChangedError(
            f"{folder} has no whole checkpoint to resume, but {aside} has: a start without "
            f"--resume moved it aside; put it back with `{put_back}`",
            "start anew without that flag",
        )
    return None


def _aside_with_checkpoints(folder: Path) -> Path | None:
    """Return the run that was moved aside last, of those with a checkpoint."""
    found = {
        int(path.parents[1].name.rpartition(".")[2]): path.parents[1]
        for path in folder.parent.glob(f"{glob.escape(folder.name)}.*/checkpoints/step-*")
        if path.parents[1].name.rpartition(".")[2].isdecimal()
    }
    return found[max(found)] if found else None


def check_folder(folder: Path, resumed: "Checkpoint | None", take_over: bool) -> None:
    """Check that a stage can be begun in ``folder``; nothing in it is changed.

    Raises:
        ConfigError: where it cannot be written, or a living process owns it.
    """
    from radio_distill.train.run_dir import refuse_living

    try:
        check_writable(folder)
        check_writable(folder / "checkpoints")
        if resumed is None and _has_checkpoints(folder):
            check_writable(folder.parent)  # where the earlier run is moved aside
    except OSError as error:
        raise _cannot_write(folder, error) from error
    refuse_living(folder, take_over)


@contextmanager
def owning(
    world: "World",
    folder: Path,
    recipe: Recipe,
    resumed: "Checkpoint | None",
    take_over: bool,
) -> "Iterator[RunLock | None]":
    """Claim a stage's folder for the block; every rank must call, and rank 0 gets the claim."""
    from radio_distill.system.distributed import run_on_main

    claims: list[RunLock] = []  # not for others: it has a thread
    run_on_main(world, lambda: claims.append(claim(folder, recipe, resumed, take_over)))
    try:
        yield claims[0] if claims else None
    finally:
        for ownership in claims:
            ownership.release()


def claim(folder: Path, recipe: Recipe, resumed: "Checkpoint | None", take_over: bool) -> "RunLock":
    """Make a stage's folder this process's own, and write the resolved recipe into it.

    A fresh run never writes over an earlier one: that one's folder is moved aside. Run folders are
    private to their user.

    Raises:
        ConfigError: where it cannot be written, or another process owns it by now.
    """
    from radio_distill.train.run_dir import RunLock

    try:
        make_private(recipe.folder)
        make_private(folder)
        ownership = RunLock.take(folder, take_over)
        try:
            if resumed is None and _has_checkpoints(folder):
                ownership = _claim_anew(folder, ownership)
            elif resumed is not None and not resumed.folder.is_dir():
                raise ConfigError(f"{resumed.folder} was moved or deleted since it was read")
            with replacing(folder / "recipe.yaml") as temporary:
                temporary.write_text(dump(recipe), encoding="utf-8")
        except BaseException:
            ownership.release()
            raise
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return ownership


def _claim_anew(folder: Path, ownership: "RunLock") -> "RunLock":
    """Move an earlier run aside, of whose folder this process is the owner; returns a new claim."""
    aside = move_aside(folder)
    ownership.move(aside)
    ownership.release()
    logging.info("moved the earlier run to %s (--resume would have gone on with it)", aside)
    make_private(folder)
    return type(ownership).take(folder)


def _has_checkpoints(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("step-*"))


def _cannot_write(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write to {folder}: {reason_of(error)}; choose another folder with --output"
    )


@contextmanager
def saying_what_is_left(folder: Path, begun: bool) -> Iterator[None]:
    """Let Ctrl-C that ends a stage without saving say what is there, and what --resume would do.

    ``begun`` tells whether the folder is this run's. Blocks may be nested; the inner one speaks.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(*error.args or [what_is_left(folder, begun)]) from error


def what_is_left(folder: Path, begun: bool) -> str:
    """Say what a stage that was aborted leaves behind, as the disk has it."""
    from radio_distill.train.checkpoint import META

    steps = sorted(path.parent.name for path in (folder / "checkpoints").glob(f"step-*/{META}"))
    newest = folder / "checkpoints" / steps[-1] if steps else None
    aside = _aside_with_checkpoints(folder)
    if not begun:
        said = f"{folder.name}: stopped before its first step; {folder} is as it was"
        return f"{said}, and --resume would go on from {newest}" if newest else said
    said = f"{folder.name}: aborted without saving"
    if newest is not None:
        return f"{said}; --resume goes on from {newest}"
    if aside is None:
        return f"{said}, and before its first checkpoint: --resume would start anew"
    return (
        f"{said}, and before its first checkpoint: start it anew without --resume "
        f"(the run before is in {aside})"
    )


def start_checkpoint(stage: "Stage", asked: Asked | None = None) -> "Checkpoint | None":
    """Open the checkpoint that a stage starts from, or return None for a new student.

    Raises:
        ConfigError: where the stage before has not been run, with the command that runs it.
        CheckpointError: where its checkpoint may not be read.
    """
    from radio_distill.train import checkpoint as checkpoints

    start, recipe = stage.config.start_from, stage.recipe
    if not start:
        return None
    path = recipe.stage_folder(start) if start in recipe.stages else Path(start)
    try:
        return checkpoints.find(path)
    except checkpoints.UnreadableError:
        raise
    except CheckpointError as error:
        hint = f"set stages.{stage.name}.start_from"
        if start in recipe.stages:
            hint = f"run it first: {(asked or Asked(recipe.name)).train(start)}"
            hint += ", or `make demo`, which runs all stages" if recipe.name == "demo" else ""
        raise ConfigError(f"{stage.name} starts from {start}, but {error}; {hint}") from error
