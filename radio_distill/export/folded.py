"""A student as every export format takes it: nothing left that only training needs.

The body's matrices are plain linear layers again (spectral reparametrisation), and each head
predicts in its teacher's own space: the inverse of the normalizer, which is affine, goes into the
head's last linear layer (PHI-S paper, arXiv 2410.01680, appendix A.6).
"""

import logging
from dataclasses import dataclass

import torch

from ..config import StudentConfig, of_summary
from ..errors import ExportError
from ..models.backbone import summary_slots
from ..models.heads import DistilledStudent
from ..models.spectral import fold as fold_matrices
from ..models.student import Student
from ..normalize.normalizers import normalizers_of
from ..train.checkpoint import Checkpoint
from ..train.restore import load_student
from ..types import Size

logger = logging.getLogger(__name__)


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
    def plain_config(self) -> StudentConfig:
        """The student section of what was folded: not pretrained, its matrices plain."""
        return self.config.plain

    @property
    def vit(self) -> Student:
        """Its body, a vision transformer; raises ExportError where it is another one."""
        body = self.model.student
        if isinstance(body, Student):
            return body
        raise ExportError(
            f"a student of `body: timm` ({self.config.architecture}) can be exported as timm or "
            "onnx alone"
        )

    @property
    def preferred_size(self) -> Size:
        """The largest size that the last stage trained at, as (height, width)."""
        return self.checkpoint.recipe.stages[self.checkpoint.stage].largest_size

    @property
    def summary_teachers(self) -> tuple[str, ...]:
        """Names of the teachers that have a summary, in the order of their summary tokens."""
        teachers = self.checkpoint.teachers.items()
        return tuple(name for name, spec in teachers if spec.summary_channels is not None)

    @property
    def summary_slots(self) -> list[int]:
        """Indices of these teachers' summary tokens; one, where they share one summary."""
        return summary_slots(self.checkpoint.teachers, self.model.student)


def folded(checkpoint: Checkpoint) -> FoldedStudent:
    """Restore the student of a checkpoint and fold what training added.

    Raises:
        ConfigError: where its normalizer has no inverse (layer_norm).
        WeightsError: where the checkpoint holds another student than its recipe describes.
    """
    model = load_student(checkpoint, torch.device("cpu")).float()
    fold_matrices(model)
    normalizers = normalizers_of(checkpoint)
    for name, head in model.heads.items():
        for part in head.fold(normalizers[name], normalizers.get(of_summary(name))):
            logger.info(
                "the %s of head %s stay in the space of their normalizer: it has no linear layer "
                "to fold that into",
                part,
                name,
            )
    return FoldedStudent(model.eval().requires_grad_(False), checkpoint)
