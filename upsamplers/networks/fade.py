"""FADE: kernels from the image and the features together.

FADE (arXiv 2207.10392), section 3: the same 3x3 convolution predicts the kernel of a fine cell from
what the image shows there and from what the features say of its cell, added up; then CARAFE's
mixing. What it reads is the image rather than an encoder's features (:mod:`.guidance`). Ours
differs in three things: edges are repeated rather than filled with zeros; the bias of the logits is
learned for each fine cell of a cell apart and starts at bilinear interpolation (the paper has one
for all, and starts at a blur); and the gate, which lets the encoder's features through, is off, as
there are none.
"""

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from radio_distill.config.fields import Odd, Positive

from . import Observation
from .carafe import bilinear_logits, reassemble
from .guidance import FineGuide, Grouped


class FadeNetwork(nn.Module):
    """FADE (arXiv 2207.10392): kernels that image and features predict together.

    Args:
        channels: C of the features.
        factor: f, how much finer the result is.
        kernel_size: side of the neighbourhood, in low-resolution cells; the paper's K.
        embedding_channels: what image and features are both brought to; the paper's 64.
        guide_channels: what is read off the image.
        gate: let the image's features, brought to C channels, through where a gate of the features
            says so. A constant map does not stay constant then.
        lite: bring both straight to the numbers of a kernel, each of which a convolution of its own
            smooths (FADE-Lite); ``embedding_channels`` has no part in it.
    """

    tile_levels: tuple[int, ...] = ()

    def __init__(
        self,
        channels: int,
        factor: int,
        kernel_size: Odd = 5,
        embedding_channels: Positive = 64,
        guide_channels: Grouped = 32,
        gate: bool = False,
        lite: bool = False,
    ):
        super().__init__()
        self.factor, taps = factor, kernel_size**2
        width, groups = (taps, taps) if lite else (embedding_channels, 1)
        self.guide = FineGuide(factor, guide_channels)
        self.from_image = nn.Conv2d(guide_channels, width, 1)
        self.from_features = nn.Conv2d(channels, width, 1, bias=False)
        edges: dict[str, Any] = {"padding": 1, "padding_mode": "replicate"}
        self.encode = nn.Conv2d(width, taps, 3, groups=groups, bias=False, **edges)
        nn.init.normal_(self.encode.weight, std=1e-3)
        self.position = nn.Parameter(bilinear_logits(factor, kernel_size))  # [f * f, T]
        self.project = self.gate = None
        if gate:
            self.project = nn.Conv2d(guide_channels, channels, 1)
            self.gate = nn.Conv2d(channels, 1, 1)
            nn.init.zeros_(self.project.weight)
            # Nearly closed, since what comes through it starts at zero.
            nn.init.constant_(self.gate.bias, -4.0)  # type: ignore[arg-type]

    def forward(self, observation: Observation) -> Tensor:
        """Return ``[B, C, h * factor, w * factor]``."""
        low, f = observation.low, self.factor
        guide = self.guide(observation)
        fine = self.encode(self.from_image(guide))
        fine = rearrange(fine, "b t (h i) (w j) -> b h w (i j) t", i=f, j=f)
        coarse = rearrange(self.encode(self.from_features(low)), "b t h w -> b h w 1 t")
        weights = (fine + coarse + self.position).softmax(-1)
        mixed = reassemble(low, weights, f)
        if self.gate is None or self.project is None:
            return mixed
        gate = F.interpolate(self.gate(low).sigmoid(), scale_factor=float(f), mode="nearest")
        return gate * self.project(guide) + (1 - gate) * mixed
