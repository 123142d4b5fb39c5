"""Frozen encoders from timm, open_clip, transformers, RADIO checkpoints and runs, by name.

``TEACHERS`` lists presets and sources; :func:`build_teacher` makes one ready to encode;
:func:`teacher_spec` and :func:`build_module` tell a planner what it will be, without weights. A
teacher of one's own is a :class:`~teachers.presets.Preset` under the entry point group
``radio_distill.teachers``; its ``source`` may be a module of one's own (:mod:`teachers.sources`).

Importing this package imports no model library, nor torch.
"""

from typing import TYPE_CHECKING, Any

from radio_distill.config import Recipe, TeacherConfig, for_stage
from radio_distill.errors import ConfigError
from radio_distill.types import TeacherSpec

from .options import FIELDS, TEACHERS, chosen, naming_teacher, resolve
from .presets import Preset
from .sources import SOURCES, find_source

if TYPE_CHECKING:
    from torch import nn

    from .base import FrozenTeacher

PROJECT = "radio-distill"

__all__ = [
    "FIELDS",
    "SOURCES",
    "TEACHERS",
    "build_module",
    "build_teacher",
    "resolve",
    "teacher_spec",
    "teacher_specs",
]


def build_teacher(
    name: str, config: TeacherConfig, device: Any = "cpu", compiled: bool = False
) -> "FrozenTeacher":
    """Build the teacher that a recipe calls ``name``, with its weights, on ``device``.

    A dtype that is still ``auto`` is the device's own. ``compiled`` has its blocks compiled, which
    takes a minute or so when they are first run.

    Raises:
        ConfigError: options that do not fit the preset or its source.
        WeightsError: weights that are missing, damaged, or belong to another model.
    """
    import torch

    from radio_distill.system.compiled import compile_blocks
    from radio_distill.system.precision import resolved_dtype

    from .base import FrozenTeacher

    # What else is made with random numbers must not depend on which teachers a process has.
    with naming_teacher(name), torch.random.fork_rng(devices=[]):
        preset = resolve(config)
        is_random = preset.random and not config.weights
        tower, weights_hash = _random(preset, config) if is_random else _loaded(preset, config)
    spec = _spec(name, preset, config, weights_hash)
    dtype = resolved_dtype(config.dtype, device)
    if compiled:
        compile_blocks(tower)
    return FrozenTeacher(tower, spec, dtype, config.micro_batch).to(device)


def teacher_spec(name: str, config: TeacherConfig, recipe: Recipe | None = None) -> TeacherSpec:
    """Describe a teacher without reading its weights (so without their hash).

    ``recipe`` has the stage whose student it is, where it is one.
    """
    with naming_teacher(name):
        return _spec(name, _preset(config, recipe), config, "")


def teacher_specs(recipe: Recipe, of_stage: str = "") -> dict[str, TeacherSpec]:
    """Describe the teachers of a stage's student, by name; without a stage, of the last one's.

    Raises ConfigError or WeightsError for one that cannot be described.
    """
    return {
        name: teacher_spec(name, recipe.teachers[name], recipe)
        for name in for_stage(recipe, of_stage).teachers
    }


def build_module(
    config: TeacherConfig, device: Any = "meta", recipe: Recipe | None = None
) -> "nn.Module":
    """Build the encoder with random weights, by default on the meta device, to count what it costs.

    Its ``forward`` takes normalised pixels and returns (summary or None, map). ``recipe`` is as in
    :func:`teacher_spec`.
    """
    import torch

    preset = _preset(config, recipe)
    with torch.device(device):
        return find_source(preset.source).build(preset).eval()


def _preset(config: TeacherConfig, recipe: Recipe | None) -> Preset:
    if not config.stage or recipe is None:
        return resolve(config)
    from .sources.student import preset_of_stage

    part = for_stage(recipe, config.stage)
    size = max(part.stages[config.stage].largest_size)
    return preset_of_stage(chosen(config), part.student, teacher_specs(recipe, config.stage), size)


def _random(preset: Preset, config: TeacherConfig) -> "tuple[nn.Module, str]":
    import torch

    if config.sha256:
        raise ConfigError(
            f"sha256: preset {config.preset} has random weights and no file; drop the checksum, or "
            "name a file in `weights`"
        )
    torch.manual_seed(0)
    return find_source(preset.source).build(preset), ""


def _loaded(preset: Preset, config: TeacherConfig) -> "tuple[nn.Module, str]":
    """Return a tower with its weights, maybe still in their file, and their fingerprint."""
    from radio_distill.system.trust import check_sha256
    from radio_distill.weights.files import checksummed_files, files_of

    from .weights import FingerprintNote, check_local, fingerprint, local_path

    source = find_source(preset.source)
    path = local_path(config.weights) if config.weights else source.locate(preset)
    if config.weights:
        check_local(config)
    elif config.sha256:
        check_sha256(checksummed_files(path), config.sha256, "sha256")
    if preset.source not in SOURCES or preset.source == "student":
        tower = source.load(preset, path)  # of files that are not all known here
        return tower, fingerprint(tower)
    note = FingerprintNote(preset, files_of(path))
    tower = source.load(preset, path)
    return tower, note.fingerprint(lambda: fingerprint(tower))


def _spec(name: str, preset: Preset, config: TeacherConfig, weights_hash: str) -> TeacherSpec:
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
        bands=config.bands,
    )
