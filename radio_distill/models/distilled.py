"""The module that is trained: one student and a pair of heads for each teacher.

Every parameter takes part in every forward and backward pass, whichever teachers are asked, so that
DeepSpeed and DDP see the same graph on every rank (see :mod:`.gradients`).
"""

from collections import UserDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..config import StudentConfig
from ..distill.weighting import Uncertainty
from ..errors import ConfigError, UnknownNameError
from ..registry import nearest
from ..types import Features, TeacherSpec
from .gradients import join_gradients, zero_gradient
from .heads import Adaptor
from .spectral import ReparametrizedLinear
from .student import Student


class Predictions(UserDict[str, Features]):
    """Features by teacher name, and what losses that ask no teacher need.

    Args:
        features: by teacher name.
        spatial: the student's own ``[B, D, h, w]``.
        log_variances: of the terms, ``[T, 2]`` in the heads' order, where weights are learned.

    Not a dict, whose tensors ZeRO-3 would hook: it counts those that a loss uses, compares the
    counts of all ranks, and stops where ranks ask different teachers.
    """

    def __init__(
        self,
        features: Mapping[str, Features],
        spatial: Tensor,
        log_variances: Tensor | None = None,
    ):
        super().__init__(features)
        self.spatial = spatial
        self.log_variances = log_variances


class DistilledStudent(nn.Module):
    """A student with its heads.

    Args:
        student: has one summary token for each adaptor, in their order.
        adaptors: by teacher name.
        learned_weights: also learn how uncertain each term of the loss is.
    """

    def __init__(
        self, student: Student, adaptors: Mapping[str, Adaptor], learned_weights: bool = False
    ):
        super().__init__()
        assert student.num_summary_tokens == len(adaptors), "one summary token an adaptor"
        self.student = student
        try:
            self.adaptors = nn.ModuleDict(adaptors)
        except KeyError as error:
            raise ConfigError(f"teachers: a teacher cannot have this name ({error})") from error
        self.uncertainty = Uncertainty(list(adaptors)) if learned_weights else None

    def forward(
        self,
        pixels: Tensor,
        teachers: tuple[str, ...],
        draws: Tensor | None = None,
        freeze_body: bool = False,
        window_size: int | None = None,
    ) -> Predictions:
        """Predict the features of each named teacher, in that teacher's normalised space.

        Args:
            pixels: ``[B, 3, H, W]`` RGB in [0, 1].
            teachers: whose heads are asked; the others get a gradient of zeros.
            draws: ``[B, NUM_DRAWS]`` uniform numbers for the position augmentation.
            freeze_body: give the body a gradient of exactly zero. Weight decay and momentum still
                move it, unless its learning rate is zero too.
            window_size: side of the attention windows, see :class:`.student.Student`.

        Raises:
            UnknownNameError: where there is no head of that name.
        """
        for name in teachers:
            if name not in self.adaptors:
                raise UnknownNameError(f"no head {name!r} ({nearest(name, list(self.adaptors))})")
        summary, spatial = self.student(pixels, draws, window_size)  # [B, T, D], [B, D, h, w]
        if freeze_body:
            summary, spatial = zero_gradient(summary), zero_gradient(spatial)
        predictions = {}
        for slot, (name, adaptor) in enumerate(self.adaptors.items()):
            if name in teachers:
                predictions[name] = adaptor(summary[:, slot], spatial)
            else:  # one token is enough; it stays in the graph, which ZeRO-3 compares over ranks
                tokens = zero_gradient(summary[:1, slot]), zero_gradient(spatial[:1, :, :1, :1])
                predictions[name] = adaptor(*tokens)
        log_variances = None if self.uncertainty is None else self.uncertainty()
        joined = _join(predictions, spatial, log_variances)
        joined.data = {name: joined[name] for name in teachers}
        return joined


def _join(
    features: Mapping[str, Features], spatial: Tensor, log_variances: Tensor | None
) -> Predictions:
    """Tie all outputs together, so that a loss on any one reaches every parameter."""
    tensors = [tensor for item in features.values() for tensor in item if tensor is not None]
    tensors += [spatial] if log_variances is None else [spatial, log_variances]
    joined = iter(join_gradients(*tensors))
    tied = {
        name: Features(None if item.summary is None else next(joined), next(joined))
        for name, item in features.items()
    }
    return Predictions(tied, next(joined), None if log_variances is None else next(joined))


def build_student(
    config: StudentConfig,
    teachers: Mapping[str, TeacherSpec],
    *,
    learned_weights: bool = False,
    weight_noise: float = 0.0,
) -> DistilledStudent:
    """Build a student with a summary token and heads for each teacher, in the mapping's order.

    Args:
        config: the recipe's student section.
        teachers: their specs, by name.
        learned_weights: also learn the weights of the loss (``loss.weighting: uncertainty``).
        weight_noise: on the body's matrices in training (``augmentation.weight_noise``).

    Raises:
        ConfigError: where fields of the recipe do not fit each other.
        WeightsError: where ``config.pretrained`` is missing, damaged or another model's.
    """
    student = Student(config, len(teachers), weight_noise)
    adaptors = {
        name: Adaptor(student.embed_dim, spec.channels, spec.summary_channels, config)
        for name, spec in teachers.items()
    }
    return DistilledStudent(student, adaptors, learned_weights)


def parameter_groups(model: DistilledStudent, weight_decay: float) -> list[dict[str, Any]]:
    """Divide the parameters into ``body_decay``, ``body``, ``head_decay`` and ``head``.

    Vectors (biases, norms, scales), tokens, the position table and learned weights of the loss do
    not decay. Of a spectrally reparametrised matrix its scale decays and the matrix, whose size has
    no effect, does not.
    """
    groups: dict[str, list[nn.Parameter]] = {
        name: [] for name in ("body_decay", "body", "head_decay", "head")
    }
    spectral = [
        module
        for module in model.student.modules()
        if isinstance(module, ReparametrizedLinear) and module.spectral
    ]
    scales = {module.spectral_scale for module in spectral}
    matrices = [module.weight for module in spectral]
    kept = {model.student.prefix_tokens, model.student.positions.table, *matrices}
    for part, module in (("body", model.student), ("head", model.adaptors)):
        for parameter in module.parameters():
            decays = parameter in scales or (parameter.ndim > 1 and parameter not in kept)
            groups[f"{part}_decay" if decays else part].append(parameter)
    if model.uncertainty is not None:
        groups["head"] += model.uncertainty.parameters()
    return [
        {
            "name": name,
            "params": parameters,
            "weight_decay": weight_decay if name.endswith("_decay") else 0.0,
        }
        for name, parameters in groups.items()
    ]
