"""The module that is trained: one student and a pair of heads for each teacher.

Every parameter takes part in every forward and backward pass, whichever teachers are asked, so that
DeepSpeed and DDP see the same graph on every rank (see :mod:`.gradients`).
"""

from collections import UserDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..config import StudentConfig
from ..errors import ConfigError, UnknownNameError
from ..registry import nearest
from ..types import Features, TeacherSpec
from .adaptors import Adaptor
from .gradients import join_gradients, zero_gradient
from .student import Student


class Predictions(UserDict[str, Features]):
    """Features by teacher name.

    Not a dict, whose tensors ZeRO-3 would hook: it counts those that a loss uses, compares the
    counts of all ranks, and stops where ranks ask different teachers.
    """


class DistilledStudent(nn.Module):
    """A student with its heads.

    Args:
        student: has one summary token for each adaptor, in their order.
        adaptors: by teacher name.
    """

    def __init__(self, student: Student, adaptors: Mapping[str, Adaptor]):
        super().__init__()
        assert student.num_summary_tokens == len(adaptors), "one summary token an adaptor"
        self.student = student
        try:
            self.adaptors = nn.ModuleDict(adaptors)
        except KeyError as error:
            raise ConfigError(f"teachers: a teacher cannot have this name ({error})") from error

    def forward(
        self,
        pixels: Tensor,
        teachers: tuple[str, ...],
        draws: Tensor | None = None,
        freeze_body: bool = False,
    ) -> Predictions:
        """Predict the features of each named teacher, in that teacher's normalised space.

        Args:
            pixels: ``[B, 3, H, W]`` RGB in [0, 1].
            teachers: whose heads are asked; the others get a gradient of zeros.
            draws: ``[B, NUM_DRAWS]`` uniform numbers for the position augmentation.
            freeze_body: give the body a gradient of exactly zero. Weight decay and momentum still
                move it, unless its learning rate is zero too.

        Raises:
            UnknownNameError: where there is no head of that name.
        """
        for name in teachers:
            if name not in self.adaptors:
                raise UnknownNameError(f"no head {name!r} ({nearest(name, list(self.adaptors))})")
        summary, spatial = self.student(pixels, draws)  # [B, T, D], [B, D, h, w]
        if freeze_body:
            summary, spatial = zero_gradient(summary), zero_gradient(spatial)
        predictions = {}
        for slot, (name, adaptor) in enumerate(self.adaptors.items()):
            if name in teachers:
                predictions[name] = adaptor(summary[:, slot], spatial)
            else:  # one token is enough; it stays in the graph, which ZeRO-3 compares over ranks
                tokens = zero_gradient(summary[:1, slot]), zero_gradient(spatial[:1, :, :1, :1])
                predictions[name] = adaptor(*tokens)
        joined = _join(predictions)
        return Predictions({name: joined[name] for name in teachers})


def _join(predictions: Mapping[str, Features]) -> dict[str, Features]:
    """Tie all predictions together, so that a loss on any one reaches every head."""
    tensors = iter(
        join_gradients(*(t for features in predictions.values() for t in features if t is not None))
    )
    return {
        name: Features(None if features.summary is None else next(tensors), next(tensors))
        for name, features in predictions.items()
    }


def build_student(config: StudentConfig, teachers: Mapping[str, TeacherSpec]) -> DistilledStudent:
    """Build a student with a summary token and heads for each teacher, in the mapping's order.

    Raises:
        ConfigError: where fields of the recipe do not fit each other.
        WeightsError: where ``config.pretrained`` is missing, damaged or another model's.
    """
    student = Student(config, len(teachers))
    adaptors = {
        name: Adaptor(student.embed_dim, spec.channels, spec.summary_channels, config)
        for name, spec in teachers.items()
    }
    return DistilledStudent(student, adaptors)


def parameter_groups(model: DistilledStudent, weight_decay: float) -> list[dict[str, Any]]:
    """Divide the parameters into ``body_decay``, ``body``, ``head_decay`` and ``head``.

    Vectors (biases, norms, scales), tokens and the position table do not decay.
    """
    groups: dict[str, list[nn.Parameter]] = {
        name: [] for name in ("body_decay", "body", "head_decay", "head")
    }
    kept = {model.student.prefix_tokens, model.student.positions.table}
    for part, module in (("body", model.student), ("head", model.adaptors)):
        for parameter in module.parameters():
            decays = parameter.ndim > 1 and parameter not in kept
            groups[f"{part}_decay" if decays else part].append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "weight_decay": weight_decay if name.endswith("_decay") else 0.0,
        }
        for name, parameters in groups.items()
    ]
