"""Learned joint-bilateral upsampling: one level for each prime of the factor, smallest first.

FeatUp (arXiv 2403.10516, section 3.1) in its two published forms:

``featup``: what FeatUp's code does. Bicubic base; ``0.1 * MLP(kernel, guidance)`` added to the
    kernel, which is not normalised again, so constants are not kept; a 1x1 convolution on the
    output, times 0.1 and added; dropout, in training only.
``featsharp``: the baseline of FeatSharp (arXiv 2502.16025). Bilinear base, no fix-ups, no dropout:
    weights are positive and sum to one. Its two extra scalars ``range_alpha`` and
    ``spatial_alpha`` multiply a kernel that is normalised next; they cancel and are left out.

The parameters are named as in the published files. FeatUp's ``up<N + 1>.*`` is ``levels.<N>.*``
here and its ``fixup_proj.1.*`` the same; FeatSharp's ``ups.<N>.*`` is ``levels.<N>.*``, without the
two scalars. FeatUp's stack always has four levels of 2.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from radio_distill.errors import ConfigError
from radio_distill.types import Size

from .dispatch import Base, apply_kernel, joint_bilateral, range_weights

Variant = Literal["featup", "featsharp"]
Similarity = Literal["softmax", "euclidean", "cosine"]


class JointBilateralLevel(nn.Module):
    """Upsample to the size of the guidance; the weights depend on the guidance alone.

    Args:
        variant: see the module.
        radius: of the window, in target pixels.
        key_channels: width of the projected guidance.
        implementation: see :mod:`.dispatch`.
        guidance_mlp: whether an MLP projects the guidance before pixels are compared (FeatUp's
            Tables 3 and 4 leave it out in one row).
        similarity: the softmax is of dot products (``softmax``) or, as in other rows there, of a
            distance's Gaussian: ``cosine`` or ``euclidean``.
    """

    def __init__(
        self,
        variant: Variant = "featup",
        radius: int = 3,
        key_channels: int = 32,
        implementation: str = "auto",
        guidance_mlp: bool = True,
        similarity: Similarity = "softmax",
    ) -> None:
        super().__init__()
        self.radius, self.implementation, self.similarity = radius, implementation, similarity
        dropout = variant == "featup"
        self.range_temp = nn.Parameter(torch.zeros(()))
        self.sigma_spatial = nn.Parameter(torch.ones(()))
        self.range_proj = _mlp(3, key_channels, dropout) if guidance_mlp else nn.Identity()
        taps = (2 * radius + 1) ** 2
        self.fixup_proj = _mlp(taps + 3, taps, dropout) if variant == "featup" else None

    def kernel(self, guidance: Tensor) -> Tensor:
        """Return the filter ``[B, T, H, W]`` of each pixel of ``guidance [B, 3, H, W]``."""
        euclidean = self.similarity == "euclidean"
        range_ = self._range(guidance)
        kernel = range_weights(*range_, self.radius, self.implementation, euclidean)
        if self.fixup_proj is None:
            return kernel
        return kernel + 0.1 * self.fixup_proj(torch.cat([kernel, guidance], dim=1))

    def forward(self, low: Tensor, guidance: Tensor) -> Tensor:
        """Upsample ``low [B, C, h, w]`` to ``[B, C, H, W]`` under ``guidance [B, 3, H, W]``."""
        base: Base = "bilinear" if self.fixup_proj is None else "bicubic"
        if self.fixup_proj is None and self.similarity != "euclidean":
            return joint_bilateral(
                low, *self._range(guidance), self.radius, base, self.implementation
            )
        return apply_kernel(low, self.kernel(guidance), base, self.implementation)

    def _range(self, guidance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the projected guidance ``[B, K, H, W]``, temperature and sigma."""
        projected = self.range_proj(guidance)
        if self.similarity == "cosine":  # exp(-t (1 - cosine)) is exp(t cosine) but for a factor
            projected = F.normalize(projected, dim=1)
        return projected, self.range_temp.exp().clamp(1e-4, 1e4), self.sigma_spatial


class JointBilateralStack(nn.Module):
    """Upsample prime by prime, each level under the guidance averaged to the level's size.

    Args:
        channels: of the features.
        factor: any integer from 1; 14 makes a level of 2 and one of 7.
        variant: see the module.
        options: further ones of :class:`JointBilateralLevel`.

    Raises:
        ConfigError: a factor below 1.
    """

    def __init__(
        self, channels: int, factor: int, variant: Variant = "featup", **options: Any
    ) -> None:
        super().__init__()
        self.factors = prime_factors(factor)
        self.levels = nn.ModuleList(JointBilateralLevel(variant, **options) for _ in self.factors)
        featup = variant == "featup"
        self.fixup_proj = (
            nn.Sequential(nn.Dropout2d(0.2), _Pointwise(channels, channels)) if featup else None
        )

    def forward(self, low: Tensor, guidance: Tensor) -> Tensor:
        """Upsample ``low [B, C, h, w]`` to ``[B, C, h * factor, w * factor]``.

        ``guidance [B, 3, *, *]`` shows the same image in at least as many pixels as the output
        has cells; it is averaged over areas, hence without aliasing. Raises ConfigError where it
        is smaller, or where a level is smaller than its window.
        """
        sizes = list(self._sizes(low, guidance))
        if self.fixup_proj is None:
            return self._upsample(low, guidance, sizes)
        # The convolution mixes channels and the levels mix places: they commute, but for the bias.
        # On the small map it costs 1 / factor ** 2.
        dropout, (weight, bias) = self.fixup_proj[0], self.fixup_proj.parameters()
        mixed = low + 0.1 * _pointwise(dropout(low), weight)
        return self._upsample(mixed, guidance, sizes).add_(rearrange(0.1 * bias, "c -> c 1 1"))

    def _upsample(self, low: Tensor, guidance: Tensor, sizes: Sequence[Size]) -> Tensor:
        for level, size in zip(self.levels, sizes, strict=True):
            low = level(low, F.adaptive_avg_pool2d(guidance, size))
        return low

    def _sizes(self, low: Tensor, guidance: Tensor) -> Iterator[Size]:
        """Yield the size of each level's output, checked against the guidance."""
        height, width = low.shape[-2:]
        given_height, given_width = guidance.shape[-2:]
        for number, factor in enumerate(self.factors, 1):
            height, width = height * factor, width * factor
            if given_height < height or given_width < width:
                raise ConfigError(
                    f"joint-bilateral level {number} (times {factor}) needs guidance of at least "
                    f"{height}x{width} pixels, it has {given_height}x{given_width}; "
                    "enlarge the image or lower the factor"
                )
            yield height, width


def prime_factors(factor: int) -> tuple[int, ...]:
    """Return the primes of ``factor``, ascending: 14 is (2, 7), 1 is (); ConfigError below 1."""
    if factor < 1:
        raise ConfigError(f"joint-bilateral factor is {factor}; it must be at least 1")
    primes, prime = [], 2
    while factor > 1:
        while factor % prime == 0:
            primes.append(prime)
            factor //= prime
        prime += 1
    return tuple(primes)


def _mlp(channels: int, width: int, dropout: bool) -> nn.Sequential:
    """Return two 1x1 convolutions around a GELU, and FeatUp's dropout between them if asked for."""
    middle = [nn.GELU(), nn.Dropout2d(0.1)] if dropout else [nn.GELU()]
    return nn.Sequential(_Pointwise(channels, width), *middle, _Pointwise(width, width))


class _Pointwise(nn.Conv2d):
    """A 1x1 convolution that is one matrix product, channels last; much faster on a CPU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        return _pointwise(input, self.weight, self.bias)


def _pointwise(map_: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply each place of ``[B, C, h, w]`` with ``weight [D, C, 1, 1]``."""
    out = F.linear(rearrange(map_, "b c h w -> b h w c"), weight.flatten(1), bias)
    return rearrange(out, "b h w d -> b d h w")
