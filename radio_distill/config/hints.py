"""What a resolved recipe says that can be done and is hardly meant: one line each, for the log."""

from .resolve import Facts
from .schema import Recipe, StageConfig, plain, share_of


def hints(recipe: Recipe, stage: str, facts: Facts) -> list[str]:
    """List what a person should know before a stage or a fit starts.

    Args:
        recipe: resolved for it.
        stage: name of a stage of the recipe, or ``fit``.
        facts: what is known at the start.
    """
    lines = _of_statistics(recipe, facts)
    if stage in recipe.stages:
        return [*lines, *_of_stage(f"stages.{stage}", recipe.stages[stage], facts)]
    return [*lines, *_of_warmup("fit", plain(recipe.fit.warmup_steps), recipe.fit.steps)]


def _of_statistics(recipe: Recipe, facts: Facts) -> list[str]:
    images = share_of(recipe.normalizer.images, facts.images_shown)
    if recipe.normalizer.name in ("none", "layer_norm") or images <= facts.images_shown:
        return []
    return [
        f"normalizer.images: statistics of {images:,} images for training that shows "
        f"{facts.images_shown:,}; auto takes fewer"
    ]


def _of_stage(path: str, stage: StageConfig, facts: Facts) -> list[str]:
    lines = _of_warmup(path, stage.warmup_steps, stage.steps)
    if stage.frozen_steps == stage.steps - 1 and not stage.final_learning_rate and stage.steps > 1:
        lines.append(
            f"{path}.freeze_body_steps: all steps but the last are frozen, and the rate of the "
            "last is final_learning_rate, 0: the body does not learn"
        )
    left = stage.ema_decay**stage.steps
    if left > 0.5:
        lines.append(
            f"{path}.ema_decay: after {stage.steps} steps {left:.0%} of the averaged student is "
            f"still the start; for so few set it to {1 - 10 / max(stage.steps, 20):.2g} or below"
        )
    images = facts.images_shown // max(stage.steps, 1)
    if facts.images_in_shards is not None and images > facts.images_in_shards:
        lines.append(
            f"{path}.partitions: a step takes {images:,} images, and data.shards holds "
            f"{facts.images_in_shards:,}: it shows some of them more than once"
        )
    return lines


def _of_warmup(path: str, warmup_steps: int, steps: int) -> list[str]:
    if warmup_steps < steps:
        return []
    return [
        f"{path}.warmup_steps: the rate is still rising in the last of {steps} steps; set it below "
        "them"
    ]
