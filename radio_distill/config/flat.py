"""A recipe as a flat table of fields, and which of them do not change what a student becomes."""

from collections.abc import Sequence
from typing import Any

from ..system.nested import leaves, plain_data
from .schema import Recipe

NO_NUMBER = (
    "output", "log", "watch", "evaluation", "normalizer.cache",
    "data.index", "data.workers", "data.max_bad_share", "data.max_bad_shards", "data.read_timeout",
    "data.cache", "data.cache_gb", "data.commands",
)  # fmt: skip
"""Fields, or sections, that change no number of a run."""
ROUNDING = (
    "engine.name", "engine.zero_stage", "engine.micro_batch", "engine.device", "engine.compile",
    "engine.deterministic", "engine.float32_matmul", "student.gradient_checkpointing",
    "teachers.*.micro_batch", "stages.*.upsampler.micro_batch",
)  # fmt: skip
"""Fields that change how sums are rounded, and nothing else."""
WITHOUT_EFFECT = (
    *NO_NUMBER, *ROUNDING, "name", "seed", "fit",
    "teachers.*.weights", "teachers.*.stage", "teachers.*.sha256", "stages.*.upsampler.weights",
    "stages.*.partitions.*.name", "stages.*.partitions.*.ranks",
)  # fmt: skip
"""Fields, or sections, that say how a student is trained and not what it becomes."""


def is_within(path: Sequence[str], fields: Sequence[str]) -> bool:
    """Return whether a field is one of some, or within one; ``*`` stands for any one name."""
    patterns = [field.split(".") for field in fields]
    return any(
        matches(pattern, path[: len(pattern)]) for pattern in patterns if len(pattern) <= len(path)
    )


def flat_fields(recipe: Recipe) -> dict[tuple[str, ...], Any]:
    """Return every field by its path; partitions go by their names.

    ``stages.NAME.images_per_step`` is added, the sum of the batches.
    """
    fields = plain_data(recipe)
    for name, stage in recipe.stages.items():
        fields["stages"][name]["images_per_step"] = stage.images_per_step
    return dict(leaves(fields, "named"))


def matches(pattern: Sequence[str], path: Sequence[str]) -> bool:
    """Return whether a path is meant by a pattern, in which ``*`` stands for any one name."""
    pairs = zip(pattern, path, strict=False)
    return len(pattern) == len(path) and all(key in ("*", name) for key, name in pairs)
