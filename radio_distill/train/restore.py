"""Students out of checkpoints, without their teachers."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from ..errors import CheckpointError, WeightsError
from ..models.heads import DistilledStudent, build_student
from .checkpoint import EMA, OPTIMIZER, STUDENT, Checkpoint

HEADS = "adaptors.", "inner."
"""How the names of the heads' tensors begin."""


def load_student(checkpoint: Checkpoint, device: torch.device) -> DistilledStudent:
    """Rebuild the student of a checkpoint with its heads, in evaluation mode."""
    # The checkpoint holds every weight: what the student once started from is not needed.
    config = replace(checkpoint.recipe.student, pretrained="")
    learned = checkpoint.recipe.loss.weighting == "uncertainty"
    model = build_student(config, checkpoint.teachers, learned_weights=learned)
    load_weights(model, checkpoint)
    return model.to(device).eval()


def load_weights(model: DistilledStudent, checkpoint: Checkpoint, with_heads: bool = True) -> None:
    """Load a checkpoint's student into a model; without its heads, the model keeps its own.

    Raises:
        WeightsError: where the recipe describes another student than the checkpoint holds.
    """
    tensors = checkpoint.student_tensors()
    if not with_heads:
        found, own = tensors, model.state_dict()
        tensors = {name: value for name, value in found.items() if not name.startswith(HEADS)}
        tensors |= {name: value for name, value in own.items() if name.startswith(HEADS)}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise WeightsError(
            f"{checkpoint.folder} holds another student than the recipe describes: {first}"
        ) from error


def check_tensors(checkpoint: Checkpoint, model: DistilledStudent) -> None:
    """Raise CheckpointError where a file of a checkpoint has not the tensors of this student.

    Sums prove that files are as they were written, not that they were written for this.
    """
    weights = {name: value.shape for name, value in model.state_dict().items()}
    moments = {name: value.shape for name, value in model.named_parameters()}
    for part in (STUDENT, EMA):
        if checkpoint.has(part):
            found = {name: value.shape for name, value in checkpoint.tensors(part).items()}
            _check_same(checkpoint, part, found, weights)
    optimizer = checkpoint.tensors(OPTIMIZER)
    step = optimizer.pop("step", None)
    if step is None or step.shape != () or step.is_floating_point() or int(step) < 0:
        raise CheckpointError(f"{checkpoint.folder}: {OPTIMIZER} does not say its step")
    for name, value in optimizer.items():
        moment, _, parameter = name.partition("/")
        if not value.is_floating_point():
            raise CheckpointError(f"{checkpoint.folder}: {OPTIMIZER} has a {moment} of integers")
        _check_same(checkpoint, OPTIMIZER, {parameter: value.shape}, moments, whole=False)


def _check_same(
    checkpoint: Checkpoint,
    part: str,
    found: Mapping[str, torch.Size],
    expected: Mapping[str, torch.Size],
    whole: bool = True,
) -> None:
    wrong = [name for name, shape in found.items() if expected.get(name) != shape]
    wrong += [name for name in expected if whole and name not in found]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.folder}: {part} has not the tensors of this student: {wrong[0]} and "
            f"{len(wrong) - 1} more differ"
        )
