"""Kinds of heads: what brings a student's tokens into the space of a teacher.

A kind is a class here and one line in :data:`radio_distill.models.HEADS`. It is made of a
:class:`HeadShape` and of the recipe's ``options`` as keywords, whose types its signature says, and
maps tokens to predictions one for one. A teacher's summary and features have a head each, or share
the features' (``shared``); :class:`.heads.Head` says which tokens each gets.

Its last layer is linear and stands in :meth:`Projector.last`, so that what a normalizer does can be
folded into it; only :class:`IdentityHead` has none.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ..config import HeadConfig, build_options
from ..config.fields import Count, Positive, Range, SmallCount, Weight
from ..errors import ConfigError
from ..registry import check_takes
from ..types import Size
from . import HEADS

Hidden = Annotated[int, Range(0, 1 << 20)]
"""Channels inside; 0 for `student.head_hidden`."""


@dataclass(frozen=True)
class HeadShape:
    """What a head is made for."""

    in_features: int
    """Width D of the student."""
    out_features: int
    """Channels of the teacher's features, or of its summary."""
    hidden: int
    """``student.head_hidden``, for kinds whose options say nothing else."""
    layers: int = 0
    """``student.head_layers``, likewise."""
    depth: int = 0
    """Blocks of the student."""


class Projector(nn.Module, ABC):
    """Base of all kinds: tokens ``[B, P + N, D]`` of each image to ``[B, P + N, C]``."""

    final: nn.Sequential
    reads_blocks: bool = False
    """Whether it reads the tokens of all blocks of the student, not the last one's alone."""
    reads_map: bool = False
    """Whether a token's prediction depends on the others of its image."""
    takes_summary: bool = True
    """Whether the summary token may stand ahead of the patches."""
    with_summary: bool = False
    """Whether a head of features gets the summary token too, ahead of the patches."""
    upsample: int = 1
    """Cells a side that a head of features predicts for each of the student's, row by row, their
    channels side by side: ``[B, N, upsample * upsample * C]``."""

    def last(self) -> nn.Sequential | None:
        """Return the layers whose last one is the linear layer that predicts; None without any."""
        return self.final

    def exchange_last(self, exchange: Callable[[nn.Linear], nn.Linear]) -> bool:
        """Put what a function returns in the place of the last linear layer; False without one.

        Where it upsamples, the layer of each cell by itself.
        """
        layers = self.last()
        if layers is None:
            return False
        last = layers[-1]
        assert isinstance(last, nn.Linear), "the last layer of a head is linear"
        if (cells := self.upsample**2) == 1:
            layers[-1] = exchange(last)
            return True
        biases = [None] * cells if last.bias is None else last.bias.chunk(cells)
        parts = [
            exchange(_linear(weight, bias))
            for weight, bias in zip(last.weight.chunk(cells), biases, strict=True)
        ]
        found: list[Tensor] = [part.bias for part in parts if part.bias is not None]
        weight = torch.cat([part.weight for part in parts])
        layers[-1] = _linear(weight, torch.cat(found) if found else None)
        return True

    @abstractmethod
    def forward(self, tokens: Tensor, grid: Size, inner: Sequence[Tensor] = ()) -> Tensor:
        """Predict a teacher's tokens.

        Args:
            tokens: ``[B, P + N, D]`` behind the last block: P = 1 or 0 summary tokens, then patches
                row by row.
            grid: rows and columns of the N patches; (0, 0) without patches.
            inner: the same behind each block, for a kind that ``reads_blocks``.
        """

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Make room for the bias that a last layer without one has once it was folded."""
        layers = self.last()
        if layers is not None and layers[-1].bias is None:
            own = {f"{prefix}{name}": module for name, module in self.named_modules()}
            name = next(name for name, module in own.items() if module is layers[-1])
            if f"{name}.bias" in state_dict:
                layers[-1].bias = nn.Parameter(torch.zeros_like(layers[-1].weight[:, 0]))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class MLPHead(Projector):
    """Linear, residual [LayerNorm, GELU, Linear] layers, then LayerNorm, GELU, Linear.

    The "MLP v2" of the published RADIO models, with their parameter names (``fc1``, ``blocks``,
    ``final``), so that an export needs no table of names.

    Args:
        shape: widths.
        hidden: width inside; 0 for ``student.head_hidden``.
        layers: residual layers; None for ``student.head_layers``.
        bias: whether the first linear layer and the residual ones have biases.
        last_bias: whether the last one has.
        upsample: cells a side that are predicted for each of the student's (C-RADIOv4); then
            ``student.head_hidden`` counts as many times.
        init_std: draw weights of linear layers from a truncated normal distribution of this
            deviation and let biases begin at zero; 0 for torch's own way.
    """

    def __init__(
        self,
        shape: HeadShape,
        *,
        hidden: Hidden = 0,
        layers: SmallCount | None = None,
        bias: bool = True,
        last_bias: bool = True,
        upsample: Positive = 1,
        init_std: Weight = 0.0,
    ):
        super().__init__()
        self.upsample, self.takes_summary = upsample, upsample == 1
        hidden = hidden or shape.hidden * upsample
        self.fc1 = nn.Linear(shape.in_features, hidden, bias)
        count = shape.layers if layers is None else layers
        self.blocks = nn.ModuleList(_layer(hidden, hidden, bias) for _ in range(count))
        self.final = _layer(hidden, shape.out_features * upsample**2, last_bias)
        if init_std:
            _draw(self, init_std)

    def forward(self, tokens: Tensor, grid: Size = (0, 0), inner: Sequence[Tensor] = ()) -> Tensor:
        """Predict from each token alone."""
        hidden = self.fc1(tokens)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        result: Tensor = self.final(hidden)
        return result


class LNMLPHead(MLPHead):
    """Linear, LayerNorm, GELU, Linear, without biases (EUPE, arXiv 2603.22387).

    With biases this is :class:`MLPHead` without residual layers. Options as there; SigLino's
    adapter (arXiv 2512.20157) is ``bias: true, init_std: 0.01``, shared by summary and features.
    """

    def __init__(
        self,
        shape: HeadShape,
        *,
        hidden: Hidden = 0,
        bias: bool = False,
        last_bias: bool = False,
        init_std: Weight = 0.0,
    ):
        super().__init__(
            shape, hidden=hidden, layers=0, bias=bias, last_bias=last_bias, init_std=init_std
        )


class LinearHead(Projector):
    """One linear layer."""

    def __init__(self, shape: HeadShape, *, bias: bool = True):
        super().__init__()
        self.final = nn.Sequential(nn.Linear(shape.in_features, shape.out_features, bias))

    def forward(self, tokens: Tensor, grid: Size = (0, 0), inner: Sequence[Tensor] = ()) -> Tensor:
        """Predict from each token alone."""
        result: Tensor = self.final(tokens)
        return result


class IdentityHead(Projector):
    """The student's own tokens, for a teacher of its width: the student as it was (an anchor).

    There is no layer to fold a normalizer into, so what it predicts stays in the normalised space;
    ``none`` as that teacher's normalizer keeps it in the teacher's own.
    """

    def __init__(self, shape: HeadShape):
        super().__init__()
        if shape.in_features != shape.out_features:
            raise ConfigError(
                f"an identity head has as many channels as the student, {shape.in_features}, and "
                f"this teacher has {shape.out_features}; take linear"
            )

    def last(self) -> None:
        """Return None: nothing is learned."""

    def forward(self, tokens: Tensor, grid: Size = (0, 0), inner: Sequence[Tensor] = ()) -> Tensor:
        """Return the tokens."""
        return tokens


class AttentionHead(Projector):
    """Transformer blocks over the patches, then an MLP (C-RADIOv4, arXiv 2601.17237) or a linear.

    Pre-norm blocks with LayerScale, at the student's width, without positions of their own: the
    student's tokens tell where they are. As it stands it is C-RADIOv4's head for features, under
    its parameter names (``blocks``, ``mlp``). DUNE's (CVPR 2025) is ``blocks: 1, heads: 0,
    layer_scale: 1e-4, prefix: true, output: linear``, shared by summary and features.

    Args:
        shape: widths.
        blocks: how many.
        heads: attention heads of each; 0 for one each 64 channels.
        layer_scale: where the scales of both branches begin; 0 for none.
        qkv_bias: whether queries, keys and values have biases.
        prefix: let the summary token take part too, also where it is not predicted from here.
        output: what comes behind the blocks, ``mlp`` without residual layers, or ``linear``.
        hidden: width inside that MLP; 0 for ``student.head_hidden``.
        upsample: as for :class:`MLPHead`.
    """

    reads_map = True

    def __init__(
        self,
        shape: HeadShape,
        *,
        blocks: Positive = 2,
        heads: SmallCount = 16,
        layer_scale: Weight = 1e-5,
        qkv_bias: bool = False,
        prefix: bool = False,
        output: Literal["mlp", "linear"] = "mlp",
        hidden: Hidden = 0,
        upsample: Positive = 1,
    ):
        from timm.models.vision_transformer import Block

        super().__init__()
        width = shape.in_features
        heads = heads or max(width // 64, 1)
        if width % heads:
            raise ConfigError(f"{heads} attention heads do not divide the student's width {width}")
        self.with_summary = prefix
        self.upsample, self.takes_summary = upsample, upsample == 1
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                qkv_bias=qkv_bias,
                init_values=layer_scale or None,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
            )
            for _ in range(blocks)
        )
        if output == "mlp":
            self.mlp: Projector = MLPHead(shape, hidden=hidden, layers=0, upsample=upsample)
        else:
            self.mlp = LinearHead(replace(shape, out_features=shape.out_features * upsample**2))

    def last(self) -> nn.Sequential | None:
        """Return the layers behind the blocks."""
        return self.mlp.last()

    def forward(self, tokens: Tensor, grid: Size = (0, 0), inner: Sequence[Tensor] = ()) -> Tensor:
        """Predict from all tokens of an image together."""
        for block in self.blocks:
            tokens = block(tokens)
        result: Tensor = self.mlp(tokens)
        return result


class LadderHead(Projector):
    """The sum of an MLP on the tokens of each block of the student (UNIC, ECCV 2024).

        z = Σ_l Linear(GELU(Linear(x_l))),  x_l the tokens behind block l, without a final norm.

    The sum of the second layers is one linear layer over their hidden channels side by side, so
    there is one bias and not one a block.

    Args:
        shape: widths.
        hidden: width inside each MLP; 0 for ``student.head_hidden``. UNIC's is the student's.
        last_hidden: that of the last block's; 0 for four times ``hidden``.
        blocks: numbers of the blocks that are read, from 0; empty for all.
        init_std: deviation of the truncated normal distribution that weights begin with.
    """

    reads_blocks = True

    def __init__(
        self,
        shape: HeadShape,
        *,
        hidden: Hidden = 0,
        last_hidden: Hidden = 0,
        blocks: tuple[Count, ...] = (),
        init_std: Weight = 0.02,
    ):
        super().__init__()
        self.read = blocks or tuple(range(shape.depth))
        if not self.read or max(self.read) >= shape.depth or len({*self.read}) < len(self.read):
            raise ConfigError(
                f"a ladder reads blocks 0 to {shape.depth - 1} of the student, each once, not "
                f"{', '.join(map(str, self.read)) or 'none'}"
            )
        hidden = hidden or shape.hidden
        widths = dict.fromkeys(self.read, hidden)
        if shape.depth - 1 in widths:
            widths[shape.depth - 1] = last_hidden or 4 * hidden
        self.rungs = nn.ModuleList(nn.Linear(shape.in_features, widths[at]) for at in self.read)
        self.final = nn.Sequential(nn.Linear(sum(widths.values()), shape.out_features))
        if init_std:
            _draw(self, init_std)

    def forward(self, tokens: Tensor, grid: Size = (0, 0), inner: Sequence[Tensor] = ()) -> Tensor:
        """Predict from what a token was behind each block."""
        rungs = zip(self.rungs, self.read, strict=True)
        hidden = [nn.functional.gelu(rung(inner[at])) for rung, at in rungs]
        result: Tensor = self.final(torch.cat(hidden, dim=-1))
        return result


class ConvHead(Projector):
    """LayerNorm, then twice a 3x3 convolution, ReLU and LayerNorm, then Linear (Theia).

    Each norm is over channels and cells of a map together; its scale and bias are one a channel
    and not one a place as in Theia (arXiv 2407.20179), so that a map may have any size.

    Args:
        shape: widths.
        hidden: channels inside; 0 for the student's width, as in Theia.
        upsample: 4 for two transposed convolutions of stride 2 in place of the convolutions, from
            n cells a side to 2n - 1 and to 4n: Theia's head of SAM. What it does before, from 14
            cells to 16, is left to ``loss.alignment``.
    """

    reads_map, takes_summary = True, False

    def __init__(self, shape: HeadShape, *, hidden: Hidden = 0, upsample: Literal[1, 4] = 1):
        super().__init__()
        width, hidden = shape.in_features, hidden or shape.in_features
        self.upsample = upsample
        first: nn.Module = nn.Conv2d(width, hidden, 3, padding=1)
        second: nn.Module = nn.Conv2d(hidden, hidden, 3, padding=1)
        if upsample > 1:
            first = nn.ConvTranspose2d(width, hidden, 3, stride=2, padding=1)
            second = nn.ConvTranspose2d(hidden, hidden, 3, stride=2, output_padding=1)
        self.layers = nn.Sequential(
            nn.GroupNorm(1, width),
            first,
            nn.ReLU(),
            nn.GroupNorm(1, hidden),
            second,
            nn.ReLU(),
            nn.GroupNorm(1, hidden),
        )
        self.final = nn.Sequential(nn.Linear(hidden, shape.out_features))

    def exchange_last(self, exchange: Callable[[nn.Linear], nn.Linear]) -> bool:
        """Put what a function returns in the place of the layer that predicts every fine cell."""
        last = self.final[0]
        assert isinstance(last, nn.Linear)
        self.final[0] = exchange(last)
        return True

    def forward(self, tokens: Tensor, grid: Size = (0, 0), inner: Sequence[Tensor] = ()) -> Tensor:
        """Predict from a cell and those near it: two cells away, one where it upsamples."""
        hidden = self.layers(rearrange(tokens, "b (h w) d -> b d h w", h=grid[0]))
        fine = self.upsample
        predicted = self.final(rearrange(hidden, "b d h w -> b h w d"))
        order = "b (h i) (w j) c -> b (h w) (i j c)"
        result: Tensor = rearrange(predicted, order, i=fine, j=fine)
        return result


def build_projector(config: HeadConfig, shape: HeadShape, where: str) -> Projector:
    """Make one head; raises ConfigError for an unknown or unfinished kind, or strange options."""
    kind = HEADS.get(config.name)
    check_takes(f"{where}: {config.name}", kind, ("shape",), ())
    if missing := getattr(kind, "__abstractmethods__", None):
        raise ConfigError(f"{where}: {config.name} lacks {', '.join(sorted(missing))}")
    options = build_options(kind, config.options, f"{where}: {config.name}", given=("shape",))
    try:
        projector: Projector = kind(shape, **options)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return projector


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], len(weight), bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach())
    return linear


def _layer(in_features: int, out_features: int, bias: bool = True) -> nn.Sequential:
    linear = nn.Linear(in_features, out_features, bias)
    return nn.Sequential(nn.LayerNorm(in_features), nn.GELU(), linear)


def _draw(module: nn.Module, std: float) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
