"""A student that an earlier stage of the same recipe trains, as a teacher: known before it is.

What it is follows from that stage's section: planning a chain needs none of its weights.
"""

from dataclasses import replace

import torch

from radio_distill.config import Recipe, for_stage
from radio_distill.models.backbone import as_encoder
from radio_distill.models.heads import build_student
from radio_distill.types import IMAGENET_MEAN, IMAGENET_STD

from .measuring import measured
from .presets import Preset
from .sources import student


def described(preset: Preset, recipe: Recipe, stage: str) -> Preset:
    """Fill in what the student of a stage is.

    Pixels are taken to be normalised as for ImageNet, which decides nothing before weights that say
    so themselves are there.

    Raises as the parts of that stage do.
    """
    from . import teacher_specs

    part, specs = for_stage(recipe, stage), teacher_specs(recipe, stage)
    config, largest = part.student.plain, max(part.stages[stage].largest_size)
    with torch.device("meta"):
        encoder = as_encoder(build_student(config, specs), config, specs, largest)
    plain = replace(preset, mean=preset.mean or IMAGENET_MEAN, std=preset.std or IMAGENET_STD)
    return measured(student.described(plain, encoder), student.build)
