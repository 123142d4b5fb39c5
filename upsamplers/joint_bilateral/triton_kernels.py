"""The joint-bilateral layer on GPUs: autograd functions over Triton kernels.

They compute what :mod:`.reference` writes out, for any size that :mod:`.dispatch` lets through.
Sums are 32 bits wide whatever the types of the tensors, with autocast as without. Nothing
synchronises, and nothing adds atomically: the same input gives the same bits, backward too. What
the backward pass needs beyond the inputs is computed again. Not differentiable twice.

``TRITON_INTERPRET=1``, set before Python starts, runs the kernels on a CPU, slowly: for tests.
"""

import importlib.util
from collections.abc import Sequence
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


def joint_bilateral(
    low: Tensor, projected: Tensor, temperature: Tensor, sigma: Tensor, radius: int, base: str
) -> Tensor:
    """Do both at once: the weights ``[B, T, H, W]`` are never written.

    Returns:
        ``[B, C, H, W]``, channels last, in the type of ``low``.
    """
    return _JointBilateral.apply(low, projected, temperature, sigma, radius, base)


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
        projected, temperature, sigma, weights = ctx.saved_tensors
        with torch.cuda.device_of(grad):
            return *_grad_of_weights(projected, temperature, sigma, weights, grad, ctx.radius), None


class _ApplyKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, low: Tensor, kernel: Tensor, base: str) -> Tensor:
        from . import triton_apply, triton_fold

        radius = (round(kernel.shape[1] ** 0.5) - 1) // 2
        folding = _folding(low, kernel, radius, base)
        with torch.cuda.device_of(low):
            folded = triton_fold.fold(kernel.contiguous(), folding, low.dtype)
            out = triton_apply.multiply(_rows(low), folded, folding)
        ctx.save_for_backward(low, kernel)
        ctx.folding = folding
        return _columns(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, kernel = ctx.saved_tensors
        with torch.cuda.device_of(grad):
            return *_grad_of_filter(low, kernel, ctx.folding, grad, ctx.needs_input_grad), None


class _JointBilateral(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        low: Tensor,
        projected: Tensor,
        temperature: Tensor,
        sigma: Tensor,
        radius: int,
        base: str,
    ) -> Tensor:
        from . import triton_apply, triton_fold

        folding = _folding(low, projected, radius, base)
        with torch.cuda.device_of(low):
            folded = triton_fold.fold_weights(
                _rows(projected), temperature, sigma, folding, low.dtype
            )
            out = triton_apply.multiply(_rows(low), folded, folding)
        ctx.save_for_backward(low, projected, temperature, sigma)
        ctx.folding = folding
        return _columns(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from . import triton_range

        low, *guidance = ctx.saved_tensors
        projected, temperature, sigma = guidance
        folding, of_guidance = ctx.folding, any(ctx.needs_input_grad[1:4])
        with torch.cuda.device_of(grad):
            weights = triton_range.weights(_rows(projected), temperature, sigma, folding.radius)
            needed = ctx.needs_input_grad[0], of_guidance
            grad_low, grad_weights = _grad_of_filter(low, weights, folding, grad, needed)
            if grad_weights is None:
                return grad_low, *(None,) * 5
            grads = _grad_of_weights(
                projected, temperature, sigma, weights, grad_weights, folding.radius
            )
        return grad_low, *grads, None, None


def _grad_of_weights(
    projected: Tensor,
    temperature: Tensor,
    sigma: Tensor,
    weights: Tensor,
    grad: Tensor,
    radius: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of guidance, temperature and sigma from ``grad [B, T, H, W]``."""
    from . import triton_range

    grad_logits, distances = triton_range.grad_logits(weights, grad.contiguous(), radius)
    grad_projected, products = triton_range.grad_projected(
        _rows(projected), grad_logits, temperature, radius
    )
    grad_sigma = distances / sigma**3  # of -distance ** 2 / (2 sigma ** 2)
    return (
        _columns(grad_projected),
        products.to(temperature.dtype).view_as(temperature),
        grad_sigma.to(sigma.dtype).view_as(sigma),
    )


def _grad_of_filter(
    low: Tensor, kernel: Tensor, folding: Folding, grad: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of map and kernel, where needed, from ``grad [B, C, H, W]``."""
    from . import triton_apply, triton_fold

    grad = _rows(grad)
    grad_low = grad_kernel = None
    if needed[0]:
        folded = triton_fold.fold(kernel.contiguous(), folding, low.dtype)
        grad_low = _columns(triton_apply.grad_low(folded, grad, folding))
    if needed[1]:
        grad_folded = triton_apply.grad_folded(_rows(low), grad, folding)
        grad_kernel = triton_fold.unfold(grad_folded, folding, kernel.dtype)
    return grad_low, grad_kernel


def _folding(low: Tensor, fine: Tensor, radius: int, base: str) -> Folding:
    """Return how a map of the size of ``fine`` is made of ``low``."""
    (height, width), (fine_height, fine_width) = low.shape[-2:], fine.shape[-2:]
    assert fine_height % height == 0, "checked by the dispatch"
    assert fine_width % width == 0, "checked by the dispatch"
    folding = Folding((fine_height // height, fine_width // width), radius, base == "bicubic")
    _check_size(max(folding.cells, (2 * radius + 1) ** 2), fine)
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
