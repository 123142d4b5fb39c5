"""From a teacher's section of a recipe to a preset with everything filled in."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from radio_distill.config import TeacherConfig
from radio_distill.errors import ConfigError, WeightsError
from radio_distill.registry import Registry, nearest

from .presets import PRESETS, Preset
from .sources import find_source

TEACHERS = Registry("teacher", {name: f"teachers.presets:{name}" for name in PRESETS})

FIELDS = {
    "model": "the model's name in its library; timm also hf-hub:OWNER/NAME and local-dir:PATH",
    "native_size": "side of the images it was trained at, in pixels",
    "mean": "mean of each channel of pixels in [0, 1]: three numbers, or one for each band it sees",
    "std": "standard deviation of each channel of pixels in [0, 1], likewise",
    "max_size": "longest side that it takes, in pixels",
    "fixed_size": "true where it takes its native size alone",
    "licence": "licence of the weights, for the model card of the student",
    "text": "open_clip name of the text tower that shares its summary's space",
}
"""Preset fields that ``options`` may set, with any source: what each is."""

RGB_SOURCES = ("open_clip", "transformers", "radio", "croco")
"""Sources whose models are built for red, green and blue."""
RENAMED = {"adaptor": "head"}
"""Options that recipes of earlier versions name otherwise."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_is_number, value))


SUMMARIES = ("token", "pool", "token_and_mean", "none")
"""Where a model of timm or transformers may take its summary from."""

Kind = tuple[str, Callable[[Any], bool]]

_NAME: Kind = ("a name", lambda value: isinstance(value, str))
_PIXELS: Kind = ("a number of pixels", lambda value: _is_whole(value) and value > 0)
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("model", "text", "head", "licence", "prefix"), _NAME),
    **dict.fromkeys(("native_size", "max_size"), _PIXELS),
    "mean": ("numbers, one for each channel: [0.485, 0.456, 0.406]", _are_numbers),
    "std": ("numbers above 0", lambda v: _are_numbers(v) and min(v) > 0),
    "fixed_size": ("true or false", lambda value: isinstance(value, bool)),
    **dict.fromkeys(("blocks", "stage"), ("a whole number", _is_whole)),
    "summary": (", ".join(SUMMARIES), lambda value: value in SUMMARIES),
    **dict.fromkeys(("config", "create"), ("a mapping", lambda v: isinstance(v, Mapping))),
}
"""Options of the project's own sources: what each is, and whether a value can be that."""


@contextmanager
def naming_teacher(name: str) -> Iterator[None]:
    """Say in an error which teacher of the recipe it is about."""
    try:
        yield
    except (ConfigError, WeightsError) as error:
        raise type(error)(f"teachers.{name}: {error}") from error


def chosen(config: TeacherConfig) -> Preset:
    """Return the preset that a recipe names, with its options, and nothing measured yet.

    Raises:
        ConfigError: options that do not fit the preset or its source.
    """
    named = TEACHERS.get(config.preset)
    if not isinstance(named, Preset):
        kind = type(named).__name__
        raise ConfigError(f"preset {config.preset} is a {kind}, not a teachers.presets.Preset")
    source = find_source(named.source)
    options = _options(config)
    _check_options(options, named, source.ARGUMENTS, config.preset)
    arguments = {key: value for key, value in options.items() if key in source.ARGUMENTS}
    fields = {key: value for key, value in options.items() if key in FIELDS}
    for key in fields.keys() & {"mean", "std"}:
        fields[key] = tuple(float(value) for value in fields[key])
    return replace(named, **fields, arguments={**named.arguments, **arguments})


def resolve(config: TeacherConfig) -> Preset:
    """Return the preset that a recipe asks for, with its options and every measure filled in.

    Raises:
        ConfigError: options that do not fit the preset or its source, or the student of a stage,
            which :func:`teachers.teacher_spec` describes.
        WeightsError: weights that must be read for it, and are missing or damaged.
    """
    if config.stage:
        raise ConfigError(f"only its recipe knows the student of {config.stage}; set `weights`")
    preset, options = chosen(config), _options(config)
    source = find_source(preset.source)
    takes_arguments = not options.keys().isdisjoint(source.ARGUMENTS)
    if not (preset.model or preset.arguments or config.weights):
        raise ConfigError(f"options.model is missing: which model of {config.preset}?")
    if not takes_arguments and preset.channels:
        _check_multiple(preset.native_size, preset.patch_size)
        return _with_normalisation(preset)
    from .measuring import measured_once
    from .weights import check_local

    check_local(config)  # since `complete` may read the weights
    if takes_arguments:  # which the preset's own stride does not know of
        preset = replace(preset, patch_size=0)
    completed = source.complete(preset, config.weights)
    if not isinstance(completed, Preset):
        kind = type(completed).__name__
        raise ConfigError(
            f"source {preset.source!r}: complete returns a {kind}, not the Preset with what it has "
            "filled in"
        )
    preset = _with_normalisation(measured_once(completed, source.build))
    if "native_size" in options:
        _check_multiple(options["native_size"], preset.patch_size)
    return preset


def _options(config: TeacherConfig) -> dict[str, Any]:
    return {RENAMED.get(key, key): value for key, value in config.options.items()}


def _check_options(
    options: Mapping[str, Any], named: Preset, arguments: Mapping[str, str], preset: str
) -> None:
    """Raise ConfigError for an option that is unknown, or of a type that cannot be meant."""
    if "model" in options and named.model:
        raise ConfigError(
            f"preset {preset} is {named.model}; for another take preset: {named.source}"
        )
    known = [*FIELDS, *arguments]
    for key, value in options.items():
        if key not in known:
            raise ConfigError(f"preset {preset} has no option {key!r} ({nearest(key, known)})")
        wanted, fits = _KINDS.get(key, ("", lambda _: True))
        if not fits(value):
            raise ConfigError(f"options.{key}: {value!r:.60} is not {wanted}")


def _check_multiple(native_size: int, patch_size: int) -> None:
    if native_size % patch_size:
        near = max(round(native_size / patch_size), 1) * patch_size
        raise ConfigError(
            f"options.native_size: {native_size} is not a multiple of the patch {patch_size} "
            f"(nearest {near})"
        )


def _with_normalisation(preset: Preset) -> Preset:
    """Raise ConfigError unless a preset says how its pixels are normalised."""
    for field in ("mean", "std"):
        if not getattr(preset, field):
            raise ConfigError(
                f"options.{field} is missing, for neither preset nor source names it; a "
                "number for each channel, for pixels in [0, 1]"
            )
    assert preset.mean, "checked above"
    assert preset.std, "likewise"
    if len(preset.mean) != len(preset.std):
        raise ConfigError(
            f"options.std: {len(preset.std)} numbers, and options.mean has {len(preset.mean)}"
        )
    if len(preset.mean) != 3 and preset.source in RGB_SOURCES:
        raise ConfigError(
            f"options.mean: models of {preset.source} see three bands; choose them with bands: "
            "[3, 2, 1], or take a timm model with options.create.in_chans"
        )
    return preset
