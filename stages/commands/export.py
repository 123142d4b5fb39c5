"""Write a trained student so that other libraries load it.

    radio-distill export runs/demo --format transformers
    radio-distill export runs/demo --stage stage3-tile --format onnx --output student

Everything that only training needs is folded away, so that each head predicts in its teacher's own
space. All formats but radio, whose reader is not ours to install, are read back and compared with
the student before they are kept.
"""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radio_distill.errors import ConfigError, ExportError
from radio_distill.export import FORMATS, format_named
from radio_distill.registry import nearest
from radio_distill.system.files import move_aside, reason_of, refuse_unreadable

from ..arguments import add_trust_argument, check_output, joined_size, size_of

if TYPE_CHECKING:
    from radio_distill.export.write import Format


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_trust_argument(parser)
    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    add = parser.add_argument
    add("run", type=Path, help="folder of a run, a stage, or a single checkpoint")
    add("--format", metavar="NAME", required=True, help=formats)
    add("--stage", metavar="NAME", help="stage of the run (default: the last one trained)")
    add("--size", metavar="PX", type=size_of, nargs="+", help="timm: a plain ViT of this size only")
    add("--heads", metavar="TEACHER", nargs="+", default=[], help="onnx: heads to export too")
    add("--output", metavar="DIR", type=Path, help="new folder (default: RUN/export/FORMAT)")


def run(arguments: argparse.Namespace) -> int:
    """Export; prints what was written."""
    from radio_distill.export.folded import folded
    from radio_distill.export.write import export
    from radio_distill.weights.files import find_checkpoint

    form = format_of(arguments)
    path = stage_of_run(arguments.run, arguments.stage) if arguments.stage else arguments.run
    checkpoint = find_checkpoint(path)
    logging.info("%s of %s", arguments.format, checkpoint.folder)
    folder = arguments.output
    if folder is None:
        # A checkpoint's own folder is no place: it is deleted when newer ones come.
        inside = arguments.run in checkpoint.folder.parents
        place = arguments.run if inside else checkpoint.folder.parents[1]
        folder = place / "export" / arguments.format
    check_output(folder, is_folder=True)
    student = folded(checkpoint)
    form.for_student(student).check(student)
    with making_room(folder) if arguments.output is None else nullcontext():
        path = export(student, folder, form)
    print(path)
    return 0


def format_of(arguments: argparse.Namespace) -> "Format":
    """Return the format with its options; raises ConfigError for an option of another format."""
    options: dict[str, Any] = {}
    for option, its_format in (("size", "timm"), ("heads", "onnx")):
        value = getattr(arguments, option)
        if value and arguments.format in FORMATS and arguments.format != its_format:
            raise ConfigError(
                f"--{option} is for --format {its_format}; leave it out for {arguments.format}"
            )
        if value:
            options[option] = joined_size(value, "--size") if option == "size" else value
    return format_named(arguments.format, **options)


def stage_of_run(folder: Path, stage: str) -> Path:
    """Return the folder of a run's stage; raises ConfigError where there is none of that name."""
    refuse_unreadable(folder, ConfigError)
    names = [path.parent.name for path in folder.glob("*/checkpoints")]
    if stage not in names:
        refuse_unreadable(folder / stage / "checkpoints", ConfigError)
    if not names:
        raise ConfigError(f"--stage {stage}: {folder} is not the folder of a run")
    if stage not in names:
        raise ConfigError(f"--stage {stage}: {folder} has no such stage ({nearest(stage, names)})")
    return folder / stage


@contextmanager
def making_room(folder: Path) -> Iterator[None]:
    """Move an earlier export aside, so that nothing is written over it; back where it fails."""
    if not folder.exists():
        yield
        return
    try:
        aside = move_aside(folder)
    except OSError as error:
        raise ExportError(f"cannot move {folder} aside: {reason_of(error)}") from error
    try:
        yield
    except BaseException:
        aside.rename(folder)
        raise
    logging.info("moved the earlier export to %s", aside)
