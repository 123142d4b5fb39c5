"""Where students come from: runs, exports, published RADIO models, and configs.

:func:`load` and :func:`from_config` are ``radio_distill.load`` and ``radio_distill.from_config``.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .config import Recipe, StudentConfig, build, for_stage
from .config import load as load_recipe
from .errors import WeightsError
from .export.folded import FoldedStudent, folded
from .models.backbone import StudentEncoder, as_encoder
from .models.body import Body
from .models.heads import build_body, build_student, head_for
from .models.spectral import fold
from .system.files import refuse_unreadable
from .train import checkpoint as checkpoints
from .train.checkpoint import Checkpoint
from .train.restore import load_student
from .types import TeacherSpec
from .weights.files import find_checkpoint, read_checkpoint, read_json
from .weights.pretrained import initialise
from .weights.radio import read_radio, student_config

DESCRIPTION = "radio_distill.json"
"""What an export says of its student and its heads."""


@contextmanager
def _as_written() -> Iterator[None]:
    """Build in float32 and on the CPU, whatever this process makes new tensors of.

    Its generator stays where it is: weights that are drawn are overwritten.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_default_dtype(dtype)


@_as_written()
def load(
    path: str | Path, heads: Sequence[str] | None = None, device: torch.device | str = "cpu"
) -> StudentEncoder:
    """Load a trained student, in evaluation mode.

    Args:
        path: a run folder (its last stage is taken), a stage folder, a checkpoint, a folder
            exported in transformers' format, or a published RADIO model: its folder, or a
            torch.hub file.
        heads: teachers whose heads are kept; None for all, empty for none.
        device: where to.

    Raises:
        WeightsError: where there is nothing, or weights of another model.
        CheckpointError: where a folder is none of these, or may not be read.
        UnknownNameError: where there is no head of a name.
    """
    path = _checked(path)
    if (path / DESCRIPTION).is_file():
        model = _read_export(path)
    elif _may_be_radio(path):
        model = _read_radio(path)
    else:
        model = _read_run(find_checkpoint(path), with_heads=heads is None or len(heads) > 0)
    if heads is not None:
        model.keep(heads)
    return model.requires_grad_(True).to(device).eval()


def describe(path: str | Path, heads: Sequence[str] | None = None) -> StudentEncoder:
    """Return the student that :func:`load` would, of which only mean and std of pixels are read.

    All else is on the meta device: what it is follows from the recipe of a checkpoint, or from what
    an export says beside its weights. A published RADIO model says too little there, and is loaded.
    Checksums are not verified. Arguments and errors are those of :func:`load`.
    """
    path = _checked(path)
    if (path / DESCRIPTION).is_file():
        model = _describe_export(path)
    elif _may_be_radio(path):
        model = _read_radio(path)
    else:
        model = _describe_run(find_checkpoint(path, verified=False))
    if heads is not None:
        model.keep(heads)
    return model.eval()


def without_data(
    config: StudentConfig, teachers: Mapping[str, TeacherSpec], native_size: int
) -> StudentEncoder:
    """Build a student with all its heads on the meta device."""
    with torch.device("meta"):
        return as_encoder(build_student(config, teachers), config, teachers, native_size)


def from_config(
    config: StudentConfig | Recipe | str | Path, device: torch.device | str = "cpu"
) -> StudentEncoder:
    """Build an untrained student with random weights, without teachers, files or heads.

    Args:
        config: a student's section, a recipe, or the file of one. Of a recipe, whose last stage's
            student it is, it has a summary token for each teacher, else one.
        device: where to.

    Raises:
        ConfigError: where fields do not fit, or there is no such file.
    """
    if isinstance(config, (str, Path)):
        config = load_recipe(config)
    num_summary_tokens = 1
    if isinstance(config, Recipe):
        config = for_stage(config)
        num_summary_tokens, config = len(config.teachers), config.student
    config = replace(config, pretrained="")
    student = build_body(config, num_summary_tokens)
    slots = range(1 if student.shares_summary else num_summary_tokens)
    return StudentEncoder(student, config, summary_slots=slots).to(device).eval()


def _checked(path: str | Path) -> Path:
    path = Path(os.path.expanduser(path))  # pathlib's fails where there is no home
    refuse_unreadable(path, checkpoints.UnreadableError)
    if not path.exists():
        raise WeightsError(f"nothing at {path}: expected a run, a checkpoint or a model folder")
    return path


def _may_be_radio(path: Path) -> bool:
    return path.is_file() or (path / "config.json").is_file()


def _read_run(checkpoint: Checkpoint, with_heads: bool) -> StudentEncoder:
    if with_heads:
        student = folded(checkpoint)
    else:  # no statistics are needed, and a normalizer may be one that cannot be folded
        model = load_student(checkpoint, torch.device("cpu"))
        fold(model)
        student = FoldedStudent(model, checkpoint)
    return StudentEncoder(
        student.model.student,
        student.plain_config,
        checkpoint.teachers,
        student.model.heads if with_heads else {},
        student.summary_slots,
        max(student.preferred_size),
    )


def _describe_run(checkpoint: Checkpoint) -> StudentEncoder:
    recipe = checkpoint.recipe
    size = max(recipe.stages[checkpoint.stage].largest_size)
    model = without_data(recipe.student.plain, checkpoint.teachers, size)
    for name, values in checkpoint.student_tensors(("student.mean", "student.std")).items():
        setattr(model.student, name.removeprefix("student."), values)
    return model


class _Export(NamedTuple):
    """What an exported folder says beside its weights."""

    config: StudentConfig
    teachers: dict[str, TeacherSpec]
    summary_slots: list[int]
    native_size: int
    settings: Mapping[str, Any]
    """Its ``config.json``, of transformers or of timm."""


def _exported(folder: Path) -> _Export:
    description = read_json(folder / DESCRIPTION)
    settings = read_json(folder / "config.json")
    try:
        config: StudentConfig = build(StudentConfig, description["student"])
        teachers = checkpoints.specs_of(description["teachers"])
        slots = list(description["summary_slots"].values())
        published = settings.get("pretrained_cfg", {})
        native_size = settings.get("image_size") or max(published["input_size"][1:])
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{folder}/{DESCRIPTION} is not what an export writes: {error}"
        ) from error
    # Sum and grid are those of what its training started from.
    config = replace(config, pretrained_sha256="", pretrained_grid=())
    return _Export(config, teachers, slots, native_size, settings)


def _describe_export(folder: Path) -> StudentEncoder:
    export = _exported(folder)
    model = without_data(export.config, export.teachers, export.native_size)
    model.summary_slots = export.summary_slots
    published = export.settings.get("pretrained_cfg", {})
    for name in ("mean", "std"):
        values = export.settings.get(f"norm_{name}") or published.get(name)
        if values is None:
            raise WeightsError(f"{folder}/config.json has no {name} of pixels; export it again")
        setattr(model.student, name, torch.tensor(values).view(-1, 1, 1))
    return model


def _read_export(folder: Path) -> StudentEncoder:
    config, teachers, slots, native_size, _ = _exported(folder)
    student = _initialised(config, folder, len(teachers))
    heads = {name: head_for(student, spec, config) for name, spec in teachers.items()}
    file = folder / "adaptors.safetensors"
    try:
        nn.ModuleDict(heads).load_state_dict(read_checkpoint(file))
    except RuntimeError as error:
        raise WeightsError(
            f"{file} does not hold the heads that are described beside it"
        ) from error
    return StudentEncoder(student, config, teachers, heads, slots, native_size)


def _read_radio(path: Path) -> StudentEncoder:
    radio = read_radio(path)
    config, settings = student_config(radio, str(path)), radio.config
    student = _initialised(config, path, settings["num_cls_tokens"])
    slots, native_size = settings["summary_idxs"], settings["image_size"]
    return StudentEncoder(student, config, summary_slots=slots, native_size=native_size)


def _initialised(config: StudentConfig, path: Path, num_summary_tokens: int) -> Body:
    config = replace(config, pretrained=str(path))
    return build_body(config, num_summary_tokens, initialise=initialise)
