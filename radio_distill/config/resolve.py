"""Fields that are `auto` get plain values: once, when a stage or a fit starts.

What :func:`resolve` returns is what is written into the run folder and into checkpoints, and what
everything after the start reads. A run that is resumed keeps what its checkpoint says, so that it
goes on with the same numbers whatever machine it is on; see :func:`keep_resolved`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from .objective import NormalizerConfig
from .schema import (
    DataConfig,
    EngineConfig,
    FitConfig,
    LogConfig,
    Recipe,
    StageConfig,
)

AUTO = "auto"

KEPT = (
    "normalizer.images",
    "stages.*.freeze_body_steps",
    "fit.warmup_steps",
    "teachers.*.dtype",
    "engine.precision",
)
"""Fields whose `auto` keeps, in a run that is resumed, what it was resolved to before."""

CHOSEN_ANEW = (
    "data.index", "data.workers", "engine.zero_stage", "engine.compile", "log.every",
    "log.save_every",
)  # fmt: skip
"""Fields whose `auto` is resolved anew at every start: they change no number, but by rounding.

Neither here nor there are engine.name, engine.device and engine.micro_batch, which stay `auto` in a
run folder; the last means another number at each size.
"""

MOST_STATISTICS = 3_072_000
"""Images of a stage's statistics at most: 3,000 steps of 1,024 images (PHI-S paper, Table 10)."""
MOST_FIT_STATISTICS = 100_000
"""The same before an upsampler is fitted (FeatSharp, section 3.2)."""
_LEAST_STATISTICS = 1024  # some 200,000 tokens: enough for a covariance of thousands of channels
_STATISTICS_SHARE = 10  # a tenth of the images, without the student: a few hundredths of the time

_FROZEN, _FROZEN_SHARE = 5000, 60  # PHI-S paper, Table 10: 5,000 of 300,000 steps
_FIT_WARMUP, _FIT_WARMUP_SHARE = 100, 30  # FeatSharp, Table 11: 100 of 3,000 steps

_LOG_EVERY, _LOG_SHARE = 50, 20  # a curve has at least 20 points
_SAVE_SHARE = 5  # at most a fifth of a stage is lost with its machine
_LEAST_SAVE_EVERY, _MOST_SAVE_EVERY = 20, 1000  # a try of a few steps is not spent on writing
_MOST_WORKERS = 12
_LEAST_COMPILED = 1000  # steps; to compile takes minutes, and a short run would not get them back
AUTO_MICRO_BATCH = 16
"""What engine.micro_batch's `auto` is where no memory is measured: more gains nothing on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts that are known when a stage or a fit starts, and decide what `auto` means."""

    native_dtype: Literal["float32", "bfloat16"] = "float32"
    """The fastest type that the device computes natively, see :mod:`..precision`."""
    images_in_shards: int | None = None
    """Images of the data set; None where the shards are not looked at (`plan`)."""
    cores: int = 2
    """Cores that each process has to itself."""
    can_compile: bool = False
    """Whether the device gains by compiled blocks, see :mod:`..system.compiled`."""


def resolve(recipe: Recipe, name: str, facts: Facts, earlier: Recipe | None = None) -> Recipe:
    """Return the recipe with plain values for every `auto` that matters to a stage.

    Args:
        recipe: as a person wrote it.
        name: of a stage of the recipe, or ``fit``, for which the recipe has no stage.
        facts: what is known at the start.
        earlier: the resolved recipe of the checkpoint that the run goes on from.
    """
    if earlier is not None:
        recipe = keep_resolved(recipe, earlier, KEPT)
    recipe = resolve_dtypes(place_indexes(recipe), facts.native_dtype)
    config = recipe.stages.get(name)
    steps = recipe.fit.steps if config is None else config.steps
    shown = images_shown(recipe, name)
    recipe = replace(
        recipe,
        data=resolve_data(recipe.data, facts),
        normalizer=_resolve_normalizer(
            recipe.normalizer, shown, facts.images_in_shards, fit=config is None
        ),
        engine=_resolve_engine(recipe.engine, config, steps, facts),
        log=_resolve_log(recipe.log, steps),
    )
    if config is None:
        return replace(recipe, fit=_resolve_fit(recipe.fit))
    return replace(recipe, stages={**recipe.stages, name: _resolve_stage(config, recipe)})


def images_shown(recipe: Recipe, name: str) -> int:
    """Return the images that a stage of a recipe, or its fit, shows over all its steps.

    Those of a fit are the images and their views, which the teacher sees too.
    """
    if name in recipe.stages:
        return recipe.stages[name].steps * recipe.stages[name].images_per_step
    fit = recipe.fit
    return (fit.pool or fit.steps * fit.batch_size) * (1 + fit.views)


def place_indexes(recipe: Recipe) -> Recipe:
    """Return the recipe with the folders that `data.index` stands for, before shards are opened.

    The second one is that of all runs, which every process of a run sees.
    """
    if recipe.data.index != AUTO:
        return recipe
    folders = ("beside", str(Path(recipe.output).expanduser() / "indexes"))
    return replace(recipe, data=replace(recipe.data, index=folders))


def resolve_dtypes(recipe: Recipe, native: Literal["float32", "bfloat16"]) -> Recipe:
    """Return the recipe with a device's native number type where it says `auto`."""
    teachers = {
        name: replace(config, dtype=native) if config.dtype == AUTO else config
        for name, config in recipe.teachers.items()
    }
    engine = recipe.engine
    if engine.precision == AUTO:
        engine = replace(engine, precision=native)
    return replace(recipe, teachers=teachers, engine=engine)


def dtypes_of(recipe: Recipe) -> dict[str, str]:
    """Return the number types of a recipe by the names of their fields."""
    teachers = {f"teachers.{name}.dtype": item.dtype for name, item in recipe.teachers.items()}
    return {"engine.precision": recipe.engine.precision, **teachers}


def _resolve_stage(config: StageConfig, recipe: Recipe) -> StageConfig:
    if config.freeze_body_steps != AUTO:
        return config
    has_start = bool(config.start_from or recipe.student.pretrained)
    # Heads that were not trained yet would pull a trained body away; a random body has nothing to
    # lose. A stage that starts from another carries its heads over, and a short freeze does.
    frozen = min(_FROZEN, config.steps // _FROZEN_SHARE) if has_start else 0
    return replace(config, freeze_body_steps=frozen)


def _resolve_normalizer(
    normalizer: NormalizerConfig, images_shown: int, images_in_shards: int | None, fit: bool
) -> NormalizerConfig:
    if normalizer.images != AUTO:
        return normalizer
    if fit:
        images = min(images_shown, MOST_FIT_STATISTICS)
    else:
        tenth = max(images_shown // _STATISTICS_SHARE, _LEAST_STATISTICS)
        images = min(tenth, images_shown, MOST_STATISTICS)
    if images_in_shards is not None:
        images = min(images, images_in_shards)
    return replace(normalizer, images=images)


def _resolve_engine(
    engine: EngineConfig, stage: StageConfig | None, steps: int, facts: Facts
) -> EngineConfig:
    if engine.zero_stage == AUTO:
        # LAMB needs the norms of whole parameters, which ZeRO flattens and cuts up; and what a fit
        # trains is too small to be cut up.
        zero_stage: Literal[0, 1] = 0 if stage is None or stage.optimizer == "lamb" else 1
        engine = replace(engine, zero_stage=zero_stage)
    if engine.compile == AUTO:
        is_possible = not engine.deterministic and engine.zero_stage != 3
        is_worth_it = facts.can_compile and steps >= _LEAST_COMPILED
        engine = replace(engine, compile=is_possible and is_worth_it)
    return engine


def _resolve_fit(fit: FitConfig) -> FitConfig:
    if fit.warmup_steps != AUTO:
        return fit
    return replace(fit, warmup_steps=min(_FIT_WARMUP, fit.steps // _FIT_WARMUP_SHARE))


def _resolve_log(log: LogConfig, steps: int) -> LogConfig:
    if log.every == AUTO:
        log = replace(log, every=max(1, min(_LOG_EVERY, steps // _LOG_SHARE)))
    if log.save_every == AUTO:
        fifth = steps // _SAVE_SHARE
        log = replace(log, save_every=max(_LEAST_SAVE_EVERY, min(_MOST_SAVE_EVERY, fifth)))
    return log


def resolve_data(data: DataConfig, facts: Facts) -> DataConfig:
    """Return the section with a number of workers that fits the process's cores."""
    if data.workers != AUTO:
        return data
    return replace(data, workers=max(1, min(_MOST_WORKERS, facts.cores - 1)))


def keep_resolved(
    recipe: Recipe, earlier: Recipe, fields: Sequence[str] = (*KEPT, *CHOSEN_ANEW)
) -> Recipe:
    """Return the recipe with what an earlier one says wherever it says `auto` itself.

    Only ``fields`` are looked at, where ``*`` stands for a name; what is `auto` in both stays so.
    """
    kept: Recipe = _keep(recipe, earlier, fields, "")
    return kept


def _keep(value: Any, earlier: Any, fields: Sequence[str], path: str) -> Any:
    if value == AUTO and any(fnmatchcase(path, field) for field in fields):
        return value if earlier is None else earlier
    prefix = f"{path}." if path else ""
    if isinstance(value, dict) and isinstance(earlier, dict):
        return {
            key: _keep(item, earlier.get(key), fields, prefix + key) for key, item in value.items()
        }
    if is_dataclass(value) and not isinstance(value, type) and type(value) is type(earlier):
        changes = {
            name: _keep(getattr(value, name), getattr(earlier, name), fields, prefix + name)
            for name in value.__dataclass_fields__
        }
        return replace(value, **changes)
    return value
