"""A student as a teacher: a run of one's own, or what was exported of it, teaches the next.

Its map is the student's features and its summary the summary tokens side by side; with
``options: {head: NAME}`` both are what its head for one of its teachers says, in that teacher's
own space. ``weights`` is anything that :func:`radio_distill.load` reads.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from radio_distill.config import StudentConfig, dump, parse_yaml
from radio_distill.config import build as build_section
from radio_distill.errors import ConfigError, UnknownNameError, WeightsError
from radio_distill.loading import describe, without_data
from radio_distill.loading import load as load_student
from radio_distill.models.backbone import StudentEncoder
from radio_distill.models.heads import build_body, head_for
from radio_distill.registry import nearest
from radio_distill.types import IMAGENET_MEAN, IMAGENET_STD, Features, TeacherSpec

from ..presets import Preset

ARGUMENTS = {"head": "teacher of the student's, for its features in that teacher's space"}
_MISSING = "`weights` is missing: the student's run, checkpoint or exported folder"


class StudentTower(nn.Module):
    """Normalised pixels ``[B, 3, H, W]`` to (summary ``[B, S]`` or None, map ``[B, C, h, w]``)."""

    def __init__(self, encoder: StudentEncoder, head: str):
        super().__init__()
        self.backbone, self.head = encoder, head
        self.stated_stride, self.bands = encoder.patch_size, encoder.student.bands
        with torch.no_grad():  # pixels arrive normalised
            encoder.student.mean.zero_()
            encoder.student.std.fill_(1)
        encoder.takes_normalised = True

    def forward(self, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        if self.head:
            summary, spatial = self.backbone(pixels, (self.head,)).heads[self.head]
            return summary, spatial
        output = self.backbone(pixels)
        return output.summary if self.backbone.summary_dim else None, output.features

    def layers(self, pixels: Tensor, count: int) -> list[Features]:
        """Return the features of ``count`` of the student's blocks; a head has none of its own."""
        if self.head:
            raise ConfigError(f"head {self.head!r} reads the student's last block alone")
        return self.backbone.layers(pixels, count)


def complete(preset: Preset, weights_path: str) -> Preset:
    """Fill in what the student is, its sizes and its normalisation, from its folder."""
    if "config" in preset.arguments:
        return preset
    if not weights_path:
        raise ConfigError(_MISSING)
    head = preset.arguments.get("head", "")
    return described(preset, describe(Path(weights_path), heads=(head,) if head else ()))


def described(preset: Preset, encoder: StudentEncoder) -> Preset:
    """Fill in what a student is; pixels are looked up where the preset says nothing of them.

    Raises ConfigError for a head whose map is not of the student's grid.
    """
    student, patch, head = encoder.student, encoder.patch_size, preset.arguments.get("head", "")
    _check_head(head, encoder.teachers)
    if head and (fine := encoder.heads[head].spatial.upsample) > 1:
        raise ConfigError(
            f"options.head: {head} predicts {fine} cells a side for each of the student's, whose "
            "grid a teacher has; take another head, or none for the student's features"
        )
    arguments = {
        "head": head,
        "config": encoder.config,
        "teachers": encoder.teachers,
        "num_summary_tokens": student.num_summary_tokens,
        "summary_slots": encoder.summary_slots,
    }
    return replace(
        preset,
        arguments=arguments,
        native_size=preset.native_size or (encoder.native_size or patch) // patch * patch,
        max_size=preset.max_size or encoder.max_size,
        mean=preset.mean or tuple(student.mean.flatten().tolist()),
        std=preset.std or tuple(student.std.flatten().tolist()),
        licence=_licence(encoder) if preset.licence == "unknown" else preset.licence,
    )


def preset_of_stage(
    preset: Preset, student: StudentConfig, specs: Mapping[str, TeacherSpec], native_size: int
) -> Preset:
    """Fill in what the student of an earlier stage of the same recipe is, before it is trained.

    Pixels are taken to be normalised as for ImageNet, which decides nothing before weights that say
    so themselves are there.

    Args:
        preset: that the recipe names, with its options.
        student: the student's section.
        specs: of the student's own teachers, by name.
        native_size: largest side that it is trained at, in pixels.
    """
    encoder = _untrained(dump(student.plain), tuple(specs.values()), native_size)
    head = specs.get(preset.arguments.get("head", ""))
    mean, std = preset.mean or student.mean, preset.std or student.std
    pixels = replace(preset, mean=mean or IMAGENET_MEAN, std=std or IMAGENET_STD)
    return replace(
        described(pixels, encoder),
        patch_size=encoder.patch_size,
        channels=head.channels if head else encoder.embed_dim,
        summary_channels=head.summary_channels if head else encoder.summary_dim or None,
        fixed_size=encoder.student.fixed_size is not None,
    )


@lru_cache(maxsize=8)
def _untrained(config: str, specs: tuple[TeacherSpec, ...], native_size: int) -> StudentEncoder:
    """Build a student, of its section as YAML, without data: a large one takes seconds."""
    student = build_section(StudentConfig, parse_yaml(config))
    return without_data(student, {spec.name: spec for spec in specs}, native_size)


def build(preset: Preset) -> StudentTower:
    """Build the student with random weights."""
    arguments = preset.arguments
    config, teachers = arguments["config"], arguments.get("teachers", {})
    head = arguments.get("head", "")
    _check_head(head, teachers)
    student = build_body(config, arguments["num_summary_tokens"])
    heads = {}
    if head:
        heads[head] = head_for(student, teachers[head], config)
    return StudentTower(
        StudentEncoder(student, config, teachers, heads, arguments["summary_slots"]), head
    )


def locate(preset: Preset) -> Path:
    """Refuse: no hub has students of one's own."""
    raise WeightsError(_MISSING)


def load(preset: Preset, path: Path) -> StudentTower:
    """Load the student in ``path``, its matrices folded."""
    head = preset.arguments.get("head", "")
    return StudentTower(load_student(path, heads=(head,) if head else ()), head)


def _check_head(head: str, teachers: Mapping[str, TeacherSpec]) -> None:
    if head and head not in teachers:
        hint = nearest(head, list(teachers)) if teachers else "it has none"
        raise UnknownNameError(f"options.head: the student has no head {head!r} ({hint})")


def _licence(encoder: StudentEncoder) -> str:
    licences = [f"{name} ({spec.licence})" for name, spec in encoder.teachers.items()]
    return f"student of: {', '.join(licences)}" if licences else "unknown"
