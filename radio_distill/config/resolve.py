"""Fields that are `auto` get plain values: once, when a stage or a fit starts.

What :func:`resolve` returns is what is written into the run folder and into checkpoints, and what
everything after the start reads. A run that is resumed keeps what its checkpoint says, so that it
goes on with the same numbers whatever machine it is on; see :func:`keep_resolved`.
"""

from dataclasses import dataclass, is_dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from .schema import EngineConfig, NormalizerConfig, Recipe, StageConfig

AUTO = "auto"

KEPT = ("normalizer.images", "stages.*.freeze_body_steps")
"""Fields whose `auto` keeps, in a run that is resumed, what it was resolved to before.

Not among them: engine.zero_stage, which follows from the optimizer and changes no number but by
rounding; engine.name and engine.device, which stay `auto` in a run folder, for each start chooses.
"""

MOST_STATISTICS = 3_072_000
"""Images of a stage's statistics at most: 3,000 steps of 1,024 images (PHI-S paper, Table 10)."""
MOST_FIT_STATISTICS = 100_000
"""The same before an upsampler is fitted (FeatSharp, section 3.2)."""
_LEAST_STATISTICS = 1024  # some 200,000 tokens: enough for a covariance of thousands of channels
_STATISTICS_SHARE = 10  # a tenth of the images, without the student: a few hundredths of the time

_FROZEN, _FROZEN_SHARE = 5000, 60  # PHI-S paper, Table 10: 5,000 of 300,000 steps


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known when a stage or a fit starts, and decides what `auto` means."""

    images_shown: int
    """Images that it shows, over all its steps and processes."""
    images_in_shards: int | None = None
    """Images of the data set; None where the shards are not looked at (`plan`)."""


def resolve(recipe: Recipe, stage: str, facts: Facts, earlier: Recipe | None = None) -> Recipe:
    """Return the recipe with plain values for every `auto` that matters to a stage.

    Args:
        recipe: as a person wrote it.
        stage: name of a stage of the recipe, or ``fit``, for which the recipe has no stage.
        facts: what is known at the start.
        earlier: the resolved recipe of the checkpoint that the run goes on from.
    """
    if earlier is not None:
        recipe = keep_resolved(recipe, earlier)
    stages = dict(recipe.stages)
    if stage in stages:
        stages[stage] = _resolve_stage(stages[stage], recipe)
    return replace(
        recipe,
        normalizer=_resolve_normalizer(recipe.normalizer, facts, fit=stage not in stages),
        stages=stages,
        engine=_resolve_engine(recipe.engine, stages.get(stage)),
    )


def _resolve_stage(stage: StageConfig, recipe: Recipe) -> StageConfig:
    if stage.freeze_body_steps != AUTO:
        return stage
    has_start = bool(stage.start_from or recipe.student.pretrained)
    # Heads that were not trained yet would pull a trained body away; a random body has nothing to
    # lose. A stage that starts from another carries its heads over, and a short freeze does.
    frozen = min(_FROZEN, stage.steps // _FROZEN_SHARE) if has_start else 0
    return replace(stage, freeze_body_steps=frozen)


def _resolve_normalizer(normalizer: NormalizerConfig, facts: Facts, fit: bool) -> NormalizerConfig:
    if normalizer.images != AUTO:
        return normalizer
    if fit:
        images = min(facts.images_shown, MOST_FIT_STATISTICS)
    else:
        tenth = max(facts.images_shown // _STATISTICS_SHARE, _LEAST_STATISTICS)
        images = min(tenth, facts.images_shown, MOST_STATISTICS)
    if facts.images_in_shards is not None:
        images = min(images, facts.images_in_shards)
    return replace(normalizer, images=images)


def _resolve_engine(engine: EngineConfig, stage: StageConfig | None) -> EngineConfig:
    if engine.zero_stage != AUTO:
        return engine
    # LAMB needs the norms of whole parameters, which ZeRO flattens and cuts up.
    zero_stage: Literal[0, 1] = 0 if stage is not None and stage.optimizer == "lamb" else 1
    return replace(engine, zero_stage=zero_stage)


def keep_resolved(recipe: Recipe, earlier: Recipe) -> Recipe:
    """Return the recipe with what an earlier one says wherever it says `auto` itself.

    Only fields of :data:`KEPT` are looked at; one that is `auto` in both stays so.
    """
    kept: Recipe = _keep(recipe, earlier, "")
    return kept


def _keep(value: Any, earlier: Any, path: str) -> Any:
    if value == AUTO and any(fnmatchcase(path, field) for field in KEPT):
        return value if earlier is None else earlier
    if isinstance(value, dict) and isinstance(earlier, dict):
        return {key: _keep(item, earlier.get(key), f"{path}.{key}") for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type) and type(value) is type(earlier):
        names = value.__dataclass_fields__
        prefix = f"{path}." if path else ""
        changes = {
            name: _keep(getattr(value, name), getattr(earlier, name), prefix + name)
            for name in names
        }
        return replace(value, **changes)
    return value
