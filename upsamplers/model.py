"""A network with what surrounds it: the teacher's scale, and the de-bias of its positions.

::

    teacher's maps ──► PHI-S ──► + bias ──► network ──► PHI-S back ──► fine map, teacher's space

The bias is one learned map at the teacher's own grid, added to the map of the whole image and to
that of every tile: what the encoder adds to each position whatever it sees (FeatSharp, arXiv
2502.16025, section 3.4). It works for any network, for it comes before it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio_distill.distill.views import resize
from radio_distill.protocols import Normalizer, Teacher
from radio_distill.types import Features, Size

from .methods import tiling
from .networks import Observation


class Seen(NamedTuple):
    """What a teacher says of a batch, in the normalised space and not yet de-biased."""

    summary: Tensor | None
    observation: Observation
    further: Tensor
    """``[N, C, h, w]`` of the further images that were encoded along."""


class UpsamplerModel(nn.Module):
    """A network, its teacher's scale and its teacher's bias.

    Args:
        network: see :mod:`upsamplers.networks`.
        normalizer: a fitted one.
        channels: C.
        grid: the teacher's own grid (h, w) that the bias is learned at; None for no bias.
    """

    bias: nn.Parameter | None
    """``[1, C, h, w]``, in the normalised space."""

    def __init__(
        self, network: nn.Module, normalizer: Normalizer, channels: int, grid: Size | None
    ):
        super().__init__()
        self.network = network
        self.normalizer = normalizer
        bias = None if grid is None else nn.Parameter(torch.zeros(1, channels, *grid))
        self.register_parameter("bias", bias)

    @property
    def tile_levels(self) -> tuple[int, ...]:
        """Levels of tiles that the network looks at."""
        return tuple(self.network.tile_levels)  # type: ignore[arg-type]

    @torch.no_grad()
    def see(
        self,
        teacher: Teacher,
        pixels: Tensor,
        grid: Size,
        factor: int,
        micro_batch: int = 0,
        further: Tensor | None = None,
    ) -> Seen:
        """Encode ``[B, 3, H, W]`` for the fine ``grid``; see :func:`.tiling.encode_with_tiles`."""
        encoded = tiling.encode_with_tiles(
            teacher, pixels, grid, factor, self.tile_levels, micro_batch, further
        )
        guidance = encoded.images.get(factor)
        if guidance is None:
            height, width = tiling.low_resolution(teacher, grid, factor)
            guidance = resize(pixels, (height * factor, width * factor))
        normalise = self.normalizer.apply
        tiles = {level: normalise(tiles) for level, tiles in encoded.tiles.items()}
        low = normalise(encoded.low.spatial)
        further_maps = normalise(encoded.further) if len(encoded.further) else encoded.further
        return Seen(encoded.low.summary, Observation(guidance, low, tiles), further_maps)

    def forward(self, observation: Observation) -> Tensor:
        """De-bias, then upsample: ``[B, C, h * factor, w * factor]`` in the normalised space."""
        tiles = {level: self.de_biased(maps, level) for level, maps in observation.tiles.items()}
        seen = Observation(observation.guidance, self.de_biased(observation.low), tiles)
        fine: Tensor = self.network(seen)
        return fine

    def de_biased(self, maps: Tensor, level: int = 1) -> Tensor:
        """Add the bias to normalised maps of ``level x level`` tiles, resized where they differ."""
        if self.bias is None:
            return maps
        height, width = maps.shape[-2] // level, maps.shape[-1] // level
        bias = _resized(self.bias, (height, width))
        return maps + bias.repeat(1, 1, level, level)

    @torch.no_grad()
    def correct(self, spatial: Tensor) -> Tensor:
        """De-bias maps ``[B, C, h, w]`` in the teacher's own space, at any grid.

        FeatSharp, appendix C: the bias belongs to the teacher, so a partition that sees the teacher
        at its own grid is better off without it too.
        """
        if self.bias is None:
            return spatial
        origin = self.normalizer.invert(torch.zeros_like(self.bias))
        own = self.normalizer.invert(self.bias) - origin
        return spatial + _resized(own, (spatial.shape[-2], spatial.shape[-1])).to(spatial)

    @torch.no_grad()
    def upsample(
        self, teacher: Teacher, pixels: Tensor, grid: Size, factor: int, micro_batch: int = 0
    ) -> Features:
        """Return features in the teacher's own space with spatial ``[B, C, *grid]``."""
        seen = self.see(teacher, pixels, grid, factor, micro_batch)
        spatial = self.normalizer.invert(self(seen.observation))
        return Features(seen.summary, spatial.contiguous(memory_format=torch.channels_last))


def _resized(bias: Tensor, grid: Size) -> Tensor:
    if tuple(bias.shape[-2:]) == grid:
        return bias
    return F.interpolate(bias, grid, mode="bilinear", align_corners=False)
