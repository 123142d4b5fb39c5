"""Transposed convolution: each low-resolution cell paints ``2 * factor`` fine cells a side.

After "Deconvolution and checkerboard artifacts" (Odena et al., Distill 2016), whose fault this has:
fine cells are made by different weights, so what is learned can draw a grid. Ours starts at
bilinear interpolation rather than at random weights, to the border, which is repeated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Observation


class DeconvolutionNetwork(nn.Module):
    """A transposed convolution that starts at bilinear interpolation.

    It takes about ``4 * C * C`` multiply-adds a fine cell.

    Args:
        channels: C of the features.
        factor: f, how much finer the result is; the kernel's side is ``2 * f - f % 2``.
        depthwise: mix no channels: 16 weights a channel at 2x rather than ``16 * C``.
    """

    tile_levels: tuple[int, ...] = ()

    def __init__(self, channels: int, factor: int, depthwise: bool = False):
        super().__init__()
        self.factor, side = factor, 2 * factor - factor % 2
        groups = channels if depthwise else 1
        self.paint = nn.ConvTranspose2d(
            channels, channels, side, stride=factor, padding=factor // 2, groups=groups
        )
        place = torch.arange(side)
        triangle = 1 - (place - (side - 1) / 2).abs() / factor
        inputs, outputs = torch.arange(channels), torch.arange(channels) % (channels // groups)
        with torch.no_grad():
            self.paint.weight.zero_()
            self.paint.weight[inputs, outputs] = torch.outer(triangle, triangle)
            self.paint.bias.zero_()  # type: ignore[union-attr]

    def forward(self, observation: Observation) -> Tensor:
        """Return ``[B, C, h * factor, w * factor]``."""
        padded = F.pad(observation.low, (1, 1, 1, 1), mode="replicate")
        fine: Tensor = self.paint(padded)
        edge = slice(self.factor, -self.factor)
        return fine[:, :, edge, edge]
