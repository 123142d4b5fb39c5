"""FeatSharp: joint-bilateral upsampling and tiles, fused by one local transformer block.

::

    low ──► JBU with the image ──┐
                                   ├─► concat [B, h, w, 2C] ──► attention ──► SwiGLU ──► first C
    tiles, stitched ───────────────┘        the first input is the residual path

FeatSharp (arXiv 2502.16025), section 3.3 and appendix B.2. The released code differs from the
paper; each difference is an option, and ``PRESETS`` holds both. Its shipped configurations moreover
take JAFAR's map for the JBU's and drop the LayerNorm (``layer_norm=False``). Left out: rotary
embeddings, the conditioning transformer, and the spectral reparametrisation of the released
training, which :mod:`upsamplers.convert` folds into the weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from radio_distill.config.fields import AboveZero, Weight
from radio_distill.errors import ConfigError
from radio_distill.types import Size

from ..joint_bilateral.layer import JointBilateralStack, prime_factors
from ..methods.interpolate import enlarge
from . import Observation
from .local_attention import LocalSelfAttention, Window

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "window": 5,  # Table 10; "3 or 5 appear to be optimal", Figure 13
        "alibi": False,  # no position term is named
        "tile_position": False,
        "layer_scale": 0.0,  # none is named; the no-op at the start comes from zero weights
        "mlp_ratio": 4.0,  # not stated: SwiGLU's usual two thirds of 4C
        "pad_heads": False,
        "aliased_guidance": False,  # the image is averaged down to the grid
    },
    "released": {
        "window": 7,
        "alibi": True,  # half of the heads by row distance, half by column distance
        "tile_position": True,  # one learned vector for each place in the mosaic
        "layer_scale": 1e-6,
        "mlp_ratio": 8.0,
        "pad_heads": True,  # queries and keys, but not values, are padded to a power of two
        "aliased_guidance": True,  # bilinear to the patch grid: four pixels of each patch count
    },
}
"""Values of the options that are None; everything else is the same in both."""

Input = Literal["bilinear", "featup", "tiles"]
Kind = Literal["linear", "attention", "mlp", "both"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a level; :class:`FeatSharpNetwork` explains them."""

    inputs: tuple[Input, ...]
    block: Kind
    window: int
    alibi: bool
    tile_position: bool
    layer_norm: bool
    layer_scale: float
    mlp_ratio: float
    pad_heads: bool
    aliased_guidance: bool


class FeatSharpNetwork(nn.Module):
    """FeatSharp (arXiv 2502.16025): FeatUp's map and tiles, fused by local attention.

    An untrained one returns its first input.

    Args:
        channels: C.
        factor: at least 2.
        preset: "paper" or "released": the values of the options that are None.
        inputs: of bilinear, featup and tiles, one to three; the first is the residual path (Table
            8).
        block: linear, attention, mlp or both (Table 10).
        window: cells that attention sees (Figure 13).
        alibi: let attention fall off with distance.
        tile_position: add a learned vector to each tile.
        layer_norm: normalise before attention and before the MLP.
        layer_scale: start of the learned scale of both branches; 0 for no such scale, and zero
            weights at the end of the branches.
        mlp_ratio: two thirds of this times C, rounded up to a multiple of 8, is SwiGLU's width.
        pad_heads: pad queries and keys to a power of two.
        aliased_guidance: shrink the image to the fine grid by four pixels a cell.
        progressive: one level for each prime factor, with its own tiles (section 3.5); otherwise
            one level with the finest tiles.

    Raises:
        ConfigError: a factor below 2, no input, or one twice.
    """

    def __init__(
        self,
        channels: int,
        factor: int,
        preset: Literal["paper", "released"] = "paper",
        inputs: tuple[Input, ...] = ("featup", "tiles"),
        block: Kind = "both",
        window: Window | None = None,
        alibi: bool | None = None,
        tile_position: bool | None = None,
        layer_norm: bool = True,
        layer_scale: Weight | None = None,
        mlp_ratio: AboveZero | None = None,
        pad_heads: bool | None = None,
        aliased_guidance: bool | None = None,
        progressive: bool = False,
    ):
        super().__init__()
        if not inputs or len(set(inputs)) < len(inputs):
            raise ConfigError(
                f"featsharp's inputs are {list(inputs)}; name one to three different ones"
            )
        if factor < 2:
            raise ConfigError(f"featsharp's factor is {factor}; it must be at least 2")
        given: dict[str, Any] = {
            "window": window,
            "alibi": alibi,
            "tile_position": tile_position,
            "layer_scale": layer_scale,
            "mlp_ratio": mlp_ratio,
            "pad_heads": pad_heads,
            "aliased_guidance": aliased_guidance,
        }
        chosen = {k: PRESETS[preset][k] if value is None else value for k, value in given.items()}
        options = Options(inputs=tuple(inputs), block=block, layer_norm=layer_norm, **chosen)
        steps = prime_factors(factor) if progressive else (factor,)
        scales = [math.prod(steps[: index + 1]) for index in range(len(steps))]
        self.levels = nn.ModuleList(
            Level(channels, step, scale, options) for step, scale in zip(steps, scales, strict=True)
        )
        self.tile_levels = tuple(scales) if "tiles" in options.inputs else ()

    def forward(self, observation: Observation) -> Tensor:
        """Return ``[B, C, h * factor, w * factor]``."""
        fine = observation.low
        for level in self.levels:
            fine = level(fine, observation.guidance, observation.tiles)
        return fine


class Level(nn.Module):
    """One upsampling step: its inputs at the fine grid, and the block that fuses them.

    Args:
        channels: C.
        factor: how much finer than what it is given.
        scale: how much finer than the teacher's own grid, which is the level of its tiles.
        options: see :class:`FeatSharpNetwork`.
    """

    tile_position: nn.Parameter | None

    def __init__(self, channels: int, factor: int, scale: int, options: Options):
        super().__init__()
        self.factor, self.scale = factor, scale
        self.inputs, self.aliased_guidance = options.inputs, options.aliased_guidance
        if "featup" in self.inputs:
            self.jbu = JointBilateralStack(channels, factor, variant="featsharp")
        has_position = options.tile_position and "tiles" in self.inputs
        position = nn.Parameter(torch.zeros(1, channels, scale, scale)) if has_position else None
        self.register_parameter("tile_position", position)
        self.block = Block(channels, options)

    def forward(self, low: Tensor, guidance: Tensor, tiles: Mapping[int, Tensor]) -> Tensor:
        """Return ``[B, C, h * factor, w * factor]`` for ``[B, C, h, w]``."""
        grid = (low.shape[-2] * self.factor, low.shape[-1] * self.factor)
        maps = []
        for name in self.inputs:
            if name == "featup":
                maps.append(self.jbu(low, self.guided(guidance, grid)))
            elif name == "tiles":
                maps.append(self.placed(tiles, grid))
            else:
                maps.append(enlarge(low, grid))
        # Under autocast the block reads rounded maps; the residual path does not lose a digit.
        tokens = torch.cat([_rounded(each) for each in maps], dim=1)
        change: Tensor = self.block(rearrange(tokens, "b c h w -> b h w c"))
        return maps[0] + rearrange(change, "b h w c -> b c h w")

    def guided(self, guidance: Tensor, grid: Size) -> Tensor:
        """Return the image as the joint-bilateral stack is shown it."""
        if not self.aliased_guidance:
            return guidance
        return F.interpolate(guidance, grid, mode="bilinear", align_corners=False)

    def placed(self, tiles: Mapping[int, Tensor], grid: Size) -> Tensor:
        """Return the mosaic ``[B, C, *grid]``, each tile with the vector of its place."""
        mosaic = tiles.get(self.scale)
        if mosaic is None or tuple(mosaic.shape[-2:]) != grid:
            given = "none" if mosaic is None else "x".join(map(str, mosaic.shape[-2:]))
            raise ConfigError(
                f"featsharp needs tiles of level {self.scale} on the grid {grid[0]}x{grid[1]}, it "
                f"has {given}; encode {self.scale}x{self.scale} tiles of the same image"
            )
        if self.tile_position is None:
            return mosaic
        height, width = grid[0] // self.scale, grid[1] // self.scale
        position = self.tile_position.repeat_interleave(height, -2).repeat_interleave(width, -1)
        return mosaic + position


def _rounded(features: Tensor) -> Tensor:
    device = features.device.type
    if not torch.is_autocast_enabled(device):
        return features
    return features.to(torch.get_autocast_dtype(device))


class Block(nn.Module):
    """Local attention and SwiGLU on ``[B, h, w, n * C]``: the change of the first C channels.

    The MLP reads all the channels and writes the C that are kept; so does attention where no MLP
    follows.
    """

    attention: "Branch | None"
    mlp: "Branch | None"

    def __init__(self, channels: int, options: Options):
        super().__init__()
        width = channels * len(options.inputs)
        self.channels = channels
        self.attention = self.mlp = None
        if options.block in ("attention", "both"):
            out = width if options.block == "both" else channels
            body = LocalSelfAttention(width, out, options.window, options.alibi, options.pad_heads)
            self.attention = Branch(width, body, out, options)
        if options.block == "linear":
            self.mlp = Branch(width, nn.Linear(width, channels), channels, options)
        elif options.block != "attention":
            hidden = -(-int(options.mlp_ratio * channels * 2 / 3) // 8) * 8
            self.mlp = Branch(width, SwiGLU(width, hidden, channels), channels, options)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``[B, h, w, C]``."""
        if self.attention is None:
            assert self.mlp is not None, "a block has at least one branch"
            return self.mlp(tokens)
        attended: Tensor = self.attention(tokens)
        if self.mlp is None:
            return attended
        return attended[..., : self.channels] + self.mlp(tokens + attended)


class Branch(nn.Module):
    """One half of the block: LayerNorm, body, learned scale."""

    scale: nn.Parameter | None

    def __init__(self, width: int, body: nn.Module, out: int, options: Options):
        super().__init__()
        self.norm = nn.LayerNorm(width) if options.layer_norm else nn.Identity()
        self.body = body
        scale = (
            nn.Parameter(torch.full((out,), options.layer_scale)) if options.layer_scale else None
        )
        self.register_parameter("scale", scale)
        if scale is None:
            last = [module for module in body.modules() if isinstance(module, nn.Linear)][-1]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the change ``[B, h, w, out]``."""
        change = self.body(self.norm(tokens))
        return change if self.scale is None else change * self.scale


class SwiGLU(nn.Module):
    """``w3(silu(a) * b)`` with a, b the halves of ``w12(x)``."""

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, out)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``[..., out]``."""
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out
