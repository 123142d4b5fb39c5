"""What networks read off the image: mean colours on the fine grid, and two convolutions of them.

SAPA, FADE, A2U and IndexNet were made for decoders, beside an encoder with features of the fine
size. A teacher has none, so the image stands in for them.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from . import Observation


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
