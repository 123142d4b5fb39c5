"""The one launch, of stages and of fits: from a recipe to a run that trains.

Everything is checked and built before the folder is touched: an earlier run in it is moved aside,
and the folder claimed, just before the first step. A run that goes on claims it before it reads its
checkpoint, since a process that Slurm has given up saves, and removes what is older, until then.
:func:`launch` reads top to bottom.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from radio_distill.config import (
    AUTO,
    AUTO_MICRO_BATCH,
    Facts,
    check,
    dtypes_of,
    dump,
    place_indexes,
)
from radio_distill.data.sources import open_sources
from radio_distill.errors import ConfigError
from radio_distill.hints import hints
from radio_distill.plan.work import needs_work
from radio_distill.stage import Stage, resolve_stage
from radio_distill.system import precision
from radio_distill.system.compiled import can_compile
from radio_distill.system.distributed import (
    World,
    choose_device,
    cores_of_process,
    join,
    run_on_main,
    world_from,
)
from radio_distill.system.files import (
    check_writable,
    make_private,
    move_aside,
    reason_of,
    replacing,
)
from radio_distill.system.precision import deterministic
from radio_distill.train.checkpoint import META, Checkpoint
from radio_distill.train.deepspeed_engine import engine_name
from radio_distill.train.run_dir import RunLock, refuse_living
from radio_distill.train.stage_folders import write_stages
from radio_distill.train.trackers import check_trackers

from .fits import with_files
from .packages import check_packages
from .recipes import Asked
from .resume import aside_with_checkpoints, checkpoint_to_resume


@dataclass(frozen=True, kw_only=True)
class Options:
    """The ways in which a stage or a fit is started."""

    resume: bool = False
    """Go on from the newest checkpoint; what is complete returns at once."""
    allow_changed: bool = False
    """Go on although recipe, shards, teachers or upsampler are not the checkpoint's."""
    take_over: bool = False
    """Claim the folder although a living process owns it; that one stops."""
    asked: Asked | None = None
    """How the recipe was named on the command line, for the commands in messages."""


Train = Callable[[RunLock | None], Path]
"""Trains what was built, with rank 0's lock on the folder; returns the last checkpoint's folder."""
Build = Callable[[Stage, World, torch.device, Checkpoint | None, Options], Train]
"""Builds the parts of a resolved stage, from a checkpoint where there is one."""


def launch(
    stage: Stage, build: Build, options: Options, has_result: Callable[[], bool] = lambda: True
) -> Path:
    """Train a stage or a fit; returns the folder of its last checkpoint.

    Args:
        stage: as its recipe describes it; its folder is used.
        build: makes what trains it.
        options: how it is started.
        has_result: tells whether nothing is left to do where all steps are done.
    """
    check_packages()
    world = world_from(os.environ)
    if not world.is_main:
        logging.getLogger().setLevel(logging.WARNING)
    check_trackers(stage.log.trackers)
    engine = engine_name(stage.engine, world.world_size, stage.optimizer, stage.ema_decay > 0)
    device = choose_device(stage.engine.device, world, stage.engine.float32_matmul == "tf32")
    join(world, device, stage.watch.hang_seconds, alone=engine == "deepspeed")
    stage, problems = with_files(stage, options.asked)
    resumed = checkpoint_to_resume(world, stage, options.allow_changed) if options.resume else None
    if resumed is not None and resumed.step >= stage.steps and has_result():
        logging.info("%s is complete: %s", stage.folder.name, resumed.folder)
        return resumed.folder
    if problems:
        raise ConfigError(*problems)
    run_on_main(world, lambda: check_folder(stage.folder, resumed, options.take_over))
    with (
        saying_what_is_left(stage.folder, begun=False),
        deterministic(stage.engine.deterministic, warn_only=stage.is_fit),
        held(world, lambda: claim_folder(stage.folder, resumed, options.take_over)) as claim,
    ):
        if resumed is not None and not run_on_main(world, resumed.folder.is_dir):
            resumed = checkpoint_to_resume(world, stage, options.allow_changed)
        stage = resolve_at_start(stage, world, device, resumed)
        train = build(stage, world, device, resumed, options)
        with (
            held(world, lambda: lock_folder(stage, resumed, options.take_over, claim)) as lock,
            saying_what_is_left(stage.folder, begun=True),
        ):
            last = train(lock)
    logging.info("%s: %s", stage.folder.name, last)
    return last


def resolve_at_start(
    stage: Stage, world: World, device: torch.device, resumed: Checkpoint | None
) -> Stage:
    """Return a stage with plain values for what is `auto`; opens the shards.

    What is hardly meant is logged. Every process must call.
    """
    recipe = place_indexes(stage.recipe)
    # The first to open shards writes their indexes; the others find them.
    in_shards = run_on_main(world, lambda: open_sources(recipe.data).num_images)
    facts = Facts(
        native_dtype=precision.native_dtype(device),
        images_in_shards=in_shards,
        cores=cores_of_process(os.environ),
        can_compile=can_compile(device),
    )
    earlier = resumed.recipe if resumed else None
    order = stage.order  # of the whole recipe
    stage = resolve_stage(recipe, stage.name, stage.specs, facts, earlier, stage.folder)
    stage = replace(stage, order=order)
    check(stage.recipe)  # what a checkpoint said may not go with what is asked for now
    stage = run_on_main(world, lambda: measured_or_plain(stage, world.world_size, device))
    for line in hints(stage, in_shards):
        logging.warning("%s", line)
    if world.is_main and (line := precision.emulation_warning(dtypes_of(stage.recipe), device)):
        logging.warning("%s", line)
    return stage


def measured_or_plain(stage: Stage, devices: int, device: torch.device) -> Stage:
    """Return a stage with what is known of its work and memory, where that decides anything.

    A teacher of a user's own may compute in ways that cannot be measured without its weights: then
    there is a warning instead.
    """
    is_auto = stage.engine.micro_batch == AUTO and device.type == "cuda"
    if stage.is_fit or not (needs_work(stage, devices) or is_auto):
        return stage
    from .planning import measure_stage

    total = torch.cuda.get_device_properties(device).total_memory if is_auto else 0
    try:
        return measure_stage(stage, devices, device.type == "cuda", total / 2**30)
    except Exception as error:
        logging.warning(
            "%s: its work cannot be measured (%s: %s); processes share images by their pixels%s",
            stage.name, type(error).__name__, str(error).partition("\n")[0],
            f", and engine.micro_batch is {AUTO_MICRO_BATCH}" if is_auto else "",
        )  # fmt: skip
        return stage


def check_folder(folder: Path, resumed: Checkpoint | None, take_over: bool) -> None:
    """Check that a stage can be begun in ``folder``; nothing in it is changed.

    Raises:
        ConfigError: where it cannot be written, or a living process owns it.
    """
    try:
        check_writable(folder)
        check_writable(folder / "checkpoints")
        if resumed is None and _has_checkpoints(folder):
            check_writable(folder.parent)  # where the earlier run is moved aside
    except OSError as error:
        raise _cannot_write(folder, error) from error
    refuse_living(folder, take_over)


@contextmanager
def held(world: World, take: Callable[[], RunLock | None]) -> Iterator[RunLock | None]:
    """Hold for the block the lock that rank 0 takes, which it alone gets; every rank must call."""
    locks: list[RunLock | None] = []  # not for others: a lock has a thread
    run_on_main(world, lambda: locks.append(take()))
    lock = locks[0] if locks else None
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def claim_folder(folder: Path, resumed: Checkpoint | None, take_over: bool) -> RunLock | None:
    """Claim the folder of a run that goes on; one that begins claims nothing yet."""
    return RunLock.take(folder, take_over) if resumed is not None else None


def lock_folder(
    stage: Stage, resumed: Checkpoint | None, take_over: bool, claim: RunLock | None
) -> RunLock:
    """Make a stage's folder this process's own, and write the resolved recipe into it.

    A fresh run never writes over an earlier one: that one's folder is moved aside. Run folders are
    private to their user. ``claim`` is the lock of a run that goes on.

    Raises:
        ConfigError: where it cannot be written, or another process owns it by now.
    """
    folder = stage.folder
    try:
        make_private(stage.run_folder)
        make_private(folder)
        lock = claim or RunLock.take(folder, take_over)
        try:
            if resumed is None and _has_checkpoints(folder):
                aside = move_aside(folder, stage.order)
                lock.move(aside)
                lock.release()
                logging.info(
                    "moved the earlier run to %s (--resume would have gone on with it)", aside
                )
                make_private(folder)
                lock = RunLock.take(folder)
            if stage.order:
                write_stages(stage.run_folder, stage.order)
            with replacing(folder / "recipe.yaml") as temporary:
                temporary.write_text(dump(stage.recipe), encoding="utf-8")
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return lock


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
        raise KeyboardInterrupt(*error.args or [_what_is_left(folder, begun)]) from error


def _what_is_left(folder: Path, begun: bool) -> str:
    """Say what a stage that was aborted leaves behind, as the disk has it."""
    steps = sorted(path.parent.name for path in (folder / "checkpoints").glob(f"step-*/{META}"))
    newest = folder / "checkpoints" / steps[-1] if steps else None
    aside = aside_with_checkpoints(folder)
    if not begun:
        text = f"{folder.name}: stopped before its first step; {folder} is as it was"
        return f"{text}, and --resume would go on from {newest}" if newest else text
    text = f"{folder.name}: aborted without saving"
    if newest is not None:
        return f"{text}; --resume goes on from {newest}"
    if aside is None:
        return f"{text}, and before its first checkpoint: --resume would start anew"
    return (
        f"{text}, and before its first checkpoint: start it anew without --resume "
        f"(the run before is in {aside})"
    )
