"""The filter gradient that the published CUDA kernels of FeatUp and FeatSharp compute.

They index the tap of a filter's gradient by ``blockIdx.z * blockIdx.z``, so for 7x7 filters only
taps 0, 1, 4, 9, 16, 25 and 36 get any; the other 42, the centre among them, get exactly 0. Here to
compare fits with the right and with the published backward; nothing else should use it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from upsamplers.joint_bilateral import layer


def published_gradient(kernel: Tensor) -> Tensor:
    """Return ``kernel [B, T, H, W]``, of which only taps 0, 1, 4, 9, ... pass on a gradient."""
    taps = kernel.shape[1]
    squares = [tap for tap in range(taps) if round(tap**0.5) ** 2 == tap]
    mask = torch.zeros(1, taps, 1, 1, dtype=torch.bool, device=kernel.device)
    mask[:, squares] = True
    return torch.where(mask, kernel, kernel.detach())


@contextmanager
def published_filter_gradient() -> Iterator[None]:
    """Let every joint-bilateral level that is called in this context learn as the published do."""
    right = layer.apply_kernel

    def wrong(low: Tensor, kernel: Tensor, *arguments: Any) -> Tensor:
        return right(low, published_gradient(kernel), *arguments)

    with patch.object(layer, "apply_kernel", wrong):
        yield
