"""What a score is of: the run, the stage and the step of a student, and a digest of its training.

Two students are seeds of one model where these digests are equal and their seeds are not. Digests
are of what is set away from its default alone, so that a field that a later version adds is none of
them: what was scored before is compared with what is scored after.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.flat import WITHOUT_EFFECT, is_within
from ..system.nested import leaves, plain_data
from ..train.checkpoint import Checkpoint
from ..types import TeacherSpec
from .subjects import MODEL, TEACHER, UNTRAINED, Subject

_MAY_DIFFER = (
    *WITHOUT_EFFECT,
    *("data.shards", "data.curation"),  # they have a fingerprint
    "stages.*.student",  # a checkpoint's recipe has one student, in its own section
)
"""Fields in which seeds of one model may differ."""


def run_folder(checkpoint: Checkpoint) -> Path:
    """Return the folder that a run lies in now, whatever its recipe says."""
    parents = checkpoint.folder.absolute().parents
    return parents[2] if parents[0].name == "checkpoints" else parents[0]


def student_subject(checkpoint: Checkpoint, name: str = "") -> Subject:
    """Say whose scores those of a checkpoint's student are; ``name`` is a label of the user's."""
    folder, recipe = checkpoint.folder.absolute(), checkpoint.recipe
    inside = folder.parent.name == "checkpoints"
    stage = folder.parents[1].name if inside else recipe.stage_folder(checkpoint.stage).name
    return Subject(
        folder=str(run_folder(checkpoint).resolve()),
        stage=stage,
        step=checkpoint.step,
        seed=recipe.seed,
        recipe=training_digest(checkpoint),
        weights=checkpoint.weights_sha256,
        name=name,
    )


def untrained_subject(checkpoint: Checkpoint) -> Subject:
    """Say whose scores those of a checkpoint's untrained student are."""
    recipe = checkpoint.recipe
    digest = _digest([recipe.student, recipe.seed, checkpoint.teachers])
    return Subject(
        folder=str(run_folder(checkpoint).resolve()),
        seed=recipe.seed,
        weights=digest,
        reference=UNTRAINED,
    )


def teacher_subject(checkpoint: Checkpoint, teacher: str) -> Subject:
    """Say whose scores those of a teacher of a checkpoint's recipe are."""
    return Subject(
        folder=str(run_folder(checkpoint).resolve()),
        weights=teacher_digest(checkpoint, teacher),
        reference=f"{TEACHER} {teacher}",
    )


def model_subject(
    name: str, text: str, folder: Path, spec: TeacherSpec, parts: Sequence[Any]
) -> Subject:
    """Say whose scores those of a model are that was named without a run.

    Args:
        name: what tables call it.
        text: what it is, as the user wrote it.
        folder: where its scores lie.
        spec: what it is; its name there does not matter.
        parts: what else decides its features: weights, options, an upsampler.
    """
    return Subject(
        folder=str(folder.resolve()),
        weights=_digest([replace(spec, name=""), *parts]),
        reference=f"{MODEL} {text}",
        name=name,
    )


def teacher_digest(checkpoint: Checkpoint, teacher: str) -> str:
    """Return a digest of a teacher: its weights and how they are used, but for their precision."""
    config, spec = checkpoint.recipe.teachers[teacher], checkpoint.teachers[teacher]
    weights = spec.weights_hash or config.weights
    return _digest([config.preset, weights, config.options, spec])


def training_digest(checkpoint: Checkpoint) -> str:
    """Return a digest of the recipe of a student, of its teachers' weights and of its images.

    Left out are the seed, names and places, what is logged and scored, how work is dealt to
    processes, and stages that did not lead to this one.
    """
    recipe = checkpoint.recipe
    stages = recipe.stages_before(checkpoint.stage)
    fields = {
        ".".join(path): value
        for path, value in leaves(plain_data(recipe, defaults=False), "named")
        if not is_within(path, _MAY_DIFFER) and (path[0] != "stages" or path[1] in stages)
    }
    # Files that nothing but their path tells apart.
    teachers = {
        name: config.weights
        for name, config in recipe.teachers.items()
        if config.weights and not checkpoint.teachers[name].weights_hash
    }
    upsamplers = {
        f"{stage}.{name}": path
        for stage in stages
        for name, path in recipe.stages[stage].upsampler.weights.items()
        if name not in recipe.stages[stage].upsampler.sha256
    }
    return _digest(
        [
            checkpoint.stage,
            fields,
            checkpoint.teachers,
            [teachers, upsamplers],
            checkpoint.shards or list(recipe.data.shards),
            *checkpoint.origin.changed,
        ]
    )


def _digest(parts: list[Any]) -> str:
    text = json.dumps(plain_data(parts, defaults=False), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
