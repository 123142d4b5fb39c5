"""Students and teachers as encoders under test, and their scores.

An untrained student has the architecture and heads of a trained one and random weights: what any
student is measured against.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from radio_distill.config import EvaluationConfig, PartitionConfig, Recipe
from radio_distill.data.folder import load_images
from radio_distill.distill.targets import TargetMaker
from radio_distill.errors import ConfigError
from radio_distill.evals.fidelity import fidelity
from radio_distill.evals.harness import Encoder, evaluate, size_text
from radio_distill.models.distilled import DistilledStudent, build_student
from radio_distill.protocols import Teacher
from radio_distill.system.progress import Progress
from radio_distill.train.checkpoint import Checkpoint
from radio_distill.train.restore import normalizers_of
from radio_distill.types import Features, Score
from upsamplers.methods.interpolate import Bilinear

from ..build import build_teachers
from .subjects import teacher_digest

Report = Callable[[str, int, int], None]


def student_encoder(
    model: DistilledStudent, checkpoint: Checkpoint, device: torch.device
) -> Encoder:
    """Present a student as an encoder.

    Its summary is, side by side, the summary tokens of those teachers that have a summary. It takes
    any size, as the loaded student does: above ``student.max_size`` its positions are stretched.
    """
    with_summary = [
        slot
        for slot, name in enumerate(model.adaptors)
        if checkpoint.teachers[name].summary_channels is not None
    ]

    def encode(pixels: Tensor) -> Features:
        tokens, spatial = model.student(pixels)  # [B, T, D], [B, D, h, w]
        summary = tokens[:, with_summary].flatten(1) if with_summary else None
        return Features(summary, spatial)

    config = checkpoint.recipe.student
    multiple = config.patch_size * max(config.window_size, 1)
    return Encoder("student", encode, multiple, device)


def teacher_encoder(teacher: Teacher, device: torch.device) -> Encoder:
    """Present a teacher as an encoder."""
    spec = teacher.spec
    fixed = spec.native_size if spec.fixed_size else None
    return Encoder(spec.name, teacher.encode, spec.patch_size, device, spec.max_size, fixed)


def teacher_encoders(recipe: Recipe, device: torch.device) -> list[Encoder]:
    """Build a recipe's teachers and present them as encoders named ``teacher NAME``."""
    encoders = (teacher_encoder(item, device) for item in build_teachers(recipe, device).values())
    return [replace(encoder, name=f"teacher {encoder.name}") for encoder in encoders]


def untrained_student(checkpoint: Checkpoint, device: torch.device) -> DistilledStudent:
    """Build the student of a checkpoint as it was before any training."""
    torch.manual_seed(checkpoint.recipe.seed)
    model = build_student(checkpoint.recipe.student, checkpoint.teachers)
    return model.to(device).eval()


def score_teacher(teacher: Teacher, config: EvaluationConfig, device: torch.device) -> list[Score]:
    """Score a teacher on the benchmarks that ask one encoder; all but fidelity."""
    with _bars(teacher.spec.name) as report:
        return evaluate(teacher_encoder(teacher, device), config, report)


def score_student(
    model: DistilledStudent,
    checkpoint: Checkpoint,
    config: EvaluationConfig,
    teachers: dict[str, Teacher],
    device: torch.device,
    label: str,
) -> list[Score]:
    """Score a student on every benchmark of ``config``, fidelity to its teachers included."""
    scores = []
    with _bars(label) as report:
        if "fidelity" in config.benchmarks:
            scores += _fidelity(model, checkpoint, config, teachers, device, report)
        scores += evaluate(student_encoder(model, checkpoint, device), config, report)
    return scores


def _fidelity(
    model: DistilledStudent,
    checkpoint: Checkpoint,
    config: EvaluationConfig,
    teachers: dict[str, Teacher],
    device: torch.device,
    report: Report,
) -> list[Score]:
    """Compare the heads with the teachers on held-out images, in the student's target space."""
    if not config.images:
        raise ConfigError(
            "evaluation.images: fidelity needs held-out images; name a folder or shards, or "
            "drop fidelity from evaluation.benchmarks"
        )
    names, size = tuple(checkpoint.recipe.teachers), (config.size, config.size)
    targets = _targets_of(checkpoint, teachers)
    partition = PartitionConfig(name="evaluation", size=config.size, teachers=names, batch_size=1)
    images = [image for _, image in load_images(config.images, config.limit or None)]
    scores = fidelity(
        lambda pixels: model(pixels, names),
        lambda views: targets(views, partition),
        images,
        size,
        [targets.size(name, partition, size) for name in names],
        device=device,
        progress=lambda done, total: report("fidelity", done, total),
    )
    against = {name: teacher_digest(checkpoint, name) for name in names}
    return [
        replace(score, pixels=size_text(size), against=against[score.metric.partition("/")[2]])
        for score in scores
    ]


def _targets_of(checkpoint: Checkpoint, teachers: dict[str, Teacher]) -> TargetMaker:
    """Give the teachers as they are, whatever a student learned from: one yardstick for all."""
    recipe = checkpoint.recipe
    return TargetMaker(
        teachers,
        recipe.teachers,
        Bilinear(factor=1),
        normalizers_of(checkpoint),
        recipe.student.patch_size,
    )


@contextmanager
def _bars(label: str) -> Iterator[Report]:
    """Give a callback that shows a progress bar for one benchmark after another."""
    current: list[tuple[str, Progress]] = []

    def close() -> None:
        for _, bar in current:
            bar.__exit__(None, None, None)
        current.clear()

    def report(benchmark: str, done: int, total: int) -> None:
        if not current or current[0][0] != benchmark:
            close()
            current.append((benchmark, Progress(f"{label}: {benchmark}", total).__enter__()))
        current[0][1].update(done)

    try:
        yield report
    finally:
        close()
