"""A student as a teacher: a run of one's own, or what was exported of it, teaches the next.

Its map is the student's features and its summary the summary tokens side by side; with
``options: {adaptor: NAME}`` both are what its head for one of its teachers says, in that teacher's
own space. ``weights`` is anything that :func:`radio_distill.load` reads.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from radio_distill.errors import ConfigError, WeightsError
from radio_distill.loading import load as load_student
from radio_distill.models.backbone import StudentEncoder
from radio_distill.models.heads import Head
from radio_distill.models.student import Student

from ..presets import Preset

ARGUMENTS = {"adaptor": "teacher of the student's, for its features in that teacher's space"}
_MISSING = "`weights` is missing: the student's run, checkpoint or exported folder"


class StudentTower(nn.Module):
    """Normalised pixels ``[B, 3, H, W]`` to (summary ``[B, S]`` or None, map ``[B, C, h, w]``)."""

    def __init__(self, encoder: StudentEncoder, adaptor: str):
        super().__init__()
        self.backbone, self.adaptor = encoder, adaptor
        with torch.no_grad():  # pixels arrive normalised
            encoder.student.mean.zero_()
            encoder.student.std.fill_(1)
        encoder.takes_normalised = True

    def forward(self, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        if self.adaptor:
            summary, spatial = self.backbone(pixels, (self.adaptor,)).heads[self.adaptor]
            return summary, spatial
        output = self.backbone(pixels)
        return output.summary if self.backbone.summary_dim else None, output.features


def complete(preset: Preset, weights_path: str) -> Preset:
    """Fill in what the student is, its sizes and its normalisation, from its folder."""
    if "config" in preset.arguments:
        return preset
    if not weights_path:
        raise ConfigError(_MISSING)
    adaptor = preset.arguments.get("adaptor", "")
    encoder = _load(Path(weights_path), adaptor)
    student, patch = encoder.student, encoder.patch_size
    arguments = {
        "adaptor": adaptor,
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


def build(preset: Preset) -> StudentTower:
    """Build the student with random weights."""
    arguments = preset.arguments
    config, teachers = arguments["config"], arguments.get("teachers", {})
    adaptor = arguments.get("adaptor", "")
    student = Student(config, arguments["num_summary_tokens"])
    heads = {}
    if adaptor:
        heads[adaptor] = Head(student.embed_dim, teachers[adaptor], config)
    return StudentTower(
        StudentEncoder(student, config, teachers, heads, arguments["summary_slots"]), adaptor
    )


def locate(preset: Preset) -> Path:
    """Refuse: no hub has students of one's own."""
    raise WeightsError(_MISSING)


def load(preset: Preset, path: Path) -> StudentTower:
    """Load the student in ``path``, its matrices folded."""
    adaptor = preset.arguments.get("adaptor", "")
    return StudentTower(_load(path, adaptor), adaptor)


def _load(path: Path, adaptor: str) -> StudentEncoder:
    return load_student(path, heads=(adaptor,) if adaptor else ())


def _licence(encoder: StudentEncoder) -> str:
    licences = [f"{name} ({spec.licence})" for name, spec in encoder.teachers.items()]
    return f"student of: {', '.join(licences)}" if licences else "unknown"
