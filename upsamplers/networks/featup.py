"""FeatUp: joint-bilateral upsampling under the image, no encoder calls beside the first.

The stack of :mod:`upsamplers.joint_bilateral` as a network that the fitting loop knows (FeatUp,
arXiv 2403.10516, section 3.1). The implicit form is in :mod:`upsamplers.implicit`.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from radio_distill.types import IMAGENET_MEAN, IMAGENET_STD

from ..joint_bilateral import JointBilateralStack
from ..joint_bilateral.layer import Variant
from . import Observation


class FeatUpNetwork(nn.Module):
    """Upsample the low-resolution map under the image, normalised as in the published weights.

    Args:
        channels: of the features.
        factor: any integer from 1.
        variant: ``featup`` or ``featsharp``; :mod:`.joint_bilateral.layer` has the difference.
        radius: of the window, in target pixels.
        key_channels: width of the projected guidance.
        implementation: ``auto``, ``reference``, ``folded`` or ``triton``.
    """

    tile_levels: tuple[int, ...] = ()
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        channels: int,
        factor: int,
        variant: Variant = "featup",
        radius: int = 3,
        key_channels: int = 32,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.stack = JointBilateralStack(
            channels, factor, variant, radius, key_channels, implementation
        )
        mean, std = (
            rearrange(torch.tensor(v), "c -> 1 c 1 1") for v in (IMAGENET_MEAN, IMAGENET_STD)
        )
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, observation: Observation) -> Tensor:
        """Return ``[B, C, h * factor, w * factor]``."""
        guidance = (observation.guidance - self.mean) / self.std
        return self.stack(observation.low, guidance)
