"""The joint-bilateral layer as its formula, with ``F.unfold``: what the other forms must equal.

For tests: slow, and it writes ``(2 radius + 1) ** 2`` copies of the output.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor


def range_weights(projected: Tensor, temperature: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Return the bilateral weights ``[B, T, H, W]`` of ``projected [B, K, H, W]``."""
    keys = projected.float() if projected.dtype.itemsize < 4 else projected
    logits = einsum(keys, _windows(keys, radius), "b k h w, b k t h w -> b t h w")
    offset = torch.linspace(-1, 1, 2 * radius + 1, dtype=keys.dtype, device=keys.device)
    distance = (offset[:, None].square() + offset.square()).flatten()  # [T]
    spatial = rearrange(-distance / (2 * sigma.square()), "t -> t 1 1")
    return (temperature * logits + spatial).softmax(dim=1).to(projected.dtype)


def apply_kernel(low: Tensor, kernel: Tensor, base: str) -> Tensor:
    """Interpolate ``low [B, C, h, w]`` to the size of ``kernel [B, T, H, W]`` and correlate."""
    wide = low.float() if low.dtype.itemsize < 4 else low
    fine = F.interpolate(wide, kernel.shape[-2:], mode=base, align_corners=False)
    radius = (round(kernel.shape[1] ** 0.5) - 1) // 2
    windows = _windows(fine, radius)  # [B, C, T, H, W]
    out = einsum(windows, kernel.to(wide.dtype), "b c t h w, b t h w -> b c h w")
    if low.dtype == torch.float16:
        limit = torch.finfo(torch.float16)
        out = out.clamp(limit.min, limit.max)
    return out.to(low.dtype)


def joint_bilateral(
    low: Tensor, projected: Tensor, temperature: Tensor, sigma: Tensor, radius: int, base: str
) -> Tensor:
    """Upsample ``low [B, C, h, w]`` under the weights of ``projected [B, K, H, W]``."""
    return apply_kernel(low, range_weights(projected, temperature, sigma, radius), base)


def _windows(map_: Tensor, radius: int) -> Tensor:
    """Return the neighbourhoods ``[B, C, T, H, W]``, borders reflected."""
    height, width = map_.shape[-2:]
    patches = F.unfold(F.pad(map_, (radius,) * 4, mode="reflect"), 2 * radius + 1)
    return rearrange(patches, "b (c t) (h w) -> b c t h w", c=map_.shape[1], h=height, w=width)
