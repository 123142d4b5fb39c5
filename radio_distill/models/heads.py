"""The module that is trained: a student, and for each teacher a head into that teacher's space.

A head is two of the kinds in :mod:`.projectors`, for summary and features, or one for both.

Every parameter takes part in every forward and backward pass, whichever teachers are asked: a
distributed engine waits until every parameter has its gradient, and ZeRO-3 gathers parameters in
the order of the modules. So a head that is not asked, or a body that is frozen for some steps, runs
all the same and receives zeros; ``requires_grad`` stays as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from ..config import StudentConfig
from ..errors import ConfigError, UnknownNameError
from ..protocols import Normalizer
from ..registry import nearest
from ..types import FEATURES, SUMMARY, Features, TeacherSpec
from .body import Body
from .gradients import join_gradients, zero_gradient
from .projectors import HeadShape, Projector, build_projector
from .student import Initialise, Student
from .timm_student import TimmStudent

SHARED = "shared"
"""Name of a summary's head that is that of the features."""


class Head(nn.Module):
    """What translates the student's tokens into one teacher's normalised space.

    Args:
        embed_dim: channels D of the student's map.
        teacher: gives the channels C of the features, and S of the summary or None.
        config: the recipe's student section, which says what the teacher's heads are.
        depth: blocks of the student.
        summary_dim: channels of the student's summary; 0 for D.

    Raises:
        ConfigError: where a head is unknown, or is none for these widths.
    """

    summary: Projector | None
    """The summary's own head; None without a summary, and where it shares that of the features."""
    spatial: Projector

    def __init__(
        self,
        embed_dim: int,
        teacher: TeacherSpec,
        config: StudentConfig,
        depth: int = 0,
        summary_dim: int = 0,
    ):
        super().__init__()
        chosen, channels = config.heads_of(teacher.name), teacher.summary_channels
        shape = HeadShape(
            embed_dim, teacher.channels, config.head_hidden, config.head_layers, depth
        )
        where = f"heads of teacher {teacher.name!r}"
        self.has_summary = channels is not None
        self.summary_map: nn.Linear | None = None
        """Once folded, from the space of the features to that of a summary that shares the head."""
        self.channels = teacher.channels
        self.is_shared = self.has_summary and chosen.summary.name == SHARED
        self.summary = None
        if channels is not None and not self.is_shared:
            width = summary_dim or embed_dim
            own = replace(shape, in_features=width, out_features=channels)
            self.summary = build_projector(chosen.summary, own, f"{where}: summary")
            if self.summary.upsample > 1:
                raise ConfigError(f"{where}: a summary has no cells to upsample; leave that out")
            if self.summary.reads_map:
                raise ConfigError(
                    f"{where}: {chosen.summary.name} is of tokens that see each other, and the "
                    f"summary's is alone; take mlp, or {SHARED} for the head of the features"
                )
        self.spatial = build_projector(chosen.features, shape, f"{where}: features")
        if self.is_shared and not self.spatial.takes_summary:
            raise ConfigError(f"{where}: {chosen.features.name} is of maps alone, not to be shared")
        joins = self.is_shared or (self.has_summary and self.spatial.with_summary)
        if joins and summary_dim not in (0, embed_dim):
            raise ConfigError(
                f"{where}: one head reads the map's {embed_dim} channels and the summary's "
                f"{summary_dim}; set student.summary to mean"
            )
        if self.reads_blocks and not depth:
            raise ConfigError(f"{where}: a student of stages has no blocks of one width to read")
        if self.is_shared and channels != teacher.channels:
            raise ConfigError(
                f"{where}: a shared head predicts {teacher.channels} channels, and the summary has "
                f"{channels}; give it a head of its own"
            )

    @property
    def projectors(self) -> dict[str, Projector]:
        """The heads by what they predict; a shared one once, as that of the features."""
        own = {} if self.summary is None else {SUMMARY: self.summary}
        return own | {FEATURES: self.spatial}

    @property
    def reads_blocks(self) -> bool:
        """Whether the tokens of all blocks of the student must be given."""
        return any(projector.reads_blocks for projector in self.projectors.values())

    def forward(self, summary_token: Tensor, spatial: Tensor, *inner: Tensor) -> Features:
        """Predict summary ``[B, S]`` (or None) and spatial ``[B, C, h, w]``.

        Of a head that upsamples, spatial has as many times the rows and columns.

        Args:
            summary_token: ``[B, summary_dim]``.
            spatial: ``[B, D, h, w]``.
            inner: the same two behind each block in turn, where heads ``reads_blocks``.
        """
        predicted = self._all(summary_token, spatial, *inner)  # [B, P + N, C]
        height, width = spatial.shape[-2:]
        tokens = predicted[:, -height * width :]
        if (fine := self.spatial.upsample) > 1:
            order = "b (h w) (i j c) -> b c (h i) (w j)"
            features = rearrange(tokens, order, h=height, i=fine, j=fine)
        else:
            features = rearrange(tokens, "b (h w) c -> b c h w", h=height)
        if self.is_shared:
            return Features(self._shared_summary(predicted), features)
        if self.summary is None:
            return Features(None, features)
        return Features(self._own_summary(summary_token, *inner), features)

    def summarize(self, summary_token: Tensor, spatial: Tensor, *inner: Tensor) -> Tensor:
        """Predict the summary ``[B, S]`` alone; arguments as for a call."""
        assert self.has_summary, "a teacher without summary"
        if self.is_shared:
            return self._shared_summary(self._all(summary_token, spatial, *inner))
        return self._own_summary(summary_token, *inner)

    def fold(self, features: Normalizer, summary: Normalizer | None) -> list[str]:
        """Let predictions be in the teacher's own spaces: fold the inverses of its normalizers in.

        Returns which of them stay in the normalised one, since their head has no linear layer.

        Raises:
            ConfigError: where a normalizer has no inverse.
        """
        kept = [] if self.spatial.exchange_last(features.fold) else [FEATURES]
        if self.is_shared and not kept:
            same = nn.Linear(self.channels, self.channels)
            nn.init.eye_(same.weight)
            nn.init.zeros_(same.bias)
            back = features.unfold(same)  # what was folded into the features, taken out again
            self.summary_map = back if summary is None else summary.fold(back)
        if self.summary is not None and summary is not None:
            kept += [] if self.summary.exchange_last(summary.fold) else [SUMMARY]
        return kept

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Make room for the map of a shared head's summary, which a folded one has."""
        if f"{prefix}summary_map.weight" in state_dict and self.summary_map is None:
            self.summary_map = nn.Linear(self.channels, self.channels)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _shared_summary(self, predicted: Tensor) -> Tensor:
        token = predicted[:, 0]
        return token if self.summary_map is None else self.summary_map(token)

    def _all(self, *tokens: Tensor) -> Tensor:
        """Predict with the features' head, for the summary token too where it takes that."""
        both = self.is_shared or self.spatial.with_summary
        height, width = tokens[1].shape[-2:]
        sequences = []
        for summary, spatial in zip(tokens[::2], tokens[1::2], strict=True):
            patches = rearrange(spatial, "b d h w -> b (h w) d")
            sequences.append(torch.cat((summary[:, None], patches), 1) if both else patches)
        predicted: Tensor = self.spatial(sequences[0], (height, width), sequences[1:])
        return predicted

    def _own_summary(self, token: Tensor, *inner: Tensor) -> Tensor:
        assert self.summary is not None, "a summary that shares the features' head"
        levels = [level[:, None] for level in inner[::2]]
        predicted: Tensor = self.summary(token[:, None], (0, 0), levels)
        return predicted[:, 0]


def at_slot(outputs: Sequence[Tensor], slot: int) -> list[Tensor]:
    """Keep, of a student's outputs, the summary tokens of one teacher: what its head is given."""
    return [output[:, slot] if output.ndim == 3 else output for output in outputs]


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
    inner: dict[str, list[Tensor]]
    """By teacher, the maps ``[B, C, h, w]`` that its inner heads predict, where it has some."""
    log_variances: Tensor | None = None
    """Of the loss's terms, ``[T, 2]`` in the heads' order, where weights are learned."""


class DistilledStudent(nn.Module):
    """A student with its heads.

    Args:
        student: has one summary token for each head, in their order.
        heads: by teacher name.
        learned_weights: also learn how uncertain each term of the loss is.
        inner: heads of inner blocks by teacher and by the block's number, for training alone.
    """

    def __init__(
        self,
        student: Body,
        heads: Mapping[str, Head],
        learned_weights: bool = False,
        inner: Mapping[str, Mapping[str, Head]] | None = None,
    ):
        super().__init__()
        assert student.num_summary_tokens == len(heads), "one summary token a head"
        self.student = student
        try:
            self.adaptors = nn.ModuleDict(heads)  # so their tensors are called in RADIO's files
        except KeyError as error:
            raise ConfigError(f"teachers: a teacher cannot have this name ({error})") from error
        self.uncertainty = Uncertainty(list(heads)) if learned_weights else None
        levels = {name: nn.ModuleDict((inner or {}).get(name)) for name in heads}
        self.inner = nn.ModuleDict(levels)
        self.reads_blocks = any(head.reads_blocks or levels[name] for name, head in heads.items())

    def inner_heads(self, teacher: str) -> dict[int, Head]:
        """The heads of inner blocks that predict a teacher's features, by the block's number."""
        heads = cast(nn.ModuleDict, self.inner[teacher]).items()
        return {int(block): cast(Head, head) for block, head in heads}

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
        # [B, T, D], [B, D, h, w], and the same behind each block where a head reads them
        outputs: Sequence[Tensor] = self.student(pixels, draws, window_size, self.reads_blocks)
        if freeze_body:
            outputs = [zero_gradient(output) for output in outputs]
        features, inner = {}, dict[str, list[Tensor]]()
        for slot, (name, head) in enumerate(self.adaptors.items()):
            own = at_slot(outputs, slot)
            if name not in teachers:  # one token stays in the graph, which ZeRO-3 compares
                few = [each[:1] if each.ndim == 2 else each[:1, :, :1, :1] for each in own]
                own = [zero_gradient(each) for each in few]
            features[name] = head(*own)
            levels = self.inner_heads(name).items()
            inner[name] = [level(*own[2 * at + 2 : 2 * at + 4]).spatial for at, level in levels]
        # All outputs are tied together, so that a loss on any one reaches every parameter.
        log_variances = None if self.uncertainty is None else self.uncertainty()
        predicted = [tensor for pair in features.values() for tensor in pair]
        maps = [tensor for level in inner.values() for tensor in level]
        tied = iter(join_gradients(*predicted, *maps, outputs[1], log_variances))
        features = {name: Features(next(tied), next(tied)) for name in features}
        inner = {name: [next(tied) for _ in level] for name, level in inner.items()}
        return Predictions(
            features={name: features[name] for name in teachers},
            inner={name: inner[name] for name in teachers if inner[name]},
            spatial=next(tied),
            log_variances=next(tied),
        )


def head_for(student: Body, teacher: TeacherSpec, config: StudentConfig) -> Head:
    """Make a student's head for one teacher, with random weights; errors are those of Head."""
    return Head(student.embed_dim, teacher, config, student.depth, student.summary_dim)


def inner_heads_for(student: Body, teacher: TeacherSpec, config: StudentConfig) -> dict[str, Head]:
    """Make the heads of inner blocks for one teacher's features, each of the last's kind.

    Intermediate supervision as in TAO Toolkit: each level has a head of its own, and all are asked
    for the teacher's last map.

    Raises:
        ConfigError: where the student has no such block, or the kind reads all blocks by itself.
    """
    where, blocks = f"heads of teacher {teacher.name!r}: inner", config.heads_of(teacher.name).inner
    known = [str(number) for number in range(student.depth)]
    for block in blocks:
        if block not in known:
            has = f"blocks 0 to {student.depth - 1}" if known else "no blocks of one width"
            raise ConfigError(f"{where}: {block} is no block of the student, which has {has}")
    map_alone = replace(teacher, summary_channels=None)
    heads = {block: head_for(student, map_alone, config) for block in blocks}
    if any(head.reads_blocks for head in heads.values()):
        raise ConfigError(f"{where}: the head of the features reads inner blocks itself")
    return heads


def build_body(
    config: StudentConfig,
    num_summary_tokens: int,
    weight_noise: float = 0.0,
    initialise: Initialise | None = None,
) -> Body:
    """Build the body of a student; arguments and errors are those of :class:`.student.Student`."""
    if config.body == "timm":
        return TimmStudent(config, num_summary_tokens, initialise)
    return Student(config, num_summary_tokens, weight_noise, initialise)


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
    student = build_body(config, len(teachers), weight_noise, initialise)
    heads = {name: head_for(student, spec, config) for name, spec in teachers.items()}
    inner = {name: inner_heads_for(student, spec, config) for name, spec in teachers.items()}
    return DistilledStudent(student, heads, learned_weights, inner)
