"""Fields that contradict each other, found before anything runs."""

import re
from dataclasses import asdict
from math import gcd
from typing import Literal

from ..errors import ConfigError
from ..registry import nearest
from ..system.redaction import secrets_in
from .schema import (
    DataConfig,
    PartitionConfig,
    Recipe,
    StageConfig,
    StudentConfig,
    partition_sizes,
    share_of,
)

_NAME = re.compile(r"\w[\w.+ -]{0,99}")


def check(recipe: Recipe) -> None:
    """Raise ConfigError, one line a problem, where fields contradict each other."""
    problems = [
        *_check_names(recipe),
        *_check_secrets(recipe),
        *_check_data(recipe.data),
        *_check_student(recipe.student),
        *_check_teachers(recipe),
        *_check_amount("normalizer.images", recipe.normalizer.images),
        *_check_augmentation(recipe),
        *_check_fit(recipe),
        *_check_logs(recipe),
    ]
    if recipe.student.pretrained_sha256 and not recipe.student.pretrained:
        problems.append(
            "student.pretrained_sha256: a sum without student.pretrained; name the file"
        )
    if recipe.student.pretrained_grid and not recipe.student.pretrained:
        problems.append("student.pretrained_grid: a grid without student.pretrained; name the file")
    if recipe.student.patch_size > 0:
        for name, stage in recipe.stages.items():
            problems += _check_stage(recipe, name, stage)
    if problems:
        raise ConfigError(*problems)


def _check_names(recipe: Recipe) -> list[str]:
    """Names become folders and log entries, and must be nothing else."""
    names = {"name": recipe.name}
    for stage, config in recipe.stages.items():
        names[f"stages.{stage}"] = stage
        names[f"stages.{stage}.upsampler.name"] = config.upsampler.name
        for index, partition in enumerate(config.partitions):
            names[f"stages.{stage}.partitions.{index}.name"] = partition.name
    return [
        f"{field}: {name!r} is not a name: letters, digits, and _ . + - behind them, at most 100"
        for field, name in names.items()
        if not _NAME.fullmatch(name)
    ]


def check_student(student: StudentConfig) -> None:
    """Raise ConfigError for a student that cannot be built; a checkpoint may hold any recipe."""
    if problems := _check_student(student):
        raise ConfigError(*problems)


def _check_student(student: StudentConfig) -> list[str]:
    limits = {
        "patch_size": (1, 1024),
        "max_size": (1, 65_536),
        "registers": (0, 1024),
        "position_dropout": (0, 1),
        "drop_path": (0, 1),
        "window_size": (0, 65_536),
        "global_blocks": (0, 1024),
        "head_hidden": (1, 1 << 20),
        "head_layers": (0, 1024),
    }
    problems = [
        f"student.{name}: {getattr(student, name)} is not {least} to {most}"
        for name, (least, most) in limits.items()
        if not least <= getattr(student, name) <= most
    ]
    grid = student.pretrained_grid
    if grid and (len(grid) != 2 or min(grid) < 1):
        problems.append(f"student.pretrained_grid: {list(grid)} is not [ROWS, COLUMNS]")
    return problems


def _check_secrets(recipe: Recipe) -> list[str]:
    return [
        f"{field}: looks like a secret, and recipes are written into run folders; set it in the "
        "environment instead, for instance as HF_TOKEN"
        for field in secrets_in(asdict(recipe))
    ]


def _check_data(data: DataConfig) -> list[str]:
    problems = []
    if data.weights and len(data.weights) != len(data.shards):
        problems.append(
            f"data.weights: {len(data.weights)} weights for {len(data.shards)} shards entries"
        )
    if data.weights and min(data.weights) <= 0:
        problems.append("data.weights: every weight must be positive; drop the entry instead")
    if not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1:
        problems.append(f"data.crop_scale: {data.crop_scale} is not 0 < low <= high <= 1")
    if not 0 < data.crop_ratio[0] <= data.crop_ratio[1]:
        problems.append(f"data.crop_ratio: {data.crop_ratio} is not 0 < low <= high")
    for name, least in (("min_size", 1), ("max_pixels", 1), ("shuffle_shards", 1), ("workers", 0)):
        if (value := getattr(data, name)) != "auto" and value < least:
            problems.append(f"data.{name}: {value} is below {least}")
    if not data.index:
        problems.append("data.index: no folder is named; give one, or auto")
    if data.workers != "auto" and data.workers > 1024:
        problems.append(f"data.workers: {data.workers} processes are above 1024")
    for name in ("max_bad_share", "max_bad_shards"):
        if not 0 <= getattr(data, name) <= 1:
            problems.append(f"data.{name}: {getattr(data, name)} is not a share of 0 to 1")
    if data.read_timeout <= 0:
        problems.append(f"data.read_timeout: {data.read_timeout} is not positive")
    if not 0 <= data.flip <= 1:
        problems.append(f"data.flip: {data.flip} is not a probability")
    return problems


def _check_teachers(recipe: Recipe) -> list[str]:
    if not recipe.teachers:
        return ["teachers: a recipe needs at least one teacher"]
    problems = []
    for name, teacher in recipe.teachers.items():
        if not name.isidentifier():
            problems.append(
                f"teachers.{name!r}: a teacher's name is letters, digits and underscores"
            )
        if teacher.summary_weight < 0 or teacher.feature_weight < 0:
            problems.append(f"teachers.{name}: loss weights cannot be negative")
    return problems


def _check_augmentation(recipe: Recipe) -> list[str]:
    config, loss, problems = recipe.augmentation, recipe.loss, []
    low, high = config.window_sizes
    if config.shift < 0:
        problems.append(f"augmentation.shift: {config.shift} is negative")
    if not 0 <= config.window_share <= 1:
        problems.append(f"augmentation.window_share: {config.window_share} is not a share")
    if config.window_share and recipe.student.window_size:
        problems.append(
            "augmentation.window_share: the student always attends in windows; set it to 0, or "
            "student.window_size to 0"
        )
    if not 1 <= low <= high:
        problems.append(f"augmentation.window_sizes: {low}, {high} is not 1 <= smallest <= largest")
    if config.weight_noise < 0:
        problems.append(f"augmentation.weight_noise: {config.weight_noise} is negative")
    if not 0 <= loss.adaloss_momentum < 1:
        problems.append(f"loss.adaloss_momentum: {loss.adaloss_momentum} is not 0 to below 1")
    if loss.mesa < 0:
        problems.append(f"loss.mesa: {loss.mesa} is negative")
    return problems


def _check_fit(recipe: Recipe) -> list[str]:
    fit = recipe.fit
    problems = [
        f"fit.{name}: {value} is below {least}"
        for name, least in (
            ("factor", 1),
            ("steps", 1),
            ("batch_size", 1),
            ("views", 1),
            ("pool", 0),
            ("size", 0),
            ("downsampler_kernel", 1),
            ("learning_rate", 0),
            ("warmup_steps", 0),
            ("gradient_clip", 0),
            ("total_variation", 0),
            ("crf", 0),
        )
        if (value := getattr(fit, name)) != "auto" and value < least
    ]
    if fit.pool % max(fit.batch_size, 1):
        problems.append(
            f"fit.pool: {fit.pool} is not a multiple of fit.batch_size {fit.batch_size}"
        )
    if fit.teacher and fit.teacher not in recipe.teachers:
        known = nearest(fit.teacher, list(recipe.teachers))
        problems.append(f"fit.teacher: no teacher {fit.teacher!r} ({known})")
    return problems


def _check_logs(recipe: Recipe) -> list[str]:
    lowest = {
        "log": {"every": 1, "save_every": 1, "keep_last": 1, "keep_every": 0},
        "watch": {"max_skipped": 0, "hang_seconds": 0, "loss_spike": 0, "slow_share": 0},
    }
    return [
        f"{section}.{name}: {value} is below {least}"
        for section, fields in lowest.items()
        for name, least in fields.items()
        if (value := getattr(getattr(recipe, section), name)) != "auto" and value < least
    ]


def _check_stage(recipe: Recipe, name: str, stage: StageConfig) -> list[str]:
    path, problems = f"stages.{name}", []
    if not stage.partitions:
        problems.append(f"{path}.partitions: a stage needs at least one partition")
    if stage.steps < 1:
        problems.append(f"{path}.steps: {stage.steps} is not positive")
    if stage.upsampler.factor < 1:
        problems.append(f"{path}.upsampler.factor: {stage.upsampler.factor} is not positive")
    if stage.start_from == name:
        problems.append(f"{path}.start_from: a stage cannot start from itself")
    names = [partition.name for partition in stage.partitions]
    for double in sorted({item for item in names if names.count(item) > 1}):
        problems.append(f"{path}.partitions: two partitions are called {double!r}")
    for field_name in ("weights", "sha256", "sizes"):
        for teacher in getattr(stage.upsampler, field_name):
            if teacher not in recipe.teachers:
                known = nearest(teacher, list(recipe.teachers))
                problems.append(f"{path}.upsampler.{field_name}: no teacher {teacher!r} ({known})")
    if stage.warmup_steps < 0:
        problems.append(f"{path}.warmup_steps: {stage.warmup_steps} is negative")
    problems += _check_frozen(f"{path}.freeze_body_steps", stage)
    if recipe.loss.mesa and not stage.ema_decay:
        problems.append(
            f"{path}.ema_decay: loss.mesa compares with an averaged student, which 0 switches off; "
            "set it, for instance to 0.999"
        )
    for index, partition in enumerate(stage.partitions):
        where = f"{path}.partitions.{partition.name}"
        problems += _check_partition(recipe, where, partition)
        if partition.images_of:
            problems += _check_shared_images(where, partition, stage.partitions[:index])
    return problems


def _check_frozen(path: str, stage: StageConfig) -> list[str]:
    frozen = stage.freeze_body_steps
    if problems := _check_amount(path, frozen):
        return problems
    if frozen != "auto" and 0 < stage.steps <= share_of(frozen, stage.steps):
        return [
            f"{path}: with {frozen} of {stage.steps} steps frozen the body would not learn at all; "
            "set it to auto, to 0, or to a share such as 0.02"
        ]
    return []


def _check_amount(path: str, amount: int | float | Literal["auto"]) -> list[str]:
    """Check a number that may be given as a share below 1."""
    if amount == "auto" or 0 <= amount < 1 or (amount >= 1 and float(amount).is_integer()):
        return []
    problem = "is negative" if amount < 0 else "is neither a whole number nor a share below 1"
    return [f"{path}: {amount} {problem}"]


def _check_shared_images(
    path: str, partition: PartitionConfig, earlier: tuple[PartitionConfig, ...]
) -> list[str]:
    sources = [item for item in earlier if not item.images_of]
    source = next((item for item in sources if item.name == partition.images_of), None)
    if source is None:
        known = ", ".join(item.name for item in sources) or "none"
        return [
            f"{path}.images_of: {partition.images_of!r} is not an earlier partition with images of "
            f"its own (known: {known})"
        ]
    problems = []
    if source.batch_size != partition.batch_size:
        problems.append(
            f"{path}.batch_size: {partition.batch_size} is not the {source.batch_size} of "
            f"{source.name}, whose images these are"
        )
    if len({_shape(size) for item in (source, partition) for size in partition_sizes(item)}) > 1:
        problems.append(
            f"{path}.size: images of {source.name} are shown at its aspect ratio, in every size"
        )
    return problems


def _shape(size: tuple[int, int]) -> tuple[int, int]:
    """Reduce a size to its aspect ratio in lowest terms."""
    divisor = gcd(*size) or 1
    return size[0] // divisor, size[1] // divisor


def _check_partition(recipe: Recipe, path: str, partition: PartitionConfig) -> list[str]:
    problems = _check_sizes(recipe, path, partition)
    if partition.batch_size < 1:
        problems.append(f"{path}.batch_size: {partition.batch_size} is not positive")
    if partition.weight <= 0:
        problems.append(
            f"{path}.weight: {partition.weight} is not positive; drop the partition instead"
        )
    if not partition.teachers:
        problems.append(f"{path}.teachers: a partition needs at least one teacher")
    for field_name in ("teachers", "upsample", "teacher_sizes", "mosaic"):
        for teacher in getattr(partition, field_name):
            if teacher not in recipe.teachers:
                known = nearest(teacher, list(recipe.teachers))
                problems.append(f"{path}.{field_name}: no teacher {teacher!r} ({known})")
            elif teacher not in partition.teachers:
                problems.append(
                    f"{path}.{field_name}: {teacher!r} is not a teacher of this partition"
                )
    for teacher in set(partition.mosaic) & set(partition.upsample):
        problems.append(f"{path}.mosaic: {teacher!r} is upsampled here; it cannot be both")
    return problems


def _check_sizes(recipe: Recipe, path: str, partition: PartitionConfig) -> list[str]:
    student, shift = recipe.student, recipe.augmentation.shift
    if bool(partition.sizes) == (partition.size != 0):
        return [f"{path}.size: give either size or sizes"]
    field_name = "sizes" if partition.sizes else "size"
    step = student.patch_size * max(student.window_size, 1)
    unit = f"patch {student.patch_size}" + (
        f" times window {student.window_size}" if student.window_size else ""
    )
    problems = []
    for side in dict.fromkeys(side for size in partition_sizes(partition) for side in size):
        if side < step or side % step:
            near = max(step, round(side / step) * step)
            problems.append(
                f"{path}.{field_name}: {side} is not a multiple of {unit} (nearest {near})"
            )
    for size in partition_sizes(partition):
        if shift and min(size) <= shift * student.patch_size:
            problems.append(
                f"{path}.{field_name}: {min(size)} is no larger than augmentation.shift, {shift} "
                f"patches of {student.patch_size}; crops would not overlap"
            )
        if max(size) > student.max_size:
            problems.append(
                f"{path}.{field_name}: {max(size)} is above student.max_size {student.max_size}"
            )
    return problems
