"""Bilinear interpolation as a network, alone and corrected by one 3x3 convolution.

Resize-convolution is after "Deconvolution and checkerboard artifacts" (Odena et al., Distill 2016):
unlike a transposed convolution it treats each fine cell alike, so it draws no grid. The convolution
is a residual that starts at zero; it costs 9 * C * C multiply-adds a fine cell.
"""

from torch import Tensor, nn

from ..methods.interpolate import enlarge
from . import Observation


class BilinearNetwork(nn.Module):
    """Interpolate ``factor`` times finer, without parameters: what fitting has to beat."""

    tile_levels: tuple[int, ...] = ()

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.factor = factor

    def forward(self, observation: Observation) -> Tensor:
        """Return ``[B, C, h * factor, w * factor]``."""
        height, width = observation.low.shape[2:]
        return enlarge(observation.low, (height * self.factor, width * self.factor))


class ResizeConvNetwork(nn.Module):
    """Bilinear interpolation and a 3x3 convolution of it."""

    tile_levels: tuple[int, ...] = ()

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.interpolate = BilinearNetwork(channels, factor)
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="replicate")
        for parameter in self.convolution.parameters():
            nn.init.zeros_(parameter)

    def forward(self, observation: Observation) -> Tensor:
        """Return ``[B, C, h * factor, w * factor]``."""
        fine: Tensor = self.interpolate(observation)
        return fine + self.convolution(fine)
