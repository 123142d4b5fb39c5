"""Rules that hold between the fields of a recipe.

Which numbers a single field takes stands in its type (:mod:`.schema`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Literal

from ..errors import ConfigError
from ..registry import nearest
from ..system.redaction import secrets_in
from .fields import share_of
from .models import StudentConfig
from .objective import AugmentationConfig
from .schema import (
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    PartitionConfig,
    Recipe,
    StageConfig,
    of_summary,
    partition_sizes,
)
from .students import by_student, check_students, for_stage, section_of

MOST_TRIPLES = 256
"""Images of a partition whose triples rkd_angle compares."""
_NAME = re.compile(r"\w[\w.+ -]{0,99}")
_ADDRESS = re.compile(r"\w[\w.+-]*://")


def check(recipe: Recipe) -> None:
    """Raise ConfigError, one line a problem, where fields contradict each other."""
    problems = [
        *_check_names(recipe),
        *_check_secrets(recipe),
        *_check_data(recipe.data),
        *_check_bands(recipe),
        *([] if recipe.teachers else ["teachers: a recipe needs at least one teacher"]),
        *_check_amount("normalizer.images", recipe.normalizer.images),
        *_check_fit(recipe),
        *_check_evaluation(recipe),
        *elsewhere(_places(recipe)),
        *_check_engine(recipe.engine),
        *_check_losses(recipe),
        *_check_starts(recipe),
    ]
    chain = [*check_students(recipe)]
    problems += chain or _check_each_student(recipe)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))


def _check_each_student(recipe: Recipe) -> Iterator[str]:
    """Check the sections of students, and their stages, each as it will run."""
    for names in by_student(recipe):
        first = names[0] if names else ""
        part, section = for_stage(recipe, first), section_of(recipe, first)
        for line in _check_student(part):
            yield re.sub(r"^student\b", section, line)
        for name in names:
            yield from _check_stage(part, name, part.stages[name])


def _check_evaluation(recipe: Recipe) -> Iterator[str]:
    """The best score must be one that there will be."""
    config = recipe.evaluation
    if config.best and not config.every:
        yield "evaluation.best: nothing is scored during training; set evaluation.every"
    names = config.during or config.benchmarks
    benchmark, slash, _ = config.best.partition("/")
    if config.best and (benchmark not in names or not slash):
        yield (
            f"evaluation.best: {config.best!r} is no BENCHMARK/METRIC of a benchmark that is run "
            f"during training ({', '.join(names)})"
        )


def _places(recipe: Recipe) -> dict[str, str]:
    """Return the folders that a run reads or writes, by field."""
    index = () if recipe.data.index == "auto" else recipe.data.index
    return {
        "output": recipe.output,
        "normalizer.cache": recipe.normalizer.cache,
        "data.cache": recipe.data.cache,
        **{f"data.index.{number}": folder for number, folder in enumerate(index)},
        **places_of_evaluation(recipe.evaluation),
    }


def places_of_evaluation(config: EvaluationConfig) -> dict[str, str]:
    """Return the files and folders that an evaluation reads or writes, by field."""
    names = ("images", "labels", "segmentation", "cache")
    places = {f"evaluation.{name}": getattr(config, name) for name in names}
    return {**places, **{f"evaluation.data.{name}": path for name, path in config.data.items()}}


def elsewhere(places: Mapping[str, str]) -> Iterator[str]:
    """Say which of some places, by field, are addresses: as paths they would be folders here."""
    for field, place in places.items():
        if _ADDRESS.match(place):
            yield (
                f"{field}: it is an address, and only data.shards is read from one; name a folder "
                "on a disk, with a copy of what lies there"
            )


def _check_engine(engine: EngineConfig) -> Iterator[str]:
    if engine.compile is True and engine.deterministic:
        yield (
            "engine.compile: which graph serves a size depends on the sizes before, so bits would "
            "differ after a resume; set it to false, or engine.deterministic"
        )


def _check_losses(recipe: Recipe) -> Iterator[str]:
    """The angle's weight is divided by a dispersion, so it is no part of a sum."""
    fields = {"loss.summary": recipe.loss.summary}
    for name, teacher in recipe.teachers.items():
        fields[f"teachers.{name}.summary_loss"] = teacher.summary_loss
    related = {name: losses.relation for name, losses in recipe.losses.items()}
    for stage, config in recipe.stages.items():
        for partition in config.partitions:
            asked = any("rkd_angle" in related.get(name, {}) for name in partition.teachers)
            if asked and partition.batch_size > MOST_TRIPLES:
                yield (
                    f"stages.{stage}.partitions.{partition.name}.batch_size: rkd_angle compares "
                    f"{partition.batch_size:,}³ triples of images, and takes at most "
                    f"{MOST_TRIPLES}³; set relation to rkd_distance or arkd"
                )
    for field, loss in fields.items():
        if "angle" in loss and loss != "angle":
            yield f"{field}: angle is measured in the teacher's dispersion and stands alone"
    if any(related.values()) and recipe.engine.zero_stage == 3:
        yield (
            "engine.zero_stage: a relation runs the student ahead of its passes, for which 3 "
            "would bring all weights once more; set it to 2"
        )
    if recipe.loss.drop_teachers and recipe.loss.weighting != "fixed":
        yield (
            f"loss.drop_teachers: weighs teachers by their losses, as {recipe.loss.weighting} "
            "does; set loss.weighting to fixed"
        )
    for name, teacher in recipe.teachers.items():
        if recipe.loss.drop_teachers and not (teacher.summary_weight or teacher.feature_weight):
            yield f"teachers.{name}: without a loss it cannot be dropped; take it out"
    for name, teacher in recipe.teachers.items():
        asked = (teacher.summary_loss or recipe.loss.summary) == "angle"
        if asked and of_summary(name) in recipe.normalizers:
            yield (
                f"teachers.{name}.summary_normalizer: the dispersion that angle is measured in is "
                "of summaries as they are; set it to none, or take another summary_loss"
            )
    for field in ("summary", "feature"):
        if not getattr(recipe.loss, field):
            yield f"loss.{field}: names no loss; for none, set {field}_weight of the teachers to 0"


def _check_names(recipe: Recipe) -> Iterator[str]:
    """Names become folders and log entries, and must be nothing else."""
    names = {"name": recipe.name}
    for stage, config in recipe.stages.items():
        names[f"stages.{stage}"] = stage
        names[f"stages.{stage}.upsampler.name"] = config.upsampler.name
        for index, partition in enumerate(config.partitions):
            names[f"stages.{stage}.partitions.{index}.name"] = partition.name
    for field, name in names.items():
        if not _NAME.fullmatch(name):
            yield (
                f"{field}: {name!r} is not a name: letters, digits, and _ . + - behind them, at "
                "most 100"
            )
    for name in recipe.teachers:
        if not name.isidentifier():
            yield f"teachers.{name!r}: a teacher's name is letters, digits and underscores"


def _check_secrets(recipe: Recipe) -> Iterator[str]:
    for field in secrets_in(recipe):
        yield (
            f"{field}: looks like a secret, and recipes are written into run folders; set it in "
            "the environment instead, for instance as HF_TOKEN"
        )


def _check_data(data: DataConfig) -> Iterator[str]:
    if data.weights and len(data.weights) != len(data.shards):
        yield f"data.weights: {len(data.weights)} weights for {len(data.shards)} shards entries"
    if data.weights and not any(data.weights):
        yield "data.weights: all are 0; give one that is not"
    if data.names and (len(data.names) != len(data.shards) or not data.weights):
        yield (
            f"data.names: {len(data.names)} names and {len(data.weights)} weights for "
            f"{len(data.shards)} shards entries; give each entry both"
        )
    if len(set(data.names)) < len(data.names):
        yield f"data.names: {', '.join(data.names)}: two entries have one name"
    for name in data.homogeneous:
        yield from _check_source(data, "data.homogeneous", name)
    if sum(data.homogeneous.values()) > 1:
        yield "data.homogeneous: the shares are more than 1 together"
    for name in ("crop_scale", "crop_ratio"):
        low, high = getattr(data, name)
        if not 0 < low <= high:
            yield f"data.{name}: {low:g}, {high:g} is not 0 < low <= high"
    if not data.index:
        yield "data.index: no folder is named; give one, or auto"


def _check_bands(recipe: Recipe) -> Iterator[str]:
    """What is made for red, green and blue cannot be asked of other bands."""
    data, augmentation = recipe.data, recipe.augmentation
    if len(data.band_range) not in (0, 1, data.bands):
        yield f"data.band_range: {len(data.band_range)} pairs for {data.bands} bands; give each one"
    for low, high in data.band_range:
        if not low < high:
            yield f"data.band_range: {low:g}, {high:g} is not low < high"
    for name, teacher in recipe.teachers.items():
        for band in teacher.bands:
            if band >= data.bands:
                yield f"teachers.{name}.bands: no band {band} in 0 to {data.bands - 1}"
    if data.bands == 3:
        return
    if any(augmentation.jitter[2:]):
        yield "augmentation.jitter: saturation and hue are of RGB; set the last two to 0"
    if augmentation.grey_share:
        yield "augmentation.grey_share: grey is one of RGB; set it to 0"
    if recipe.evaluation.every:
        yield f"evaluation.every: benchmarks show RGB, not {data.bands} bands; set it to 0"


def _check_student(recipe: Recipe) -> Iterator[str]:
    student, augmentation = recipe.student, recipe.augmentation
    if not len(student.mean) == len(student.std) == (len(student.mean) and recipe.data.bands):
        yield (
            f"student.mean: {len(student.mean)} numbers, and student.std {len(student.std)}; give "
            f"each {recipe.data.bands}, one for each of data.bands"
        )
    elif student.bands != recipe.data.bands:
        yield (
            f"student.mean: missing; with data.bands {recipe.data.bands} it has a number for each, "
            "and so has student.std"
        )
    if "in_chans" in student.options:
        yield "student.options: in_chans follows from student.mean; leave it out"
    yield from _check_body(student, augmentation)
    grid = student.pretrained_grid
    if grid and (len(grid) != 2 or min(grid) < 1):
        yield f"student.pretrained_grid: {list(grid)} is not [ROWS, COLUMNS]"
    yield from _check_known(recipe, "student.heads", list(student.heads))
    for name, what in (("pretrained_sha256", "sum"), ("pretrained_grid", "grid")):
        if getattr(student, name) and not student.pretrained:
            yield f"student.{name}: a {what} without student.pretrained; name the file"
    if augmentation.window_share and student.window_size:
        yield (
            "augmentation.window_share: the student always attends in windows; set it to 0, or "
            "student.window_size to 0"
        )
    for name in ("window_sizes", "blur_sigma"):
        low, high = getattr(augmentation, name)
        if low > high:
            yield f"augmentation.{name}: {low:g}, {high:g} is not smallest <= largest"
    if augmentation.jitter[-1] > 0.5:
        yield f"augmentation.jitter: hue {augmentation.jitter[-1]:g} is above half a turn, 0.5"


def _check_body(student: StudentConfig, augmentation: AugmentationConfig) -> Iterator[str]:
    """A field that the other kind of body has must be as it is where nobody sets it."""
    plain = StudentConfig()
    for name in student.foreign_fields:
        if getattr(student, name) != getattr(plain, name):
            other = "timm" if student.body == "vit" else "vit"
            yield f"student.{name}: only a student of `body: {other}` has it; leave it out"
    if student.body == "vit":
        return
    for name in ("window_share", "weight_noise"):
        if getattr(augmentation, name):
            yield f"augmentation.{name}: only a student of `body: vit` has it; set it to 0"


def _check_fit(recipe: Recipe) -> Iterator[str]:
    fit = recipe.fit
    if fit.pool % fit.batch_size:
        yield f"fit.pool: {fit.pool} is not a multiple of fit.batch_size {fit.batch_size}"
    if fit.teacher:
        yield from _check_known(recipe, "fit.teacher", [fit.teacher])
    if not fit.halvings and fit.distance != "mse":
        yield f"fit.distance: {fit.distance} is of fit.halvings; set that, or leave it out"
    for name in ("de_bias", "uncertainty", "total_variation", "crf") if fit.halvings else ():
        if getattr(fit, name):
            yield f"fit.{name}: is learned of views, which fit.halvings replaces; set it to false"


def _check_known(recipe: Recipe, path: str, teachers: Sequence[str]) -> Iterator[str]:
    for teacher in teachers:
        if teacher not in recipe.teachers:
            yield f"{path}: no teacher {teacher!r} ({nearest(teacher, list(recipe.teachers))})"


def _check_stage(recipe: Recipe, name: str, config: StageConfig) -> Iterator[str]:
    path = f"stages.{name}"
    if not config.partitions:
        yield f"{path}.partitions: a stage needs at least one partition"
    if config.reset_heads and not config.start_from:
        yield f"{path}.reset_heads: heads are new without start_from; set it to false"
    names = [partition.name for partition in config.partitions]
    for double in sorted({item for item in names if names.count(item) > 1}):
        yield f"{path}.partitions: two partitions are called {double!r}"
    for field in ("weights", "sha256", "sizes"):
        known = getattr(config.upsampler, field)
        yield from _check_known(recipe, f"{path}.upsampler.{field}", list(known))
    yield from _check_frozen(f"{path}.freeze_body_steps", config)
    if recipe.loss.mesa and not config.ema_decay:
        yield (
            f"{path}.ema_decay: loss.mesa compares with the student's EMA, which 0 switches off; "
            "set it, for instance to 0.999"
        )
    if config.anchor and not (config.start_from or recipe.student.pretrained):
        yield (
            f"{path}.anchor: keeps the student near its start, and the stage has none; give it "
            "start_from, or set student.pretrained"
        )
    for index, partition in enumerate(config.partitions):
        where = f"{path}.partitions.{partition.name}"
        yield from _check_sizes(recipe, where, partition)
        yield from _check_teachers_of(recipe, where, partition)
        if partition.source:
            yield from _check_source(recipe.data, f"{where}.source", partition.source)
        if partition.images_of and partition.source:
            yield f"{where}.source: its images are those of {partition.images_of}; drop one of both"
        if partition.images_of:
            yield from _check_shared_images(where, partition, config.partitions[:index])


def _check_starts(recipe: Recipe) -> Iterator[str]:
    for name in recipe.stages:
        first = recipe.stages_before(name)[0]
        if recipe.stages[first].start_from in recipe.stages:
            yield (
                f"stages.{name}.start_from: a stage cannot start from itself, nor by way of others"
            )


def _check_frozen(path: str, stage: StageConfig) -> list[str]:
    frozen = stage.freeze_body_steps
    if problems := _check_amount(path, frozen):
        return problems
    if frozen != "auto" and stage.steps <= share_of(frozen, stage.steps):
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


def _check_source(data: DataConfig, path: str, name: str) -> Iterator[str]:
    if name not in data.names:
        known = nearest(name, list(data.names)) if data.names else "there are no data.names"
        yield f"{path}: no entry of data.shards is called {name!r} ({known})"


def _check_shared_images(
    path: str, partition: PartitionConfig, earlier: tuple[PartitionConfig, ...]
) -> Iterator[str]:
    sources = {item.name: item for item in earlier if not item.images_of}
    source = sources.get(partition.images_of)
    if source is None:
        yield (
            f"{path}.images_of: {partition.images_of!r} is not an earlier partition with images of "
            f"its own (known: {', '.join(sources) or 'none'})"
        )
        return
    if source.batch_size != partition.batch_size:
        yield (
            f"{path}.batch_size: {partition.batch_size} is not the {source.batch_size} of "
            f"{source.name}, whose images these are"
        )
    sizes = [size for item in (source, partition) for size in partition_sizes(item)]
    if len({Fraction(height, width or 1) for height, width in sizes}) > 1:
        yield f"{path}.size: images of {source.name} are shown at its aspect ratio, in every size"


def _check_teachers_of(recipe: Recipe, path: str, partition: PartitionConfig) -> Iterator[str]:
    if not partition.teachers:
        yield f"{path}.teachers: a partition needs at least one teacher"
    for field in ("teachers", "upsample", "teacher_sizes", "mosaic"):
        named = list(getattr(partition, field))
        yield from _check_known(recipe, f"{path}.{field}", named)
        for teacher in named:
            if teacher in recipe.teachers and teacher not in partition.teachers:
                yield f"{path}.{field}: {teacher!r} is not a teacher of this partition"
    for teacher, sides in partition.teacher_sizes.items():
        if sides == ():
            yield f"{path}.teacher_sizes.{teacher}: no size is given"
    for teacher in set(partition.mosaic) & set(partition.upsample):
        yield f"{path}.mosaic: {teacher!r} is upsampled here; it cannot be both"


def _check_sizes(recipe: Recipe, path: str, partition: PartitionConfig) -> Iterator[str]:
    student, shift = recipe.student, recipe.augmentation.shift
    if bool(partition.sizes) == (partition.size != 0):
        yield f"{path}.size: give either size or sizes"
        return
    path = f"{path}.{'sizes' if partition.sizes else 'size'}"
    step = student.patch_size * max(student.window_size, 1)
    unit = f"patch {student.patch_size}"
    unit += f" times window {student.window_size}" if student.window_size else ""
    for side in dict.fromkeys(side for size in partition_sizes(partition) for side in size):
        if side < step or side % step:
            near = max(step, round(side / step) * step)
            yield f"{path}: {side} is not a multiple of {unit} (nearest {near})"
    for size in partition_sizes(partition):
        if shift and min(size) <= shift * student.patch_size:
            yield (
                f"{path}: {min(size)} is no larger than augmentation.shift, {shift} patches of "
                f"{student.patch_size}; crops would not overlap"
            )
        if student.body == "vit" and max(size) > student.max_size:
            yield f"{path}: {max(size)} is above student.max_size {student.max_size}"
