"""A run, as frozen dataclasses: ``load(yaml) -> override(argv) -> check() -> dump()``.

One builder reads YAML and command-line overrides alike, so both give the same messages. Everything
that changes a number of a run is a field here. A field made by :func:`option` carries its
explanation, which ``--help`` prints; this module does not import torch.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from .errors import ConfigError
from .registry import nearest


def option(default: Any = MISSING, help: str = "", unit: str = "", ours: bool = False) -> Any:
    """Declare a recipe field: default, what it does, its unit.

    ``ours`` marks a default that no paper publishes, so that the documentation can say so.
    """
    metadata = {"help": help, "unit": unit, "ours": ours}
    if isinstance(default, (dict, list)):
        raise TypeError("use a tuple or a factory for mutable defaults")
    if default in (dict, tuple):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, type) and dataclasses.is_dataclass(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def config(cls: type) -> type:
    """Make a frozen, keyword-only dataclass of a recipe section."""
    return dataclass(frozen=True, kw_only=True, slots=True)(cls)


@config
class TeacherConfig:
    """One frozen encoder."""

    preset: str = option(
        help="name in `radio-distill list teachers`, or a source: timm, open_clip, transformers, radio"
    )
    weights: str = option("", "local weights file or folder; empty takes the preset's own source")
    sha256: str = option("", "sha256 that the weights file must have; empty for no check")
    input_size: int | Literal["native", "match"] = option(
        "native",
        "side of the teacher's input: a number, its native size, or the size whose grid matches the student's",
        "px",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "type the frozen encoder computes in"
    )
    micro_batch: int = option(0, "images in one call of the encoder; 0 for all at once", "images")
    summary_weight: float = option(
        1.0, "weight of the summary loss; 0 for a teacher without summary"
    )
    feature_weight: float = option(1.0, "weight of the feature loss")
    options: dict[str, Any] = option(
        dict, "further arguments of the preset or source, for instance model: vit_base_patch16_224"
    )


@config
class StudentConfig:
    """The vision transformer that is trained."""

    architecture: str = option(
        "vit_base_patch16_224", "name of a timm vision transformer; its body is used"
    )
    pretrained: str = option(
        "", "start of the body: empty for random, `timm` for timm's weights, or a file"
    )
    patch_size: int = option(16, "pixels a side of one token", "px")
    max_size: int = option(2048, "longest image side that the position table (CPE) spans", "px")
    registers: int = option(4, "register tokens beside the summary tokens", "tokens", ours=True)
    position_dropout: float = option(
        0.1, "share of training samples that see no position embedding"
    )
    window_size: int = option(
        0, "side of the attention windows (ViTDet); 0 for global attention", "tokens"
    )
    global_blocks: int = option(
        4, "blocks that keep global attention when window_size > 0", "blocks"
    )
    drop_path: float = option(0.0, "stochastic depth", ours=True)
    head_hidden: int = option(1024, "hidden width of the MLP heads", "channels", ours=True)
    head_layers: int = option(0, "residual layers inside each MLP head", "layers", ours=True)
    gradient_checkpointing: bool = option(
        False, "recompute blocks in the backward pass to save memory"
    )


@config
class NormalizerConfig:
    """How teachers are brought to one scale."""

    name: str = option("phi_s", "name in `radio-distill list normalizers`")
    images: int = option(
        3_072_000,
        "pictures that mean and covariance are estimated on, anew in every stage",
        "images",
    )
    cache: str = option(
        "", "folder for estimated statistics; empty for `statistics` in the run folder"
    )


@config
class LossConfig:
    """What the student is asked for."""

    summary: Literal["cosine", "mse"] = option("cosine", "loss between summaries")
    feature: Literal["mse", "cosine", "am_radio"] = option(
        "mse", "loss between feature maps; am_radio is 0.9 cosine + 0.1 smooth L1"
    )
    alignment: Literal["student_down", "teacher_down", "teacher_up", "smaller", "larger"] = option(
        "smaller",
        "which of the two feature grids is resampled to the other before they are compared",
    )


@config
class UpsamplerConfig:
    """How the teachers that a partition upsamples get a finer grid."""

    name: str = option("bilinear", "name in `radio-distill list upsamplers`")
    factor: int = option(3, "how much finer than the teacher's own grid", "x")
    micro_batch: int = option(
        0, "teacher images in one call (tiles count); 0 for the teacher's own setting", "images"
    )
    weights: dict[str, str] = option(dict, "file of a fitted upsampler for each teacher name")
    options: dict[str, Any] = option(
        dict, "further arguments of the upsampler, for instance beta: 0.5 for s2"
    )


@config
class PartitionConfig:
    """One group of images of a step: which student size learns from which teachers."""

    name: str = option(help="name of the partition, for logs")
    size: int | tuple[int, int] = option(help="student input, side or (height, width)", unit="px")
    teachers: tuple[str, ...] = option(help="names of the teachers that these images are shown to")
    batch_size: int = option(
        help="images of this partition in one step, over all processes", unit="images"
    )
    weight: float = option(1.0, "weight of the partition's mean loss in the step")
    upsample: tuple[str, ...] = option(
        tuple, "names of the teachers that go through the upsampler here"
    )
    teacher_sizes: dict[str, int] = option(
        dict, "input side of a teacher in this partition, if not its input_size", "px"
    )
    ranks: int = option(
        0,
        "share of the processes that work on this partition alone, relative to the other partitions; 0 shares them out by cost",
    )


@config
class StageConfig:
    """One stage of training."""

    steps: int = option(300_000, "optimizer steps", "steps")
    partitions: tuple[PartitionConfig, ...] = option(help="what a step is made of")
    start_from: str = option(
        "", "stage name or checkpoint whose weights the stage starts from; empty for a new student"
    )
    optimizer: Literal["adamw", "lamb"] = option("lamb", "optimizer")
    learning_rate: float = option(1e-3, "highest learning rate")
    final_learning_rate: float = option(0.0, "learning rate at the last step", ours=True)
    warmup_steps: int = option(0, "steps of linear warm-up", "steps", ours=True)
    weight_decay: float = option(0.02, "decoupled weight decay of matrices")
    betas: tuple[float, float] = option((0.9, 0.999), "moment decays of the optimizer", ours=True)
    gradient_clip: float = option(1.0, "largest norm of the gradient; 0 for no limit", ours=True)
    freeze_body_steps: int = option(5000, "first steps in which only the heads learn", "steps")
    ema_decay: float = option(0.0, "decay of the averaged student; 0 for none", ours=True)
    upsampler: UpsamplerConfig = option(UpsamplerConfig, "how upsampled teachers are upsampled")


@config
class DataConfig:
    """Which images, and what is done to them."""

    shards: tuple[str, ...] = option(help="tar shards, folders of shards, or patterns with * ")
    weights: tuple[float, ...] = option(
        tuple, "share of each entry of `shards`; empty for all images alike"
    )
    crop_scale: tuple[float, float] = option(
        (0.5, 1.0), "share of the picture's area that a random crop covers", ours=True
    )
    crop_ratio: tuple[float, float] = option(
        (0.75, 1.3333333333333333), "aspect ratio of a random crop", ours=True
    )
    flip: float = option(0.5, "probability of a horizontal flip", ours=True)
    min_size: int = option(32, "shortest side that a picture must have", "px", ours=True)
    max_pixels: int = option(100_000_000, "largest picture that is decoded", "px", ours=True)
    shuffle_shards: int = option(
        16, "shards whose samples are shuffled together", "shards", ours=True
    )
    workers: int = option(2, "decoding processes for each training process", "processes", ours=True)
    max_bad_share: float = option(0.01, "share of bad images at which the run stops", ours=True)


@config
class EngineConfig:
    """Processes, precision and memory."""

    name: Literal["auto", "single", "deepspeed"] = option(
        "auto", "auto is deepspeed with several processes, single otherwise"
    )
    zero_stage: Literal[0, 1, 2, 3] = option(1, "ZeRO stage of DeepSpeed", ours=True)
    precision: Literal["float32", "bfloat16"] = option(
        "bfloat16", "type of the student's matrix products; weights stay float32", ours=True
    )
    micro_batch: int = option(
        0, "largest number of images in one forward pass; 0 for a partition's whole share", "images"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to run")
    compile: bool = option(False, "torch.compile the student")


@config
class LogConfig:
    """What is written, and how often."""

    every: int = option(50, "steps between log lines", "steps")
    save_every: int = option(1000, "steps between checkpoints", "steps")
    keep_last: int = option(3, "checkpoints kept", "checkpoints")
    tensorboard: bool = option(True, "write TensorBoard events")


@config
class EvaluationConfig:
    """How students and teachers are scored."""

    benchmarks: tuple[str, ...] = option(
        ("fidelity", "correspondence", "agreement"), "names in `radio-distill list benchmarks`"
    )
    pictures: str = option(
        "", "shards or folder of held-out pictures, for fidelity, agreement and correspondence"
    )
    labels: str = option("", "folder with train/CLASS and val/CLASS, for knn")
    segmentation: str = option("", "folder of the segmentation set, for segmentation")
    size: int = option(224, "student input for summaries", "px")
    dense_size: int = option(448, "student input for dense benchmarks", "px")
    limit: int = option(0, "most pictures of each benchmark; 0 for all", "images")
    options: dict[str, Any] = option(dict, "arguments of single benchmarks, by benchmark name")


@config
class Recipe:
    """Everything that decides a run."""

    name: str = option(help="name of the recipe and of its run folder")
    seed: int = option(0, "seed of every random draw")
    output: str = option("runs", "folder that run folders are made in")
    data: DataConfig = option(help="images")
    student: StudentConfig = option(StudentConfig, "the student")
    teachers: dict[str, TeacherConfig] = option(
        help="the teachers, by the name that logs and heads use"
    )
    normalizer: NormalizerConfig = option(NormalizerConfig, "scale of the targets")
    loss: LossConfig = option(LossConfig, "losses")
    stages: dict[str, StageConfig] = option(help="stage1, stage2, stage3")
    engine: EngineConfig = option(EngineConfig, "processes, precision and memory")
    log: LogConfig = option(LogConfig, "logs and checkpoints")
    evaluation: EvaluationConfig = option(EvaluationConfig, "scoring")

    @property
    def folder(self) -> Path:
        """The run folder of this recipe: ``output/name``."""
        return Path(self.output) / self.name


def load(path: str | Path, overrides: Sequence[str] = (), stage: str = "") -> Recipe:
    """Read a recipe, apply ``a.b.c=value`` overrides, and check it.

    Args:
        path: YAML file.
        overrides: assignments as :func:`override` takes them.
        stage: stage that an override's leading ``stage.`` stands for.

    Raises:
        ConfigError: one line a problem, with the field's full name.
    """
    recipe = build(Recipe, override(read_yaml(path), overrides, stage))
    check(recipe)
    return recipe


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML: {reason}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of fields, found {type(data).__name__}")
    return data


def override(
    data: Mapping[str, Any], assignments: Sequence[str], stage: str = ""
) -> dict[str, Any]:
    """Return ``data`` with each ``a.b.c=value`` applied; values are read as YAML.

    Items of a list are named by position or by their ``name``
    (``stages.stage3.partitions.high.batch_size=8``); dashes count as underscores in field names.
    """
    result = _plain(data)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"override {assignment!r} is not of the form field.name=value")
        keys = path.strip().split(".")
        if stage and keys[0] == "stage":
            keys[:1] = ["stages", stage]
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        _assign(result, keys, value, path)
    return result


def _assign(node: Any, keys: list[str], value: Any, path: str) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            names = [item.get("name") if isinstance(item, dict) else None for item in node]
            if key in names:
                index = names.index(key)
            elif key.isdigit() and int(key) < len(node):
                index = int(key)
            else:
                known = ", ".join(str(name) for name in names if name) or f"0 to {len(node) - 1}"
                raise ConfigError(f"{path}: no item {key!r} in the list (known: {known})")
            if last:
                node[index] = value
            else:
                node = node[index]
        elif isinstance(node, dict):
            if key not in node and key.replace("-", "_") in _FIELD_NAMES:
                key = key.replace("-", "_")
            if last:
                node[key] = value
            else:
                if node.get(key) is None:
                    node[key] = {}
                node = node[key]
        else:
            raise ConfigError(
                f"{path}: {'.'.join(keys[:depth])} is a plain value and has no field {key!r}"
            )


def build(cls: type, data: Any, path: str = "") -> Any:
    """Make a dataclass of plain data; unknown, missing and ill-typed fields are ConfigErrors."""
    where = path or "recipe"
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected fields of {cls.__name__}, got {data!r}")
    fields = {item.name: item for item in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if key not in fields:
            raise ConfigError(
                f"unknown field {_join(path, key)!r} ({nearest(str(key), list(fields))})"
            )
        values[key] = _convert(hints[key], value, _join(path, key))
    for name, item in fields.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{_join(path, name)} is missing: {item.metadata['help']}")
    return cls(**values)


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, path)
    if kind is Any:
        return value
    if origin is Literal:
        if value in arguments and type(value) in {type(known) for known in arguments}:
            return value
        raise ConfigError(f"{path}: {value!r} is not one of {', '.join(map(str, arguments))}")
    if origin in (Union, types.UnionType):
        for option_kind in arguments:
            try:
                return _convert(option_kind, value, path)
            except ConfigError:
                continue
        raise ConfigError(f"{path}: {value!r} is not {_kind_name(kind)}")
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected a mapping, got {value!r}")
        return {
            str(key): _convert(arguments[1], item, _join(path, key)) for key, item in value.items()
        }
    if origin is tuple:
        return _convert_tuple(arguments, value, path)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    if kind is str and value is None:  # `pretrained:` with nothing behind it
        return ""
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"{path}: {value!r} is not {_kind_name(kind)}")


def _convert_tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if isinstance(value, str) and arguments[0] is str:
        value = [part.strip() for part in value.split(",")] if value else []
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{path}: expected a list, got {value!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_convert(arguments[0], item, _join(path, i)) for i, item in enumerate(value))
    if len(value) != len(arguments):
        raise ConfigError(f"{path}: expected {len(arguments)} values, got {len(value)}")
    pairs = zip(arguments, value, strict=True)
    return tuple(_convert(kind, item, _join(path, i)) for i, (kind, item) in enumerate(pairs))


def _kind_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_kind_name(item) for item in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(item) for item in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a list"
    return names.get(kind, str(kind))


def _plain(value: Any) -> Any:
    """Copy nested data to dicts and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def dump(recipe: Any) -> str:
    """Write a recipe, or a section of one, as YAML that :func:`load` reads back to an equal one."""
    return yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True, width=100)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """List the fields in which two recipes differ, as ``field: old -> new``."""
    before, after = dict(_leaves(_plain(old))), dict(_leaves(_plain(new)))
    names = list(before) + [name for name in after if name not in before]
    return [
        f"{name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in names
        if before.get(name, MISSING) != after.get(name, MISSING)
    ]


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in _leaves(item, _join(path, key))]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [leaf for i, item in enumerate(value) for leaf in _leaves(item, _join(path, i))]
    return [(path, value)]


def size_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a size that may be given as one side."""
    return (size, size) if isinstance(size, int) else size


def check(recipe: Recipe) -> None:
    """Raise ConfigError, one line a problem, where fields contradict each other."""
    problems = [*_check_data(recipe.data), *_check_teachers(recipe)]
    if recipe.student.patch_size < 1:
        problems.append(f"student.patch_size: {recipe.student.patch_size} is not positive")
    else:
        for name, stage in recipe.stages.items():
            problems += _check_stage(recipe, name, stage)
    if problems:
        raise ConfigError("\n".join(problems))


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
    if not 0 <= data.flip <= 1:
        problems.append(f"data.flip: {data.flip} is not a probability")
    return problems


def _check_teachers(recipe: Recipe) -> list[str]:
    if not recipe.teachers:
        return ["teachers: a recipe needs at least one teacher"]
    problems = []
    for name, teacher in recipe.teachers.items():
        if not name.isidentifier():
            problems.append(f"teachers.{name}: a teacher's name is letters, digits and underscores")
        if teacher.summary_weight < 0 or teacher.feature_weight < 0:
            problems.append(f"teachers.{name}: loss weights cannot be negative")
    return problems


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
    for teacher in stage.upsampler.weights:
        if teacher not in recipe.teachers:
            problems.append(
                f"{path}.upsampler.weights: no teacher {teacher!r} ({nearest(teacher, list(recipe.teachers))})"
            )
    for partition in stage.partitions:
        problems += _check_partition(recipe, f"{path}.partitions.{partition.name}", partition)
    return problems


def _check_partition(recipe: Recipe, path: str, partition: PartitionConfig) -> list[str]:
    problems = []
    student = recipe.student
    step = student.patch_size * max(student.window_size, 1)
    unit = f"patch {student.patch_size}" + (
        f" times window {student.window_size}" if student.window_size else ""
    )
    for side in dict.fromkeys(size_pair(partition.size)):
        if side < step or side % step:
            near = max(step, round(side / step) * step)
            problems.append(f"{path}.size: {side} is not a multiple of {unit} (nearest {near})")
    if max(size_pair(partition.size)) > student.max_size:
        problems.append(
            f"{path}.size: {partition.size} is above student.max_size {student.max_size}"
        )
    if partition.batch_size < 1:
        problems.append(f"{path}.batch_size: {partition.batch_size} is not positive")
    if partition.weight <= 0:
        problems.append(
            f"{path}.weight: {partition.weight} is not positive; drop the partition instead"
        )
    if not partition.teachers:
        problems.append(f"{path}.teachers: a partition needs at least one teacher")
    for field_name in ("teachers", "upsample", "teacher_sizes"):
        for teacher in getattr(partition, field_name):
            if teacher not in recipe.teachers:
                problems.append(
                    f"{path}.{field_name}: no teacher {teacher!r} ({nearest(teacher, list(recipe.teachers))})"
                )
            elif teacher not in partition.teachers:
                problems.append(
                    f"{path}.{field_name}: {teacher!r} is not a teacher of this partition"
                )
    return problems


def describe(cls: type = Recipe, path: str = "") -> list[tuple[str, str, str, str]]:
    """List every field as (name, default, unit, explanation), for ``--help`` and the docs.

    ``NAME`` stands for a key of the user's, ``N`` for a position in a list.
    """
    rows = []
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        name, hint = _join(path, item.name), hints[item.name]
        inner, suffix = _section_of(hint)
        if inner is not None:
            rows += describe(inner, name + suffix)
            continue
        text = item.metadata["help"] + (" [our choice]" if item.metadata["ours"] else "")
        if typing.get_origin(hint) is Literal:
            text += f" ({' | '.join(map(str, typing.get_args(hint)))})"
        rows.append((name, _default_text(item), item.metadata["unit"], text))
    return rows


def _section_of(hint: Any) -> tuple[type | None, str]:
    if dataclasses.is_dataclass(hint):
        return typing.cast(type, hint), ""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is dict and dataclasses.is_dataclass(arguments[1]):
        return arguments[1], ".NAME"
    if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(arguments[0]):
        return arguments[0], ".N"
    return None, ""


def _default_text(item: dataclasses.Field[Any]) -> str:
    if item.default_factory is not MISSING:
        return "none"
    if item.default is MISSING:
        return "required"
    if isinstance(item.default, tuple):
        return ", ".join(map(str, item.default))
    return str(item.default) if item.default != "" else "none"


def _field_names(cls: type) -> set[str]:
    names = {item.name for item in dataclasses.fields(cls)}
    for hint in typing.get_type_hints(cls).values():
        inner, _ = _section_of(hint)
        if inner is not None:
            names |= _field_names(inner)
    return names


_FIELD_NAMES = frozenset(_field_names(Recipe))
