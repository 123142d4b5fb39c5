"""Students and teachers of checkpoints as encoders under test, and their scores.

An untrained student has the architecture and heads of a trained one and random weights: what any
student is measured against.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from radio_distill.config import EvaluationConfig, Recipe
from radio_distill.evals.encoder import Encoder, Target, student_encoder, teacher_encoder
from radio_distill.evals.fidelity import targets_of
from radio_distill.evals.run import evaluate
from radio_distill.models.backbone import as_encoder
from radio_distill.models.heads import DistilledStudent, build_student
from radio_distill.protocols import Teacher
from radio_distill.system.progress import Progress
from radio_distill.train.checkpoint import Checkpoint
from radio_distill.train.restore import load_student, normalizers_of
from radio_distill.types import Score
from radio_distill.weights.pretrained import initialise

from ..build import build_teachers
from .subjects import teacher_digest

Report = Callable[[str, int, int], None]


def encoder_of(
    checkpoint: Checkpoint,
    device: torch.device,
    name: str = "student",
    untrained: bool = False,
    targets: Mapping[str, Target] | None = None,
) -> Encoder:
    """Load the student of a checkpoint, or build it as it was before any training."""
    model = untrained_student(checkpoint) if untrained else load_student(checkpoint, device)
    encoder = as_encoder(model, checkpoint.recipe.student, checkpoint.teachers)
    return student_encoder(encoder.to(device).eval(), device, targets, name)


def untrained_student(checkpoint: Checkpoint) -> DistilledStudent:
    """Build the student of a checkpoint as it was before any training."""
    torch.manual_seed(checkpoint.recipe.seed)
    config, teachers = checkpoint.recipe.student, checkpoint.teachers
    return build_student(config, teachers, initialise=initialise)


def teacher_encoders(recipe: Recipe, device: torch.device) -> list[Encoder]:
    """Build a recipe's teachers and present them as encoders named ``teacher NAME``."""
    teachers = build_teachers(recipe, device).values()
    return [teacher_encoder(one, device, f"teacher {one.spec.name}") for one in teachers]


def targets_for(
    checkpoint: Checkpoint, config: EvaluationConfig, teachers: Mapping[str, Teacher]
) -> dict[str, Target]:
    """Return the teachers that a student's heads are compared with; none where nobody asks."""
    if "fidelity" not in config.benchmarks:
        return {}
    recipe = checkpoint.recipe
    return targets_of(
        teachers,
        recipe.teachers,
        config.size,
        recipe.student.patch_size,
        normalizers_of(checkpoint),
        {name: teacher_digest(checkpoint, name) for name in recipe.teachers},
    )


def score(encoder: Encoder, config: EvaluationConfig, label: str) -> list[Score]:
    """Score an encoder, with a progress bar for each benchmark."""
    with _bars(label) as report:
        return evaluate(encoder, config, report)


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
