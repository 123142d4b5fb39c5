"""Where backbones come from: runs, exports, published RADIO models, and configs.

:func:`load` and :func:`from_config` are ``radio_distill.load`` and ``radio_distill.from_config``.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .config import Recipe, StudentConfig, build
from .config import load as load_recipe
from .errors import CheckpointError, WeightsError
from .export.folded import FoldedStudent, folded
from .export.transformers import preferred_size
from .models.backbone import Backbone
from .models.heads import Adaptor
from .models.spectral import fold
from .models.student import Student
from .train import checkpoint as checkpoints
from .train.checkpoint import Checkpoint, UnreadableError
from .train.restore import load_student
from .weights.files import read_checkpoint, read_json
from .weights.radio import read_radio, student_config


def load(
    path: str | Path, adaptors: Sequence[str] | None = None, device: torch.device | str = "cpu"
) -> Backbone:
    """Load a trained student, in evaluation mode.

    Args:
        path: a run folder (its last stage is taken), a stage folder, a checkpoint, a folder
            exported in transformers' format, or a published RADIO model: its folder, or a
            torch.hub file.
        adaptors: teachers whose heads are kept; None for all, empty for none.
        device: where to.

    Raises:
        WeightsError: where there is nothing, or weights of another model.
        CheckpointError: where a folder is none of these, or may not be read.
        UnknownNameError: where there is no adaptor of a name.
    """
    path = Path(os.path.expanduser(path))  # pathlib's fails where there is no home
    checkpoints.refuse_unreadable(path)
    if not path.exists():
        raise WeightsError(f"nothing at {path}: expected a run, a checkpoint or a model folder")
    if (path / "radio_distill.json").is_file():
        model = _read_export(path)
    elif path.is_file() or (path / "config.json").is_file():
        model = _read_radio(path)
    else:
        model = _read_run(find_checkpoint(path), heads=adaptors is None or len(adaptors) > 0)
    if adaptors is not None:
        model.keep(adaptors)
    return model.requires_grad_(True).to(device).eval()


def from_config(
    config: StudentConfig | Recipe | str | Path, device: torch.device | str = "cpu"
) -> Backbone:
    """Build an untrained student with random weights, without teachers, files or heads.

    Args:
        config: a student's section, a recipe, or the file of one. Of a recipe it has a summary
            token for each teacher, else one.
        device: where to.

    Raises:
        ConfigError: where fields do not fit, or there is no such file.
    """
    if isinstance(config, (str, Path)):
        config = load_recipe(config)
    num_summary_tokens = 1
    if isinstance(config, Recipe):
        num_summary_tokens, config = len(config.teachers), config.student
    config = replace(config, pretrained="")
    student = Student(config, num_summary_tokens)
    return Backbone(student, config, summary_slots=range(num_summary_tokens)).to(device).eval()


def find_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint, the newest of a stage folder, or that of a run's last stage.

    Raises:
        CheckpointError: where there is none, or a run has several last stages.
    """
    stages = checkpoints.stage_folders(path)
    if stages:
        last = stages[-1].name.partition("-")[0]
        rivals = [stage.name for stage in stages if stage.name.partition("-")[0] == last]
        if len(rivals) > 1:
            raise CheckpointError(
                f"{path} holds several last stages; name one: {', '.join(rivals)}"
            )
        path = stages[-1]
    try:
        return checkpoints.find(path)
    except UnreadableError:
        raise
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} is no run, stage or checkpoint folder, nor a model folder: {error}"
        ) from error


def _read_run(checkpoint: Checkpoint, heads: bool) -> Backbone:
    if heads:
        found = folded(checkpoint)
    else:  # no statistics are needed, and a normalizer may be one that cannot be folded
        model = load_student(checkpoint, torch.device("cpu"))
        fold(model)
        found = FoldedStudent(model, checkpoint)
    return Backbone(
        found.model.student,
        replace(
            found.config,
            pretrained="",
            pretrained_sha256="",
            pretrained_grid=(),
            spectral_reparametrization=False,
        ),
        checkpoint.teachers,
        dict(found.model.adaptors.items()) if heads else {},
        found.summary_slots,
        max(preferred_size(found)),
    )


def _read_export(folder: Path) -> Backbone:
    description = read_json(folder / "radio_distill.json")
    try:
        config: StudentConfig = build(StudentConfig, description["student"])
        teachers = checkpoints.specs_of(description["teachers"])
        slots = list(description["summary_slots"].values())
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{folder}/radio_distill.json is not what an export writes: {error}"
        ) from error
    # Sum and grid are those of what its training started from.
    config = replace(config, pretrained_sha256="", pretrained_grid=())
    student = Student(replace(config, pretrained=str(folder)), len(teachers))
    adaptors = {
        name: Adaptor(student.embed_dim, spec.channels, spec.summary_channels, config)
        for name, spec in teachers.items()
    }
    file = folder / "adaptors.safetensors"
    try:
        nn.ModuleDict(adaptors).load_state_dict(read_checkpoint(file))
    except RuntimeError as error:
        raise WeightsError(
            f"{file} does not hold the heads that are described beside it"
        ) from error
    native_size = read_json(folder / "config.json")["image_size"]
    return Backbone(student, config, teachers, adaptors, slots, native_size)


def _read_radio(path: Path) -> Backbone:
    radio = read_radio(path)
    config, settings = student_config(radio, str(path)), radio.config
    student = Student(replace(config, pretrained=str(path)), settings["num_cls_tokens"])
    slots, native_size = settings["summary_idxs"], settings["image_size"]
    return Backbone(student, config, summary_slots=slots, native_size=native_size)
