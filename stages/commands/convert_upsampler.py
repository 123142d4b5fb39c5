"""Make a fitted upsampler of a checkpoint of FeatUp's or FeatSharp's own program.

    radio-distill convert-upsampler featup dinov2_jbu_stack_cocostuff.ckpt --teacher dino
    radio-distill convert-upsampler featsharp last.pth.tar mine --teacher siglip

The checkpoint does not say whose features it was fitted to: that is the teacher you name. FeatUp's
files must be those of its folder ``no_norm``: the others live in features after a LayerNorm, from
which there is no way back to the teacher's space. A
checkpoint that holds code is refused unless it is trusted.
"""

import argparse
from typing import TYPE_CHECKING

from radio_distill.stage import FIT, resolve_stage

from ..arguments import add_recipe_argument, add_trust_argument, check_output
from ..fit_upsampler import fit_recipe
from ..fits import FITTED, fit_folder
from ..recipes import load_recipe

if TYPE_CHECKING:
    from radio_distill.types import Size, TeacherSpec
    from upsamplers.convert import Converted
    from upsamplers.fitted_files import FittedHeader

TAKES_FIELDS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_trust_argument(parser)
    add = parser.add_argument
    add("program", choices=("featup", "featsharp"), help="whose checkpoint it is")
    add("checkpoint", help="the file")
    add_recipe_argument(parser)
    add("--teacher", metavar="NAME", help="the teacher that it was fitted to")
    add("--output", metavar="FILE", help="(default: where stage 3 of the recipe looks for it)")


def run(arguments: argparse.Namespace) -> int:
    """Convert, check against the teacher, write; prints the file."""
    from dataclasses import replace

    import torch

    from teachers import build_teacher
    from upsamplers import convert
    from upsamplers.fitted import assemble, save_model

    named = [f"fit.teacher={arguments.teacher}"] if arguments.teacher else []
    recipe = fit_recipe(load_recipe(arguments.recipe, [*named, *arguments.fields]))
    made = getattr(convert, f"convert_{arguments.program}")(arguments.checkpoint)
    config = replace(recipe.fit, upsampler=made.network_name, factor=made.factor)
    path = arguments.output or fit_folder(recipe, replace(config, options=made.options)) / FITTED
    check_output(path)
    name = recipe.fit.teacher
    teacher = build_teacher(name, recipe.teachers[name], torch.device("cpu"))
    stage = resolve_stage(recipe, FIT, {name: teacher.spec})
    header = header_of(made, teacher.spec, stage.partitions[0].sizes[0])
    model = assemble(header, made.tensors, made.normalizer_state or {}, made.de_bias)
    save_model(path, model, header)
    print(path)
    return 0


def header_of(made: "Converted", spec: "TeacherSpec", size: "Size") -> "FittedHeader":
    """Return the header of a converted checkpoint.

    Raises WeightsError where the teacher has another number of channels.
    """
    from radio_distill.errors import WeightsError
    from upsamplers.fitted_files import FittedHeader

    if made.channels != spec.channels:
        raise WeightsError(
            f"the checkpoint upsamples {made.channels} channels, teacher {spec.name!r} has "
            f"{spec.channels}; name the teacher that it was fitted to with --teacher"
        )
    return FittedHeader(
        upsampler=made.network_name,
        teacher=spec.name,
        weights_hash=spec.weights_hash,
        channels=made.channels,
        factor=made.factor,
        size=size,
        options=made.options,
        normalizer="none" if made.normalizer_state is None else "phi_s",
    )
