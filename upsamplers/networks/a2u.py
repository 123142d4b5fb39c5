"""A2U: affinity-aware upsampling, kernels out of second-order features of the image.

A2U (arXiv 2011.14288), section 4, dynamic and shared by channels: two kernels that the image itself
predicts make two coarse maps of it; their product at a cell, times a vector of the whole image,
gives the logits of all its fine cells' kernels. Ours differs in three things: what it reads is the
image rather than an encoder's features (:mod:`.guidance`); edges are repeated rather than filled
with zeros, so that a constant map stays constant; and the predicted kernels, whose side is 6 at 2x,
are of three cells at any factor.
"""

from typing import Annotated

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from radio_distill.config.fields import Odd, Range

from . import Observation
from .carafe import reassemble
from .guidance import FineGuide


class A2UNetwork(nn.Module):
    """A2U (arXiv 2011.14288): kernels of the image's second-order features.

    The paper's softmax of sigmoids keeps weights within a factor e of each other: it can only blur,
    a little more here than there. It starts at the mean of the neighbourhood.

    Args:
        channels: C of the features.
        factor: f, how much finer the result is.
        kernel_size: side of the neighbourhood, in low-resolution cells; the paper's s.
        guide_channels: c, what is read off the image.
    """

    tile_levels: tuple[int, ...] = ()

    def __init__(
        self,
        channels: int,
        factor: int,
        kernel_size: Odd = 3,
        guide_channels: Annotated[int, Range(32, step=32)] = 64,
    ):
        super().__init__()
        self.factor = factor
        self.guide = FineGuide(factor, guide_channels)
        self.left, self.right = (Affine(guide_channels, factor) for _ in range(2))
        self.spread = nn.Conv2d(guide_channels, (factor * kernel_size) ** 2, 1)

    def forward(self, observation: Observation) -> Tensor:
        """Return ``[B, C, h * factor, w * factor]``."""
        guide = self.guide(observation)
        left, right = self.left(guide), self.right(guide)
        affinity = (left * right).sum(1, keepdim=True) * guide.shape[1] ** -0.5  # [B, 1, h, w]
        logits = affinity * self.spread(guide.mean((2, 3), keepdim=True))  # [B, T * f * f, h, w]
        weights = rearrange(logits.sigmoid(), "b (t f) h w -> b h w f t", f=self.factor**2)
        return reassemble(observation.low, weights.softmax(-1), self.factor)


class Affine(nn.Module):
    """Shrink a map by the factor, each image under one kernel of its own for all channels."""

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.factor = factor
        self.kernel = nn.Conv2d(channels, 1, 1)
        self.norm = nn.GroupNorm(32, channels)

    def forward(self, guide: Tensor) -> Tensor:
        """Return ``[B, c, h, w]`` for ``[B, c, h * factor, w * factor]``."""
        kernel = self.kernel(F.adaptive_avg_pool2d(guide, 3 * self.factor))  # [B, 1, k, k]
        padded = F.pad(guide, (self.factor,) * 4, mode="replicate")
        images = rearrange(padded, "b c h w -> c b h w")  # a kernel for each image: its group
        coarse = F.conv2d(images, kernel, stride=self.factor, groups=len(guide))
        return F.leaky_relu(self.norm(rearrange(coarse, "c b h w -> b c h w")))
