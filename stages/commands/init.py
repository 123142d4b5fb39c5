"""Write a recipe to begin with: one stage, your teachers, and a word on each line.

    radio-distill init mine
    radio-distill init mine --teacher timm:vit_small_patch16_dinov3 --images ~/Images
    radio-distill init mine --teacher clip=open_clip:ViT-B-16/openai --teacher sam_h

A teacher is a preset (`radio-distill list teachers`), PRESET:WEIGHTS, or SOURCE:MODEL (see
`radio-distill list sources`), where MODEL is a name of that library or a path. NAME= before it is
what the recipe calls it.
"""

import argparse
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from radio_distill.config import TeacherConfig, yaml_line
from radio_distill.config.recipes import recipe_names
from radio_distill.errors import ConfigError
from radio_distill.system.files import reason_of
from teachers import teacher_spec
from teachers.names import named_teachers

if TYPE_CHECKING:
    from radio_distill.types import TeacherSpec

DEFAULT_TEACHER = "dino=vits14_packaged"
"""It comes with the extra `demo`."""

TEMPLATE = """\
# A recipe of your own. `radio-distill fields` lists every field, with what it does and its default.
name: {name}
data:
  # made by: {shards}
  shards: [data/{name}]
student:
  architecture: vit_small_patch16_224
  max_size: 512                 # longest side that its table of positions spans
teachers:                       # `radio-distill list sources` has what `options` can say
{teachers}
stages:
  stage1:
    steps: 10000
    partitions:                 # who is shown what: each has a size, teachers and a batch
      - {{name: low, size: 224, teachers: [{names}], batch_size: 64}}
  # A second stage goes on with the student of the first, at twice the size:
  # stage2:
  #   start_from: stage1
  #   steps: 2000
  #   partitions:
  #     - {{name: high, size: 448, teachers: [{names}], batch_size: 16}}
evaluation:
  images: {held_out:21} # a folder or shards of images that no stage saw
  every: 1000                   # steps between scores during training; 0 for none
  limit: 200                    # of these images, each time
"""
TEACHER = """\
  {name:29} # patches of {patch} px, {channels} channels; licence: {licence}
    preset: {preset}
{more}    input_size: {size:15} # {why}"""
_WHY = {"match": "the size at which its grid is the student's", "native": "it takes no other"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill init``."""
    add = parser.add_argument
    add("name", nargs="?", default="mine", help="of the recipe (default: mine)")
    add(
        "--teacher",
        action="append",
        metavar="[NAME=]TEACHER",
        help=f"preset or SOURCE:MODEL; may be given several times (default: {DEFAULT_TEACHER})",
    )
    add("--images", type=Path, metavar="DIR", help="folder of your images")
    add(
        "--hold-out",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of them that is kept for evaluation (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write ``NAME.yaml`` into this folder, and print the commands that come next."""
    name = arguments.name.removesuffix(".yaml")
    if not 0 < arguments.hold_out < 1:
        raise ConfigError(f"--hold-out: {arguments.hold_out:g} is no share between 0 and 1")
    if arguments.images is not None and not arguments.images.is_dir():
        raise ConfigError(f"--images: no folder {arguments.images}")
    path = new_file(name)
    teachers = named_teachers(arguments.teacher or [DEFAULT_TEACHER], "--teacher")
    images = "~/Images" if arguments.images is None else shlex.quote(str(arguments.images))
    shards = f"radio-distill shards {images} data/{name} --hold-out {arguments.hold_out:g}"
    write(path, recipe_text(name, teachers, shards))
    print(f"{path}: read it, change it, and then")
    for command in (shards, f"radio-distill plan {name}", f"radio-distill train {name}"):
        print(f"  {command}")
    return 0


def new_file(name: str) -> Path:
    """Return the file of a recipe to be written.

    Raises:
        ConfigError: a name that is no plain one or that the project's recipes have, or a file that
            is there.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
        raise ConfigError(f"{name!r} is no name for a recipe: use letters, digits, - and _")
    if name in recipe_names():
        raise ConfigError(f"recipe {name!r} comes with the project; choose another name")
    path = Path(f"{name}.yaml")
    if path.exists():
        raise ConfigError(f"{path} is there; choose another name, or move it")
    return path


def write(path: Path, text: str) -> None:
    """Write a new file; one that is there stays as it is."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {reason_of(error)}") from error


def recipe_text(name: str, teachers: Mapping[str, TeacherConfig], shards: str) -> str:
    """Return the text of a recipe; the teachers' sizes are measured, without their weights."""
    sections = [
        _teacher_text(teacher, config, teacher_spec(teacher, config))
        for teacher, config in teachers.items()
    ]
    return TEMPLATE.format(
        name=name,
        shards=shards,
        teachers="\n".join(sections),
        names=", ".join(teachers),
        held_out=f"data/{name}_held_out",
    )


def _teacher_text(name: str, config: TeacherConfig, spec: "TeacherSpec") -> str:
    more = ""
    if config.weights:
        more += f"    weights: {yaml_line(config.weights)}\n"
    if config.options:
        more += f"    options: {yaml_line(config.options)}\n"
    if spec.summary_channels is None:
        more += "    summary_weight: 0           # it has no summary\n"
    size = "native" if spec.fixed_size else "match"
    return TEACHER.format(
        name=f"{name}:",
        patch=spec.patch_size,
        channels=spec.channels,
        licence=spec.licence,
        preset=config.preset,
        more=more,
        size=size,
        why=_WHY[size],
    )
