"""A student that an earlier stage of the same recipe trains, as a teacher: known before it is.

What it is follows from that stage's section: planning a chain needs none of its weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from radio_distill.config import StudentConfig, build, dump, parse_yaml
from radio_distill.loading import without_data
from radio_distill.models.backbone import StudentEncoder
from radio_distill.types import IMAGENET_MEAN, IMAGENET_STD, TeacherSpec

from .presets import Preset
from .sources.student import described


def preset_of(
    preset: Preset, student: StudentConfig, specs: Mapping[str, TeacherSpec], native_size: int
) -> Preset:
    """Fill in what a student is.

    Pixels are taken to be normalised as for ImageNet, which decides nothing before weights that say
    so themselves are there.

    Args:
        preset: that the recipe names, with its options.
        student: the student's section.
        specs: of the student's own teachers, by name.
        native_size: largest side that it is trained at, in pixels.
    """
    encoder = _encoder(dump(student.plain), tuple(specs.values()), native_size)
    head = specs.get(preset.arguments.get("head", ""))
    return replace(
        described(
            replace(
                preset,
                mean=preset.mean or student.mean or IMAGENET_MEAN,
                std=preset.std or student.std or IMAGENET_STD,
            ),
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
    return without_data(student, teachers, native_size)
