"""Bilinear interpolation and what a small convolution adds to it."""

from torch import nn
from torch.nn import functional as F


class MyNetwork(nn.Module):
    """Further arguments are `fit.options`."""

    tile_levels = ()  # (2,) for the 2 x 2 tiles of the image, and so on

    def __init__(self, channels, factor, kernel=3):
        super().__init__()
        self.factor = factor
        self.mend = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        nn.init.zeros_(self.mend.weight)

    def forward(self, observation):
        """Return [B, C, h * factor, w * factor]."""
        fine = F.interpolate(observation.low, scale_factor=self.factor, mode="bilinear")
        return fine + self.mend(fine)
