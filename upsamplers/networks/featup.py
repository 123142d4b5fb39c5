"""FeatUp: joint-bilateral upsampling under the image, no encoder calls beside the first.

The stack of :mod:`upsamplers.joint_bilateral` as a network that the fitting loop knows (FeatUp,
arXiv 2403.10516, section 3.1). The implicit form is in :mod:`upsamplers.implicit`.
"""

from torch import Tensor, nn

from radio_distill.config.fields import Positive

from ..joint_bilateral.dispatch import Implementation
from ..joint_bilateral.layer import JointBilateralStack, Similarity, Variant
from . import Observation
from .guidance import as_imagenet


class FeatUpNetwork(nn.Module):
    """FeatUp (arXiv 2403.10516): joint-bilateral filters under the image.

    The image is normalised as in the published weights.

    Args:
        channels: of the features.
        factor: any integer from 1.
        variant: ``featup`` or ``featsharp``; :mod:`.joint_bilateral.layer` has the difference.
        radius: of the window, in target pixels.
        key_channels: width of the projected guidance.
        implementation: ``auto``, ``reference``, ``folded`` or ``triton``.
        guidance_mlp: whether an MLP projects the guidance before pixels are compared; without it
            they are compared by their colours (a row of the paper's Tables 3 and 4).
        similarity: ``softmax`` of dot products, or of minus the ``euclidean`` or ``cosine``
            distance (two further rows there).
    """

    tile_levels: tuple[int, ...] = ()

    def __init__(
        self,
        channels: int,
        factor: int,
        variant: Variant = "featup",
        radius: Positive = 3,
        key_channels: Positive = 32,
        implementation: Implementation = "auto",
        guidance_mlp: bool = True,
        similarity: Similarity = "softmax",
    ) -> None:
        super().__init__()
        self.stack = JointBilateralStack(
            channels,
            factor,
            variant,
            radius=radius,
            key_channels=key_channels,
            implementation=implementation,
            guidance_mlp=guidance_mlp,
            similarity=similarity,
        )

    def forward(self, observation: Observation) -> Tensor:
        """Return ``[B, C, h * factor, w * factor]``."""
        upsampled: Tensor = self.stack(observation.low, as_imagenet(observation.guidance))
        return upsampled
