"""The module that is trained: a student, and for each teacher a head into that teacher's space.

A head is two MLPs, for summary and features: the "MLP v2" of the published RADIO models, with their
parameter names (``fc1``, ``blocks``, ``final``), so that an export needs no table of names.
Attention heads are left out.

Every parameter takes part in every forward and backward pass, whichever teachers are asked: a
distributed engine waits until every parameter has its gradient, and ZeRO-3 gathers parameters in
the order of the modules. So a head that is not asked, or a body that is frozen for some steps, runs
all the same and receives zeros; ``requires_grad`` stays as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd import Function

from ..config import StudentConfig
from ..errors import ConfigError, UnknownNameError
from ..registry import nearest
from ..types import Features, TeacherSpec
from .spectral import ReparametrizedLinear
from .student import Initialise, Student


class MLPHead(nn.Module):
    """Linear, residual [LayerNorm, GELU, Linear] layers, then LayerNorm, GELU, Linear.

    Args:
        in_features: width of the student.
        hidden_features: width inside.
        out_features: width of the teacher.
        num_layers: residual layers.
    """

    def __init__(
        self, in_features: int, hidden_features: int, out_features: int, num_layers: int = 0
    ):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.blocks = nn.ModuleList(
            _layer(hidden_features, hidden_features) for _ in range(num_layers)
        )
        self.final = _layer(hidden_features, out_features)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, in_features]`` to ``[N, out_features]``."""
        hidden = self.fc1(tokens)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        result: Tensor = self.final(hidden)
        return result


def _layer(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(in_features), nn.GELU(), nn.Linear(in_features, out_features))


class Head(nn.Module):
    """What translates the student's tokens into one teacher's normalised space.

    Args:
        embed_dim: width D of the student.
        teacher: gives the channels C of the features, and S of the summary or None.
        config: the recipe's student section, for the shape of the MLPs.
    """

    summary: MLPHead | None
    spatial: MLPHead

    def __init__(self, embed_dim: int, teacher: TeacherSpec, config: StudentConfig):
        super().__init__()
        hidden, layers = config.head_hidden, config.head_layers
        channels = teacher.summary_channels
        self.summary = None if channels is None else MLPHead(embed_dim, hidden, channels, layers)
        self.spatial = MLPHead(embed_dim, hidden, teacher.channels, layers)

    def forward(self, summary_token: Tensor, spatial: Tensor) -> Features:
        """Predict summary ``[B, S]`` (or None) and spatial ``[B, C, h, w]``.

        Args:
            summary_token: ``[B, D]``.
            spatial: ``[B, D, h, w]``.
        """
        summary = None if self.summary is None else self.summary(summary_token)
        _, _, height, width = spatial.shape
        tokens = self.spatial(rearrange(spatial, "b d h w -> (b h w) d"))
        tokens = rearrange(tokens, "(b h w) c -> b c h w", h=height, w=width)
        return Features(summary, tokens)


class Uncertainty(nn.Module):
    """A learned log variance for each teacher's summary and features (``loss.weighting``).

    In AM-RADIO (arXiv 2312.06709) the student predicts them from each image; how is not published.
    Here each is one parameter, as in Kendall et al. (arXiv 1705.07115). They start at 0, a weight
    of 1.
    """

    def __init__(self, teachers: Sequence[str]):
        super().__init__()
        self.teachers = tuple(teachers)
        """In the order of the rows."""
        self.log_variances = nn.Parameter(torch.zeros(len(self.teachers), 2))

    def forward(self) -> Tensor:
        """Return the log variances ``[T, 2]`` of summaries (first column) and features."""
        # ZeRO-3 takes the parameter's values away after this call, hence a copy.
        return self.log_variances.clone()


@dataclass(frozen=True)
class Predictions:
    """What a student and its heads say of a batch.

    No dict or tuple, whose tensors ZeRO-3 would hook: it counts those that a loss uses, compares
    the counts of all ranks, and stops where ranks ask different teachers.
    """

    features: dict[str, Features]
    """By teacher, those alone that were asked; in their normalised spaces."""
    spatial: Tensor
    """The student's own features ``[B, D, h, w]``."""
    log_variances: Tensor | None = None
    """Of the loss's terms, ``[T, 2]`` in the heads' order, where weights are learned."""


class DistilledStudent(nn.Module):
    """A student with its heads.

    Args:
        student: has one summary token for each head, in their order.
        heads: by teacher name.
        learned_weights: also learn how uncertain each term of the loss is.
    """

    def __init__(self, student: Student, heads: Mapping[str, Head], learned_weights: bool = False):
        super().__init__()
        assert student.num_summary_tokens == len(heads), "one summary token a head"
        self.student = student
        try:
            self.adaptors = nn.ModuleDict(heads)  # so their tensors are called in RADIO's files
        except KeyError as error:
            raise ConfigError(f"teachers: a teacher cannot have this name ({error})") from error
        self.uncertainty = Uncertainty(list(heads)) if learned_weights else None

    @property
    def heads(self) -> dict[str, Head]:
        """The heads by teacher name, in the order of the summary tokens."""
        return cast(dict[str, Head], dict(self.adaptors.items()))

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
        features = {}
        for slot, (name, head) in enumerate(self.adaptors.items()):
            if name in teachers:
                features[name] = head(summary[:, slot], spatial)
            else:  # one token is enough; it stays in the graph, which ZeRO-3 compares over ranks
                tokens = zero_gradient(summary[:1, slot]), zero_gradient(spatial[:1, :, :1, :1])
                features[name] = head(*tokens)
        # All outputs are tied together, so that a loss on any one reaches every parameter.
        log_variances = None if self.uncertainty is None else self.uncertainty()
        outputs = [tensor for pair in features.values() for tensor in pair]
        tied = iter(join_gradients(*outputs, spatial, log_variances))
        features = {name: Features(next(tied), next(tied)) for name in features}
        return Predictions({name: features[name] for name in teachers}, next(tied), next(tied))


def build_student(
    config: StudentConfig,
    teachers: Mapping[str, TeacherSpec],
    *,
    learned_weights: bool = False,
    weight_noise: float = 0.0,
    initialise: Initialise | None = None,
) -> DistilledStudent:
    """Build a student with a summary token and a head for each teacher, in the mapping's order.

    Args:
        config: the recipe's student section.
        teachers: their specs, by name.
        learned_weights: also learn the weights of the loss (``loss.weighting: uncertainty``).
        weight_noise: on the body's matrices in training (``augmentation.weight_noise``).
        initialise: see :class:`.student.Student`.

    Raises:
        ConfigError: where fields of the recipe do not fit each other.
        WeightsError: where ``config.pretrained`` is missing, damaged or another model's.
    """
    student = Student(config, len(teachers), weight_noise, initialise)
    heads = {name: Head(student.embed_dim, spec, config) for name, spec in teachers.items()}
    return DistilledStudent(student, heads, learned_weights)


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


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients  # autograd hands in zeros for outputs that nobody used


class _Zero(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


class _Touch(Function):
    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient * torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


join_gradients: Callable[..., tuple[Any, ...]] = _Join.apply
"""Return equal tensors, bit for bit (None stays None); the gradient of any one reaches all of them,
as zeros where it is not used."""

touch: Callable[..., Tensor] = _Touch.apply
"""Return a scalar of zero that gives each tensor a gradient of zeros, or NaN where its own is."""

zero_gradient: Callable[[Tensor], Tensor] = _Zero.apply
"""Return an equal tensor, bit for bit, whose gradient is exactly zero (but not None)."""
