"""LiFT: a U-Net of image and map that makes twice as many cells a side, again and again.

Suri et al. (ECCV 2024). Unlike the other networks here it writes features rather than mixing those
there are, so even a constant map comes out as what it has learned to write. In the paper a step is
fitted alone, to the teacher's answer for an image of twice the size, as ``fit.halvings`` with
``fit.chain: false`` does; the common fit asks for the whole chain. And each place is normalised by
its channels rather than by the batch, for the reason that :mod:`.uplift` gives.
"""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ..methods.interpolate import enlarge
from . import Observation
from .guidance import as_imagenet

IMAGE_WIDTH = 32
CELL_PIXELS = 16
"""Pixels a side in which a step sees each cell of its input."""


class LiftNetwork(nn.Module):
    """LiFT (ECCV 2024): steps of 2x that a U-Net of image and map writes.

    They share their weights; another factor is interpolated from the next power.

    Args:
        channels: C of the features.
        factor: how much finer the result is.
    """

    tile_levels: tuple[int, ...] = ()

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.factor, self.num_steps = factor, (factor - 1).bit_length()
        joint, half = channels + IMAGE_WIDTH, max(1, channels // 2)
        self.fine = nn.Sequential(
            *_convolution(3, IMAGE_WIDTH, 2), *_convolution(IMAGE_WIDTH, IMAGE_WIDTH, 2),
            nn.MaxPool2d(2),
        )  # fmt: skip
        self.coarse = nn.Sequential(*_convolution(IMAGE_WIDTH, IMAGE_WIDTH, 2))
        self.enlarge = nn.ConvTranspose2d(joint, joint // 2, 2, stride=2)
        self.write = nn.Sequential(
            *_convolution(joint // 2 + IMAGE_WIDTH, half), *_convolution(half, half),
            nn.Conv2d(half, channels, 1),
        )  # fmt: skip

    def forward(self, observation: Observation) -> Tensor:
        """Return ``[B, C, h * factor, w * factor]``."""
        low, (height, width) = observation.low, observation.low.shape[2:]
        low = [low, *self.steps(observation, self.num_steps)][-1]
        grid = (height * self.factor, width * self.factor)
        return low if low.shape[2:] == grid else enlarge(low, grid)

    def steps(self, observation: Observation, count: int) -> list[Tensor]:
        """Return the maps behind each of some steps: ``[B, C, 2 h, 2 w]``, ``[B, C, 4 h, 4 w]`` …

        The image may be of any size.
        """
        maps = [observation.low]
        for _ in range(count):
            maps.append(self._step(maps[-1], observation.guidance))
        return maps[1:]

    def _step(self, low: Tensor, guidance: Tensor) -> Tensor:
        """Return ``[B, C, 2 h, 2 w]`` of ``low [B, C, h, w]`` and an image of any size."""
        size = (low.shape[2] * CELL_PIXELS, low.shape[3] * CELL_PIXELS)
        fine = self.fine(as_imagenet(F.adaptive_avg_pool2d(guidance, size)))  # [B, 32, 2 h, 2 w]
        hidden = self.enlarge(torch.cat([low, self.coarse(fine)], dim=1))
        written: Tensor = self.write(torch.cat([hidden, fine], dim=1))
        return written


def _convolution(channels: int, width: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), LayerNorm2d(width), nn.ReLU()
    )  # fmt: skip
