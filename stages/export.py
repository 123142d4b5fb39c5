"""Write a trained student so that other libraries load it.

    radio-distill export runs/demo --format transformers
    radio-distill export runs/demo --stage stage3-tile --format onnx --output student

Everything that only training needs is folded away, so that each head predicts in its teacher's own
space. What is written is read back and compared where a library to read it with is installed.
"""

import argparse
import itertools
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from radio_distill.errors import CheckpointError, ConfigError, ExportError
from radio_distill.files import reason_of
from radio_distill.registry import nearest

if TYPE_CHECKING:
    from radio_distill.train.checkpoint import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from radio_distill.export import FORMATS

    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    add = parser.add_argument
    add("run", type=Path, help="folder of a run, a stage, or a single checkpoint")
    add("--format", metavar="NAME", required=True, help=formats)
    add("--stage", metavar="NAME", help="stage of the run (default: the last one trained)")
    add("--output", metavar="DIR", type=Path, help="new folder (default: RUN/export/FORMAT)")


def run(arguments: argparse.Namespace) -> int:
    """Export; prints what was written."""
    from radio_distill.export import format_named
    from radio_distill.export.folded import folded

    chosen = format_named(arguments.format)
    stage = stage_folder(arguments.run, arguments.stage)
    checkpoint = checkpoint_in(stage)
    logging.info("%s of %s", arguments.format, checkpoint.folder)
    student = folded(checkpoint)
    chosen.check(student)
    folder = arguments.output
    if folder is None:
        place = checkpoint.folder.parents[1] if stage == arguments.run else arguments.run
        folder = place / "export" / arguments.format
        move_aside(folder)
    print(chosen.export(student, folder))
    return 0


def stage_folder(path: Path, stage: str | None) -> Path:
    """Return the folder of a stage in a run's folder; any other path is returned as it is.

    Raises:
        ConfigError: where there is no such stage, or several of that name.
    """
    found = sorted(
        folder.parents[1].name
        for folder in path.glob("stage*/checkpoints/step-*")
        if "." not in folder.parents[1].name  # earlier runs, moved aside
    )
    names = list(dict.fromkeys(found))
    if not names and stage is None:
        return path
    if not names:
        raise ConfigError(f"--stage {stage}: {path} is not the folder of a run with checkpoints")
    wanted = stage or names[-1].partition("-")[0]
    fitting = [name for name in names if wanted in (name, name.partition("-")[0])]
    if not fitting:
        raise ConfigError(f"--stage {wanted}: {path} has no such stage ({nearest(wanted, names)})")
    if len(fitting) > 1 and wanted not in fitting:
        raise ConfigError(f"{path} has several: choose with --stage {' or '.join(fitting)}")
    return path / (wanted if wanted in fitting else fitting[0])


def checkpoint_in(folder: Path) -> "Checkpoint":
    """Open the newest checkpoint of a stage's folder, or a checkpoint's own folder."""
    from radio_distill.train.checkpoint import find

    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}; name that of a run, a stage or a checkpoint")
    return find(folder)


def move_aside(folder: Path) -> None:
    """Give an earlier export another name, with a number, so that nothing is written over it."""
    if not folder.exists():
        return
    names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
    aside = next(path for path in names if not path.exists())
    try:
        folder.rename(aside)
    except OSError as error:
        raise ExportError(f"cannot move {folder} aside: {reason_of(error)}") from error
    logging.info("moved the earlier export to %s", aside)
