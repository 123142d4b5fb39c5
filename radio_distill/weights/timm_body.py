"""Gives a student that is a timm model the weights of a file, a folder, or a run.

Files have timm's names, or those of the authors that timm converts (DINOv3's, EUPE's and many
more). What is behind the student's map (classifier, pooling, stages that are left out) is left
behind. An exported student is a timm folder.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..config import StudentConfig
from ..errors import WeightsError
from ..models.timm_student import TimmStudent, create_model
from ..train.restore import load_student
from .files import (
    find_checkpoint,
    named_as,
    read_checkpoint,
    read_json,
    refuse_differences,
    tensors_of,
)


def load_timm_body(student: TimmStudent, path: Path, config: StudentConfig) -> None:
    """Load what is at ``path``, which is there; mean and std of pixels too, where it says them.

    Raises:
        WeightsError: where it holds no weights, or those of another architecture.
    """
    is_folder = path.is_dir()
    if is_folder and not (path / "config.json").is_file():
        tensors = load_student(find_checkpoint(path), torch.device("cpu")).student.state_dict()
        own = {name: getattr(student, name) for name in ("mean", "std") if getattr(config, name)}
        _load(student, tensors | own, str(path), config)
        return
    with torch.device("meta"):
        model, _ = create_model(config)
    wanted = model.state_dict()
    state = named_as(tensors_of(read_checkpoint(path), path), wanted, str(path))
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert and any(key not in state or state[key].shape != wanted[key].shape for key in wanted):
        try:
            state = convert(dict(state), model)
        except (KeyError, ValueError, RuntimeError, AttributeError) as error:
            raise WeightsError(
                f"{path} does not hold weights of {config.architecture}: timm cannot read them"
            ) from error
    tensors = student.from_timm(state)
    tensors |= {name: getattr(student, name) for name in ("mean", "std")}
    if is_folder:
        settings = read_json(path / "config.json")
        published = settings.get("pretrained_cfg", settings)
        for name in ("mean", "std"):
            if published.get(name) and not getattr(config, name):
                tensors[name] = torch.tensor(published[name]).view(-1, 1, 1)
    _load(student, tensors, str(path), config)


def _load(
    student: TimmStudent, tensors: Mapping[str, Tensor], where: str, config: StudentConfig
) -> None:
    found, wanted = (
        {key: value.shape for key, value in state.items()}
        for state in (tensors, student.state_dict())
    )
    refuse_differences(found, wanted, where, config.architecture)
    student.load_state_dict(tensors)
