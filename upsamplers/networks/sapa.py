"""SAPA: similarity-aware point affiliation (arXiv 2209.12866).

A fine cell takes from those low-resolution cells around it that resemble it: the kernel is the
softmax of the similarity between what the fine cell shows and what each neighbour says, in a low-
rank bilinear form (the paper's SAPA-B; without its gate).

The paper stands in a decoder, where the encoder has features of the fine size. There are none
here, so what a fine cell shows is its mean colour through a small MLP. And to the similarity is
added a learned bias for each tap, which starts at bilinear interpolation: colour alone does not
know where in the neighbourhood the fine cell lies.
"""

from einops import rearrange
from torch import Tensor, nn

from radio_distill.config.fields import Odd, Positive

from . import Observation
from .carafe import bilinear_logits, neighbourhoods, reassemble
from .guidance import MeanColours


class SapaNetwork(nn.Module):
    """SAPA (arXiv 2209.12866): kernels of the similarity of colours and features.

    Args:
        channels: C of the features.
        factor: how much finer the result is.
        kernel_size: side of the neighbourhood, in low-resolution cells; the paper's K.
        embedding_channels: where the two are compared; the paper's d.
    """

    tile_levels: tuple[int, ...] = ()

    def __init__(
        self, channels: int, factor: int, kernel_size: Odd = 5, embedding_channels: Positive = 32
    ):
        super().__init__()
        self.factor, self.kernel_size = factor, kernel_size
        last = nn.Conv2d(embedding_channels, embedding_channels, 1)
        nn.init.normal_(last.weight, std=0.02)
        self.colours = MeanColours(factor)
        self.query = nn.Sequential(nn.Conv2d(3, embedding_channels, 1), nn.GELU(), last)
        # No biases: they would add the same to each tap, which the softmax takes away again.
        self.norm = nn.LayerNorm(channels, bias=False)
        self.key = nn.Linear(channels, embedding_channels, bias=False)
        self.position = nn.Parameter(bilinear_logits(factor, kernel_size))  # [f * f, T]

    def forward(self, observation: Observation) -> Tensor:
        """Return ``[B, C, h * factor, w * factor]``."""
        weights = (self._similarity(observation) + self.position).softmax(-1)
        return reassemble(observation.low, weights, self.factor)

    def _similarity(self, observation: Observation) -> Tensor:
        """Return logits ``[B, h, w, f * f, T]``."""
        queries = self.query(self.colours(observation))
        queries = rearrange(
            queries, "b d (h i) (w j) -> b h w (i j) d", i=self.factor, j=self.factor
        )
        keys = self.key(self.norm(rearrange(observation.low, "b c h w -> b h w c")))
        keys = neighbourhoods(rearrange(keys, "b h w d -> b d h w"), self.kernel_size)
        return queries @ keys.mT * keys.shape[-1] ** -0.5
