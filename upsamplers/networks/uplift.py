"""UPLiFT: one light step of 2x, taken again and again under one encoding of the image.

Walmer et al. (arXiv 2601.17950, CVPR 2026). A small decoder reads the map and what an encoder saw
of the image at that resolution, and says for each fine cell how to mix 17 cells of the coarser map
around it (the paper's local attender). The result is a weighted mean, so constants stay constants.

Four things are ours. A bias for each tap and fine cell starts at bilinear interpolation, without
which the first map is a blur of five cells. Where the released configurations normalise by batch,
ours normalises each place by its channels, which their code offers too: the gradient of a step must
not depend on how many passes and processes share it. The encoder is asked at the middle of a cell,
not at its upper left pixel. And only the last map is compared with the teacher, as for every
network here, unless ``fit.halvings`` asks for the paper's own training.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from radio_distill.config.fields import Positive, Range
from radio_distill.types import Size

from ..methods.interpolate import enlarge
from . import Observation
from .carafe import bilinear_logits, reassemble
from .guidance import as_imagenet

ENCODER_WIDTHS = (16, 32, 64, 128, 128)
OFFSETS = ((-2, -2), (-2, 0), (-2, 2), (-1, -1), (-1, 0), (-1, 1), (0, -2), (0, -1), (0, 0),
           (0, 1), (0, 2), (1, -1), (1, 0), (1, 1), (2, -2), (2, 0), (2, 2))  # fmt: skip
"""Rows and columns from a cell to those that its fine cells mix."""
_REACH = 2
_TAPS = [(row + _REACH) * (2 * _REACH + 1) + column + _REACH for row, column in OFFSETS]


class UpliftNetwork(nn.Module):
    """UPLiFT (arXiv 2601.17950): steps of 2x that mix nearby cells under the image.

    They share their weights; another factor is interpolated from the next power.

    Args:
        channels: C of the features.
        factor: how much finer the result is.
        width: of the decoder.
        cell_pixels: pixels a side in which the encoder sees a low-resolution cell; the paper's 16.
            Time and memory of the encoder go with its square.
    """

    tile_levels: tuple[int, ...] = ()
    taps: Tensor

    def __init__(
        self,
        channels: int,
        factor: int,
        width: Annotated[int, Range(len(OFFSETS))] = 64,
        cell_pixels: Positive = 16,
    ):
        super().__init__()
        self.factor, self.cell_pixels = factor, cell_pixels
        self.num_steps = (factor - 1).bit_length()
        ins = (3, *ENCODER_WIDTHS[:-1])
        self.encoder = nn.ModuleList(
            _Residual(size, out, 1) for size, out in zip(ins, ENCODER_WIDTHS, strict=True)
        )
        self.enter = _Residual(channels + ENCODER_WIDTHS[-1], width, 2)
        self.enlarge = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.leave = _Residual(width + ENCODER_WIDTHS[-2], width, 2)
        self.attend = nn.Conv2d(width, len(OFFSETS), 1)
        start = bilinear_logits(2, 2 * _REACH + 1)  # [4, 25]
        self.position = nn.Parameter(start[:, _TAPS])
        self.register_buffer("taps", torch.tensor(_TAPS), persistent=False)

    def forward(self, observation: Observation) -> Tensor:
        """Return ``[B, C, h * factor, w * factor]``."""
        low, (height, width) = observation.low, observation.low.shape[2:]
        if not self.num_steps:
            return low
        low = self.steps(observation, self.num_steps)[-1]
        grid = (height * self.factor, width * self.factor)
        return low if low.shape[2:] == grid else enlarge(low, grid)

    def steps(self, observation: Observation, count: int) -> list[Tensor]:
        """Return the maps behind each of some steps: ``[B, C, 2 h, 2 w]``, ``[B, C, 4 h, 4 w]`` …

        The image may be of any size.
        """
        low, maps = observation.low, list[Tensor]()
        encoded = self._encode(observation.guidance, (low.shape[2], low.shape[3]))
        for _ in range(count):
            low = reassemble(low, self._weights(low, *encoded), 2)
            maps.append(low)
        return maps

    def _encode(self, guidance: Tensor, grid: Size) -> tuple[Tensor, Tensor]:
        """Return the maps of the last two blocks, of ``cell_pixels`` pixels a cell of the grid."""
        size = (grid[0] * self.cell_pixels, grid[1] * self.cell_pixels)
        maps = [as_imagenet(F.adaptive_avg_pool2d(guidance, size))]
        for block in self.encoder:
            maps.append(block(maps[-1]))
        return maps[-2], maps[-1]

    def _weights(self, low: Tensor, before: Tensor, last: Tensor) -> Tensor:
        """Return how the fine cells of one step mix the 25 cells around theirs.

        Args:
            low: ``[B, C, h, w]`` of this step.
            before: the encoder's last but one map.
            last: its last.

        Returns:
            ``[B, h, w, 4, 25]``, 0 for the taps that are not among ``OFFSETS``.
        """
        batch, _, height, width = low.shape
        hidden = self.enter(_beside(low, last))
        # The published residual aligns corners, unlike everything else here.
        smooth = F.interpolate(hidden, scale_factor=2, mode="bilinear", align_corners=True)
        guide = self.leave(_beside(self.enlarge(hidden) + smooth, before))
        logits = self.attend(guide) + guide[:, : len(OFFSETS)]
        cells = logits.view(batch, len(OFFSETS), height, 2, width, 2).permute(0, 2, 4, 3, 5, 1)
        shares = (cells.flatten(3, 4) + self.position).softmax(-1)  # [B, h, w, 4, 17]
        weights = shares.new_zeros(*shares.shape[:-1], (2 * _REACH + 1) ** 2)
        return weights.index_copy(-1, self.taps, shares)


class _Residual(nn.Module):
    """3x3 convolutions and one of 1x1, added to the input, cut or filled with zeros to fit."""

    def __init__(self, channels: int, width: int, num_convolutions: int):
        super().__init__()
        layers: list[nn.Module] = []
        for number in range(num_convolutions):
            size = width if number else channels
            layers += [nn.Conv2d(size, width, 3, padding=1, bias=False), LayerNorm2d(width)]
            layers += [nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, width, 1))

    def forward(self, maps: Tensor) -> Tensor:
        out: Tensor = self.layers(maps)
        missing = out.shape[1] - maps.shape[1]  # a negative number of channels is cut off
        return out + F.pad(maps, (0, 0, 0, 0, 0, missing))


def _beside(maps: Tensor, encoded: Tensor) -> Tensor:
    """Put what the encoder saw in the middle of each cell beside its channels."""
    seen = F.interpolate(encoded, maps.shape[2:], mode="nearest-exact")
    return torch.cat([maps, seen], dim=1)
