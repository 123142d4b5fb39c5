"""A student that an earlier stage of the same recipe trains, as a teacher: known before it is.

What it is follows from that stage's section: planning a chain needs none of its weights.
"""

from dataclasses import replace
from functools import lru_cache

import torch

from radio_distill.config import Recipe, StudentConfig, build, dump, for_stage, parse_yaml
from radio_distill.models.backbone import StudentEncoder, as_encoder
from radio_distill.models.heads import build_student
from radio_distill.types import IMAGENET_MEAN, IMAGENET_STD, TeacherSpec

from .presets import Preset
from .sources.student import described


def preset_of(preset: Preset, recipe: Recipe, stage: str) -> Preset:
    """Fill in what the student of a stage is.

    Pixels are taken to be normalised as for ImageNet, which decides nothing before weights that say
    so themselves are there.

    Raises as the parts of that stage do.
    """
    from . import teacher_specs

    part, specs = for_stage(recipe, stage), teacher_specs(recipe, stage)
    size = max(part.stages[stage].largest_size)
    encoder = _encoder(dump(part.student.plain), tuple(specs.values()), size)
    head = specs.get(preset.arguments.get("head", ""))
    return replace(
        described(
            replace(preset, mean=preset.mean or IMAGENET_MEAN, std=preset.std or IMAGENET_STD),
            encoder,
        ),
        patch_size=encoder.patch_size,
        channels=head.channels if head else encoder.embed_dim,
        summary_channels=head.summary_channels if head else encoder.summary_dim or None,
        fixed_size=encoder.student.fixed_size is not None,
    )


@lru_cache(maxsize=8)
def _encoder(config: str, specs: tuple[TeacherSpec, ...], native_size: int) -> StudentEncoder:
    """Build a student, of its section as YAML, without data: a large one takes seconds."""
    student = build(StudentConfig, parse_yaml(config))
    teachers = {spec.name: spec for spec in specs}
    with torch.device("meta"):
        return as_encoder(build_student(student, teachers), student, teachers, native_size)
