"""What networks read off the image: colours, their means on the fine grid, convolutions of them.

SAPA, FADE, A2U and IndexNet were made for decoders, beside an encoder with features of the fine
size. A teacher has none, so the image stands in for them.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio_distill.config.fields import Range
from radio_distill.types import IMAGENET_MEAN, IMAGENET_STD

from . import Observation

Grouped = Annotated[int, Range(8, step=8)]
"""Channels that are normalised in 8 groups."""


def as_imagenet(pixels: Tensor) -> Tensor:
    """Return ``[..., 3, H, W]`` RGB in [0, 1] by ImageNet's mean and deviation.

    They are numbers of the host, so that nothing is copied to the device, which would wait for it.
    """
    channels = zip(pixels.unbind(-3), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=-3)


class FineGuide(nn.Sequential):
    """Two 3x3 convolutions of the mean colours: ``[B, C, h * factor, w * factor]``.

    They are normalised in groups of channels, so that a fit's gradient does not depend on how its
    images are shared out to passes and processes, as batch statistics would.
    """

    def __init__(self, factor: int, channels: int = 32):
        super().__init__(
            MeanColours(factor),
            nn.Conv2d(3, channels, 3, padding=1, padding_mode="replicate"),
            nn.GroupNorm(8, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, padding_mode="replicate"),
        )


class MeanColours(nn.Module):
    """Average the image over each fine cell: ``[B, 3, h * factor, w * factor]``."""

    def __init__(self, factor: int):
        super().__init__()
        self.factor = factor

    def forward(self, observation: Observation) -> Tensor:
        height, width = observation.low.shape[2:]
        fine = (height * self.factor, width * self.factor)
        return F.adaptive_avg_pool2d(observation.guidance, fine)
