"""Frozen encoders from timm, open_clip, transformers, RADIO checkpoints and runs, by name.

``TEACHERS`` lists presets and sources; :func:`build_teacher` makes one ready to encode;
:func:`teacher_spec` and :func:`build_module` tell a planner what it will be, without weights. A
teacher of one's own is a :class:`~teachers.presets.Preset` under the entry point group
``radio_distill.teachers``; its ``source`` may be a module of one's own.

Importing this package imports no model library, nor torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from radio_distill.config import TeacherConfig
from radio_distill.errors import ConfigError, WeightsError
from radio_distill.registry import Registry, check_has, check_takes, nearest
from radio_distill.system.files import reason_of
from radio_distill.types import TeacherSpec

from .presets import PRESETS, Preset

if TYPE_CHECKING:
    from torch import nn

    from .base import FrozenTeacher
    from .sources.open_clip import TextEncoder

PROJECT = "radio-distill"

TEACHERS = Registry("teacher", {name: f"teachers.presets:{name}" for name in PRESETS})

SOURCES = {
    "timm": "teachers.sources.timm",
    "open_clip": "teachers.sources.open_clip",
    "transformers": "teachers.sources.transformers",
    "radio": "teachers.sources.radio",
    "student": "teachers.sources.student",
}
"""Modules with ``complete``, ``build``, ``locate``, ``load`` and a table ``ARGUMENTS``."""

_FUNCTIONS = {
    "complete": ("preset", "weights"),
    "build": ("preset",),
    "locate": ("preset",),
    "load": ("preset", "path"),
}
"""What a source's functions are called with."""

FIELDS = {
    "model": "the model's name in its library; timm also hf-hub:OWNER/NAME and local-dir:PATH",
    "native_size": "side of the images it was trained at, in pixels",
    "mean": "mean of each channel of pixels in [0, 1]: three numbers",
    "std": "standard deviation of each channel of pixels in [0, 1]: three numbers",
    "max_size": "longest side that it takes, in pixels",
    "fixed_size": "true where it takes its native size alone",
    "licence": "licence of the weights, for the model card of the student",
    "text": "open_clip name of the text tower that shares its summary's space",
}
"""Preset fields that ``options`` may set, with any source: what each is."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_triple(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_is_number, value))


_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("a name", lambda value: isinstance(value, str)),
    "native_size": ("a number of pixels, the side of a square", lambda v: _is_whole(v) and v > 0),
    "max_size": ("a number of pixels", lambda v: _is_whole(v) and v > 0),
    "mean": ("three numbers: [0.485, 0.456, 0.406]", _is_triple),
    "std": ("three numbers above 0", lambda v: _is_triple(v) and min(v) > 0),
    "fixed_size": ("true or false", lambda value: isinstance(value, bool)),
    "licence": ("words", lambda value: isinstance(value, str)),
    "text": ("the name of a model", lambda value: isinstance(value, str)),
    "blocks": ("a whole number", _is_whole),
    "stage": ("a whole number", _is_whole),
    "config": ("a mapping", lambda value: isinstance(value, Mapping)),
    "create": ("a mapping", lambda value: isinstance(value, Mapping)),
    "prefix": ("the beginning of names", lambda value: isinstance(value, str)),
    "adaptor": ("the name of a teacher", lambda value: isinstance(value, str)),
}
"""Options of the project's own sources: what each is, and whether a value can be that."""


def build_teacher(name: str, config: TeacherConfig, device: Any = "cpu") -> "FrozenTeacher":
    """Build the teacher that a recipe calls ``name``, with its weights, on ``device``.

    A dtype that is still ``auto`` is the device's own.

    Raises:
        ConfigError: options that do not fit the preset or its source.
        WeightsError: weights that are missing, damaged, or belong to another model.
    """
    from radio_distill.system.precision import resolved_dtype

    from .base import FrozenTeacher
    from .weights import fingerprint

    try:
        preset = resolve(config)
        is_random = preset.random and not config.weights
        tower = _random(preset, config) if is_random else _loaded(preset, config)
    except (ConfigError, WeightsError) as error:
        raise type(error)(f"teachers.{name}: {error}") from error
    spec = _spec(name, preset, "" if is_random else fingerprint(tower))
    dtype = resolved_dtype(config.dtype, device)
    return FrozenTeacher(tower, spec, dtype, config.micro_batch).to(device)


def teacher_spec(name: str, config: TeacherConfig) -> TeacherSpec:
    """Describe a teacher without reading its weights (so without their hash)."""
    try:
        return _spec(name, resolve(config), "")
    except (ConfigError, WeightsError) as error:
        raise type(error)(f"teachers.{name}: {error}") from error


def build_module(config: TeacherConfig, device: Any = "meta") -> "nn.Module":
    """Build the encoder with random weights, by default on the meta device, to count what it costs.

    Its ``forward`` takes normalised pixels and returns (summary or None, map).
    """
    import torch

    preset = resolve(config)
    with torch.device(device):
        return _source(preset).build(preset).eval()


def build_text_encoder(
    name: str, config: TeacherConfig, device: Any = "cpu", weights: str = ""
) -> "TextEncoder":
    """Build the text tower that shares a space with a teacher's summary, for zero-shot labels.

    Args:
        name: the teacher's name in the recipe.
        config: the teacher's section of the recipe.
        device: where to run.
        weights: open_clip file of the whole model; empty takes the teacher's own where that is
            one, else the hub's.
    """
    from .sources.open_clip import build_text_encoder
    from .weights import local_path

    try:
        preset = resolve(config)
        path = weights or (config.weights if preset.source == "open_clip" else "")
        return build_text_encoder(preset, local_path(path) if path else None, device)
    except (ConfigError, WeightsError) as error:
        raise type(error)(f"teachers.{name}: {error}") from error


def resolve(config: TeacherConfig) -> Preset:
    """Return the preset that a recipe asks for, with its options and every measure filled in."""
    named = TEACHERS.get(config.preset)
    if not isinstance(named, Preset):
        raise ConfigError(
            f"preset {config.preset} is a {type(named).__name__}, not a teachers.presets.Preset"
        )
    if "model" in config.options and named.model:
        raise ConfigError(
            f"preset {config.preset} is {named.model}; for another take preset: {named.source}"
        )
    source = _source(named)
    known = [*FIELDS, *source.ARGUMENTS]
    for key in config.options:
        if key not in known:
            raise ConfigError(
                f"preset {config.preset} has no option {key!r} ({nearest(key, known)})"
            )
    _check_types(config)
    fields = {key: value for key, value in config.options.items() if key in FIELDS}
    for key in fields.keys() & {"mean", "std"}:
        fields[key] = tuple(float(value) for value in fields[key])
    arguments = {key: value for key, value in config.options.items() if key in source.ARGUMENTS}
    preset = replace(named, **fields, arguments={**named.arguments, **arguments})
    if not (preset.model or preset.arguments or config.weights):
        raise ConfigError(f"options.model is missing: which model of {config.preset}?")
    if arguments or not preset.channels:
        _check_local(config)  # since `complete` may read the weights
        from .measuring import measured

        if arguments:  # which the preset's own stride does not know of
            preset = replace(preset, patch_size=0)
        completed = source.complete(preset, config.weights)
        if not isinstance(completed, Preset):
            raise ConfigError(
                f"source {preset.source!r}: complete returns a {type(completed).__name__}, not the "
                "Preset with what it has filled in"
            )
        found = _known(measured(completed, source.build))
        if "native_size" in config.options:
            _check_multiple(config.options["native_size"], found.patch_size)
        return found
    _check_multiple(preset.native_size, preset.patch_size)
    return _known(preset)


def _check_multiple(native_size: int, patch_size: int) -> None:
    if native_size % patch_size:
        near = max(round(native_size / patch_size), 1) * patch_size
        raise ConfigError(
            f"options.native_size: {native_size} is not a multiple of the patch {patch_size} "
            f"(nearest {near})"
        )


def _known(preset: Preset) -> Preset:
    """Raise ConfigError unless a preset says how its pixels are normalised."""
    for field in ("mean", "std"):
        if not getattr(preset, field):
            raise ConfigError(
                f"options.{field} is missing, for neither preset nor source names it; three "
                "numbers, for pixels in [0, 1]"
            )
    return preset


def _check_types(config: TeacherConfig) -> None:
    """Raise ConfigError, in one line, for an option of a type that cannot be meant."""
    for key, value in config.options.items():
        wanted, fits = _TYPES.get(key, ("", lambda _: True))
        if not fits(value):
            raise ConfigError(f"options.{key}: {value!r:.60} is not {wanted}")


def _source(preset: Preset) -> Any:
    name = SOURCES.get(preset.source, preset.source)
    try:
        source = import_module(name)
    except Exception as error:  # a module of the user's may fail with any
        reason = f"{type(error).__name__}: {reason_of(error)}"[:200]
        raise ConfigError(f"source {name!r} cannot be imported: {reason}") from error
    if preset.source not in SOURCES:
        what = f"source {name!r}"
        check_has(what, source, ("ARGUMENTS", *_FUNCTIONS))
        if not isinstance(source.ARGUMENTS, Mapping):
            raise ConfigError(
                f"{what}: ARGUMENTS is a {type(source.ARGUMENTS).__name__}, not a mapping of its "
                "options to what each is"
            )
        for function, takes in _FUNCTIONS.items():
            check_takes(f"{what}: {function}", getattr(source, function), takes)
    return source


def _random(preset: Preset, config: TeacherConfig) -> "nn.Module":
    import torch

    if config.sha256:
        raise ConfigError(
            f"sha256: preset {config.preset} has random weights and no file; drop the sum, or name "
            "a file in `weights`"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _source(preset).build(preset)


def _loaded(preset: Preset, config: TeacherConfig) -> "nn.Module":
    from .packaged import packaged_weights
    from .weights import check_sha256, local_path, summed_files

    source = _source(preset)
    if config.weights:
        _check_local(config)
        return source.load(preset, local_path(config.weights))
    path = packaged_weights(preset.package) if preset.package else source.locate(preset)
    if config.sha256:
        check_sha256(summed_files(path), config.sha256, "sha256")
    return source.load(preset, path)


def _check_local(config: TeacherConfig) -> None:
    """Raise WeightsError where the weights that the recipe names have another sum than it says."""
    from .weights import check_sha256, local_path, summed_files

    if config.weights and config.sha256:
        check_sha256(summed_files(local_path(config.weights)), config.sha256, "sha256")


def _spec(name: str, preset: Preset, weights_hash: str) -> TeacherSpec:
    assert preset.mean, f"{name}: resolve knows its mean"
    assert preset.std, f"{name}: resolve knows its std"
    return TeacherSpec(
        name=name,
        channels=preset.channels,
        summary_channels=preset.summary_channels,
        patch_size=preset.patch_size,
        native_size=(preset.native_size, preset.native_size),
        max_size=preset.max_size,
        mean=preset.mean,
        std=preset.std,
        fixed_size=preset.fixed_size,
        weights_hash=weights_hash,
        licence=preset.licence,
    )
