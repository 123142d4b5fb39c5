"""Students and normalizers out of checkpoints, without their teachers."""

from dataclasses import replace

import torch

from ..errors import WeightsError
from ..models.distilled import DistilledStudent, build_student
from ..protocols import Normalizer
from .checkpoint import STATISTICS, Checkpoint
from .statistics import build_normalizers, load_normalizers


def load_student(checkpoint: Checkpoint, device: torch.device) -> DistilledStudent:
    """Rebuild the student of a checkpoint with its heads, in evaluation mode."""
    # The checkpoint holds every weight: what the student once started from is not needed.
    config = replace(checkpoint.recipe.student, pretrained="")
    learned = checkpoint.recipe.loss.weighting == "uncertainty"
    model = build_student(config, checkpoint.teachers, learned_weights=learned)
    load_weights(model, checkpoint)
    return model.to(device).eval()


def load_weights(model: DistilledStudent, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's student into a model.

    Raises:
        WeightsError: where the recipe describes another student than the checkpoint holds.
    """
    try:
        model.load_state_dict(checkpoint.student_tensors())
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise WeightsError(
            f"{checkpoint.folder} holds another student than the recipe describes: {first}"
        ) from error


def normalizers_of(checkpoint: Checkpoint) -> dict[str, Normalizer]:
    """Restore the normalizers that a checkpoint's heads were trained with."""
    normalizers = build_normalizers(checkpoint.recipe)
    load_normalizers(normalizers, checkpoint.tensors(STATISTICS))
    return normalizers
