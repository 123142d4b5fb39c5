"""The joint-bilateral layer on GPUs: autograd functions over Triton kernels.

They compute what :mod:`.reference` writes out, for any size that :mod:`.dispatch` lets through.
Sums are 32 bits wide whatever the types of the tensors, with autocast as without. Nothing
synchronises, and nothing adds atomically: the same input gives the same bits, backward too. What
the backward pass needs beyond the inputs is computed again. Not differentiable twice.

``TRITON_INTERPRET=1``, set before Python starts, runs the kernels on a CPU, slowly: for tests.
"""

import importlib.util
import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from radio_distill.errors import ConfigError

from .triton_tiles import Folding


def is_available(device: torch.device) -> bool:
    """Return whether the kernels run on ``device``: NVIDIA from Ampere on, or the interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    if _interpreted():
        return True
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def range_weights(projected: Tensor, temperature: Tensor, sigma: Tensor, radius: int = 3) -> Tensor:
    """Return the bilateral weights ``[B, T, H, W]`` of ``projected [B, K, H, W]``.

    ``temperature`` and ``sigma`` are one number each, in tensors on the same device.
    """
    return _RangeWeights.apply(projected, temperature, sigma, radius)


def apply_kernel(low: Tensor, kernel: Tensor, base: str = "bilinear") -> Tensor:
    """Upsample ``low [B, C, h, w]`` to the size of ``kernel [B, T, H, W]`` and filter it.

    Returns:
        ``[B, C, H, W]``, channels last, in the type of ``low``.
    """
    return _ApplyKernel.apply(low, kernel, base)


class _RangeWeights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, temperature: Tensor, sigma: Tensor, radius: int
    ) -> Tensor:
        from . import triton_range

        _check_size((2 * radius + 1) ** 2, projected)
        with torch.cuda.device_of(projected):
            weights = triton_range.weights(_rows(projected), temperature, sigma, radius)
        ctx.save_for_backward(projected, temperature, sigma, weights)
        ctx.radius = radius
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from . import triton_range

        projected, temperature, sigma, weights = ctx.saved_tensors
        with torch.cuda.device_of(grad):
            grad_logits, distances = triton_range.grad_logits(
                weights, grad.contiguous(), ctx.radius
            )
            grad_projected, products = triton_range.grad_projected(
                _rows(projected), grad_logits, temperature, ctx.radius
            )
        grad_sigma = distances / sigma**3  # of -distance ** 2 / (2 sigma ** 2)
        return (
            _columns(grad_projected),
            products.to(temperature.dtype).view_as(temperature),
            grad_sigma.to(sigma.dtype).view_as(sigma),
            None,
        )


class _ApplyKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, low: Tensor, kernel: Tensor, base: str) -> Tensor:
        from . import triton_apply, triton_fold

        folding = _folding(low, kernel, base)
        with torch.cuda.device_of(low):
            folded = triton_fold.fold(kernel.contiguous(), folding, low.dtype)
            out = triton_apply.multiply(_rows(low), folded, folding)
        ctx.save_for_backward(low, kernel)
        ctx.folding = folding
        return _columns(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from . import triton_apply, triton_fold

        low, kernel = ctx.saved_tensors
        folding, grad = ctx.folding, _rows(grad)
        grad_low = grad_kernel = None
        with torch.cuda.device_of(grad):
            if ctx.needs_input_grad[0]:
                folded = triton_fold.fold(kernel.contiguous(), folding, low.dtype)
                grad_low = _columns(triton_apply.grad_low(folded, grad, folding))
            if ctx.needs_input_grad[1]:
                grad_folded = triton_apply.grad_folded(_rows(low), grad, folding)
                grad_kernel = triton_fold.unfold(grad_folded, folding, kernel.dtype)
        return grad_low, grad_kernel, None


def _folding(low: Tensor, kernel: Tensor, base: str) -> Folding:
    (height, width), (fine_height, fine_width) = low.shape[-2:], kernel.shape[-2:]
    assert fine_height % height == 0, "checked by the dispatch"
    assert fine_width % width == 0, "checked by the dispatch"
    radius = (round(kernel.shape[1] ** 0.5) - 1) // 2
    folding = Folding((fine_height // height, fine_width // width), radius, base == "bicubic")
    _check_size(math.prod(folding.window), kernel)
    return folding


def _check_size(planes: int, map_: Tensor) -> None:
    """Raise where the weights of one image cannot be counted in 32 bits, as the kernels do."""
    height, width = map_.shape[-2:]
    if max(planes, map_.shape[1]) * height * width >= 2**31:
        raise ConfigError(
            f"joint-bilateral target {height}x{width} is too large for implementation 'triton'; "
            "use 'folded'"
        )


def _interpreted() -> bool:
    from .triton_range import INTERPRETED

    return bool(INTERPRETED)


def _rows(map_: Tensor) -> Tensor:
    """Return ``[B, h, w, C]``, without a copy where the map is channels last."""
    return rearrange(map_, "b c h w -> b h w c").contiguous()


def _columns(map_: Tensor) -> Tensor:
    return rearrange(map_, "b h w c -> b c h w")
