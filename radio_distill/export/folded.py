"""A student as every export format takes it: nothing left that only training needs.

The body's matrices are plain linear layers again (spectral reparametrisation), and each head
predicts in its teacher's own space: the inverse of the normalizer, which is affine, goes into the
head's last linear layer (PHI-S paper, arXiv 2410.01680, appendix A.6).
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..config import StudentConfig, partition_sizes
from ..models.backbone import summary_slots
from ..models.distilled import DistilledStudent
from ..models.heads import Adaptor
from ..models.spectral import fold as fold_matrices
from ..protocols import Normalizer
from ..train.checkpoint import Checkpoint
from ..train.restore import load_student, normalizers_of
from ..types import Size


@dataclass(frozen=True)
class FoldedStudent:
    """A trained student, ready to be written."""

    model: DistilledStudent
    """In evaluation mode, float32, on the CPU."""
    checkpoint: Checkpoint
    """Where it is from: recipe, step, teachers."""

    @property
    def config(self) -> StudentConfig:
        """The recipe's student section."""
        return self.checkpoint.recipe.student

    @property
    def summary_teachers(self) -> tuple[str, ...]:
        """Names of the teachers that have a summary, in the order of their summary tokens."""
        names = list(self.checkpoint.teachers)
        return tuple(names[slot] for slot in self.summary_slots)

    @property
    def summary_slots(self) -> list[int]:
        """Indices of these teachers' summary tokens."""
        return summary_slots(self.checkpoint.teachers)


def folded(checkpoint: Checkpoint) -> FoldedStudent:
    """Restore the student of a checkpoint and fold what training added.

    Raises:
        ConfigError: where its normalizer has no inverse (layer_norm).
        WeightsError: where the checkpoint holds another student than its recipe describes.
    """
    model = load_student(checkpoint, torch.device("cpu")).float()
    fold_matrices(model)
    for name, normalizer in normalizers_of(checkpoint).items():
        adaptor = model.adaptors[name]
        assert isinstance(adaptor, Adaptor)
        _fold_into(adaptor, normalizer)
    return FoldedStudent(model.eval().requires_grad_(False), checkpoint)


def _fold_into(adaptor: Adaptor, normalizer: Normalizer) -> None:
    last = adaptor.spatial.final[-1]
    assert isinstance(last, nn.Linear)
    adaptor.spatial.final[-1] = normalizer.fold(last)


def preferred_size(student: FoldedStudent) -> Size:
    """Return the largest size that the last stage trained at, as (height, width)."""
    checkpoint = student.checkpoint
    partitions = checkpoint.recipe.stages[checkpoint.stage].partitions
    sizes = [size for partition in partitions for size in partition_sizes(partition)]
    return max(sizes, key=lambda size: size[0] * size[1])
