"""What a resolved stage says that can be done and is hardly meant: one line each, for the log."""

from .config import images_shown, plain, share_of
from .stage import Stage


def hints(stage: Stage, images_in_shards: int | None = None) -> list[str]:
    """List what a person should know before a stage or a fit starts.

    Args:
        stage: resolved with what is known at the start.
        images_in_shards: images of the data set; None where that is not known.
    """
    lines = _of_statistics(stage)
    if stage.is_fit:
        return [*lines, *_of_warmup("fit", plain(stage.fit.warmup_steps), stage.steps)]
    return [*lines, *_of_stage(stage, images_in_shards)]


def _of_statistics(stage: Stage) -> list[str]:
    shown = images_shown(stage.recipe, stage.name)
    images = share_of(stage.normalizer.images, shown)
    if stage.normalizer.name in ("none", "layer_norm") or images <= shown:
        return []
    return [
        f"normalizer.images: statistics of {images:,} images for training that shows "
        f"{shown:,}; auto takes fewer"
    ]


def _of_stage(stage: Stage, images_in_shards: int | None) -> list[str]:
    path, config, steps = f"stages.{stage.name}", stage.config, stage.steps
    lines = _of_warmup(path, config.warmup_steps, steps)
    if stage.frozen_steps == steps - 1 and not config.final_learning_rate and steps > 1:
        lines.append(
            f"{path}.freeze_body_steps: all steps but the last are frozen, and the rate of the "
            "last is final_learning_rate, 0: the body does not learn"
        )
    left = config.ema_decay**steps
    if left > 0.5:
        lines.append(
            f"{path}.ema_decay: after {steps} steps {left:.0%} of the EMA is "
            f"still the start; for so few set it to {1 - 10 / max(steps, 20):.2g} or below"
        )
    if images_in_shards is not None and stage.images_per_step > images_in_shards:
        lines.append(
            f"{path}.partitions: a step takes {stage.images_per_step:,} images, and data.shards "
            f"holds {images_in_shards:,}: it shows some of them more than once"
        )
    return lines


def _of_warmup(path: str, warmup_steps: int, steps: int) -> list[str]:
    if warmup_steps < steps:
        return []
    return [
        f"{path}.warmup_steps: the rate is still rising in the last of {steps} steps; set it below "
        "them"
    ]
