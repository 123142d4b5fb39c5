"""Networks of fitted upsamplers, all called alike, so that one loop fits them all.

A network works in the teacher's normalised space (PHI-S) and knows neither teacher nor file. What
it is shown is an :class:`Observation`; :mod:`upsamplers.fitted` makes it, adds the de-bias, and
goes back to the teacher's own space. A network is an ``nn.Module`` built as
``Network(channels, factor, **options)``; which types and numbers its options take is said by its
signature.

Importing this module does not import torch.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from radio_distill.config import build_options
from radio_distill.errors import ConfigError
from radio_distill.registry import Registry, check_has, check_takes

if TYPE_CHECKING:
    from torch import Tensor, nn


class Observation(NamedTuple):
    """A batch of images as a network sees them; h, w are the teacher's own grid."""

    guidance: "Tensor"
    """``[B, 3, H, W]`` RGB in [0, 1], of ``factor`` times the pixels of the teacher's input."""
    low: "Tensor"
    """``[B, C, h, w]`` features of the whole image, normalised and de-biased."""
    tiles: "Mapping[int, Tensor]" = {}  # noqa: RUF012 - never written to
    """``{level: [B, C, h * level, w * level]}``: stitched features of level x level tiles."""


NETWORKS = Registry(
    "network",
    {
        "bilinear": "upsamplers.networks.resize_conv:BilinearNetwork",
        "featup": "upsamplers.networks.featup:FeatUpNetwork",
        "featsharp": "upsamplers.networks.featsharp:FeatSharpNetwork",
        "carafe": "upsamplers.networks.carafe:CarafeNetwork",
        "sapa": "upsamplers.networks.sapa:SapaNetwork",
        "resize_conv": "upsamplers.networks.resize_conv:ResizeConvNetwork",
        "uplift": "upsamplers.networks.uplift:UpliftNetwork",
        "lift": "upsamplers.networks.lift:LiftNetwork",
        "deconvolution": "upsamplers.networks.deconvolution:DeconvolutionNetwork",
        "indexnet": "upsamplers.networks.indexnet:IndexNetNetwork",
        "a2u": "upsamplers.networks.a2u:A2UNetwork",
        "fade": "upsamplers.networks.fade:FadeNetwork",
        "resfu": "upsamplers.networks.resfu:ReSFUNetwork",
    },
)
"""A network has ``tile_levels: tuple[int, ...]``, the levels of tiles that it needs, and
``forward(observation) -> [B, C, h * factor, w * factor]``."""


def build_network(name: str, channels: int, factor: int, options: Mapping[str, Any]) -> "nn.Module":
    """Build a network with random weights; raises ConfigError for an option it does not take."""
    if factor < 1:
        raise ConfigError(f"upsampler.factor is {factor}; it must be at least 1")
    kind = NETWORKS.get(name)
    check_takes(f"network {name!r}", kind, ("channels", "factor"))
    known = build_options(kind, options, f"upsampler {name}", given=("channels", "factor"))
    network = kind(channels, factor, **known)
    check_has(f"network {name!r}", network, ("tile_levels", "forward", "parameters"))
    return cast("nn.Module", network)
