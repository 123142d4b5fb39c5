"""The functions of the joint-bilateral layer, and the one rule that chooses who computes them.

``reference`` writes out the formula and is for tests; ``folded`` is torch only; ``triton`` is for
GPUs; ``auto`` takes Triton for CUDA tensors of at most 32 bits where Triton works, else the folded
form.
"""

from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from radio_distill.errors import ConfigError
from radio_distill.types import format_size

from . import folded, reference

Base = Literal["bilinear", "bicubic"]
Implementation = Literal["auto", "reference", "folded", "triton"]
_TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_SMALLEST_SIGMA = 1e-3


def range_weights(
    projected: Tensor,
    temperature: Tensor | float,
    sigma: Tensor | float,
    radius: int = 3,
    implementation: str = "auto",
    euclidean: bool = False,
) -> Tensor:
    """Weigh each pixel's neighbours by likeness and distance.

    ``softmax(temperature * <centre, neighbour> - distance ** 2 / (2 sigma ** 2))`` over the
    ``T = (2 radius + 1) ** 2`` neighbours in row-major order, offsets on ``linspace(-1, 1)``,
    borders reflected (FeatUp, arXiv 2403.10516, equations 5-7; the product of its two normalised
    kernels, normalised once). The softmax is computed in 32 bits at least.

    Args:
        projected: ``[B, K, H, W]`` guidance features.
        temperature: scalar factor of the likeness.
        sigma: scalar width of the Gaussian; its sign has no meaning, and 0 stands for very narrow.
        euclidean: put ``-|centre - neighbour| ** 2`` in the place of the product. There is no
            kernel for it: the folded form does it on every device.

    Returns:
        ``[B, T, H, W]`` in the type of ``projected``.

    Raises:
        ConfigError: a map smaller than the window, or an implementation that cannot do it.
    """
    _check_window(projected, radius)
    scalars = _scalars(projected, temperature, sigma)
    if euclidean:
        return folded.range_weights(projected, *scalars, radius, euclidean)
    weights: Tensor = _choose(implementation, projected).range_weights(projected, *scalars, radius)
    return weights


def joint_bilateral(
    low: Tensor,
    projected: Tensor,
    temperature: Tensor | float,
    sigma: Tensor | float,
    radius: int = 3,
    base: Base = "bilinear",
    implementation: str = "auto",
) -> Tensor:
    """Upsample ``low [B, C, h, w]`` under the weights of ``projected [B, K, H, W]``.

    ``apply_kernel(low, range_weights(projected, temperature, sigma, radius), base)``, whose
    arguments and errors it has; Triton makes and folds the weights in one kernel.
    """
    _check_window(projected, radius)
    chosen = _choose(implementation, low)
    _check_filter(low, projected, base, exact=chosen is not reference)
    scalars = _scalars(projected, temperature, sigma)
    return chosen.joint_bilateral(low, projected, *scalars, radius, base)


def apply_kernel(
    low: Tensor, kernel: Tensor, base: Base = "bilinear", implementation: str = "auto"
) -> Tensor:
    """Upsample by interpolation, then filter each target pixel with its own kernel.

    ``correlate(reflect_pad(interpolate(low, (H, W), base)), kernel)``: the kernel is shared by all
    channels and need not sum to one. 16-bit maps are summed in 32 bits; what leaves fp16's range
    saturates.

    Args:
        low: ``[B, C, h, w]``.
        kernel: ``[B, T, H, W]``; H and W are multiples of h and w (any size under ``reference``).

    Returns:
        ``[B, C, H, W]`` in the type of ``low``.

    Raises:
        ConfigError: sizes that do not divide, a target smaller than the window, or an
            implementation that cannot do it.
    """
    radius = _radius(kernel)
    _check_window(kernel, radius)
    chosen = _choose(implementation, low)
    _check_filter(low, kernel, base, exact=chosen is not reference)
    return chosen.apply_kernel(low, kernel, base)


def _choose(implementation: str, tensor: Tensor) -> ModuleType:
    """Return the module that computes: the one choice rule."""
    if implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ConfigError(f"implementation {implementation!r} is not known; use one of {known}")
    if implementation == "reference":
        return reference
    wanted = tensor.is_cuda and tensor.dtype in _TRITON_TYPES
    if implementation == "folded" or (implementation == "auto" and not wanted):
        return folded
    from . import triton_kernels

    if triton_kernels.is_available(tensor.device):
        return triton_kernels
    if implementation == "auto":
        return folded
    raise ConfigError(
        f"Triton does not run on {tensor.device} here; use implementation 'folded' or 'auto'"
    )


def _scalars(
    projected: Tensor, temperature: Tensor | float, sigma: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return temperature and sigma as tensors of 32 bits at least; sigma is positive."""
    wide = torch.promote_types(projected.dtype, torch.float32)
    temperature = torch.as_tensor(temperature, dtype=wide, device=projected.device)
    sigma = torch.as_tensor(sigma, dtype=wide, device=projected.device)
    return temperature, sigma.abs().clamp_min(_SMALLEST_SIGMA)


def _check_filter(low: Tensor, fine: Tensor, base: str, exact: bool) -> None:
    """Raise for a base that is not known; where ``exact``, for sizes that do not divide."""
    if base not in ("bilinear", "bicubic"):
        raise ConfigError(f"joint-bilateral base {base!r} is not known; use bilinear or bicubic")
    sizes = zip(low.shape[-2:], fine.shape[-2:], strict=True)
    if exact and any(fine_length % coarse for coarse, fine_length in sizes):
        target, coarse_size = format_size(fine.shape[-2:]), format_size(low.shape[-2:])
        raise ConfigError(
            f"joint-bilateral target {target} is no multiple of the map's {coarse_size}; "
            "choose a target that is, or implementation 'reference'"
        )


def _radius(kernel: Tensor) -> int:
    taps = kernel.shape[1]
    radius = (round(taps**0.5) - 1) // 2
    if radius < 1 or (2 * radius + 1) ** 2 != taps:
        raise ConfigError(f"a kernel of {taps} taps is no odd square; use 9, 25, 49, ...")
    return radius


def _check_window(tensor: Tensor, radius: int) -> None:
    """Raise where reflected borders would need pixels that are not there."""
    if radius < 1:
        raise ConfigError(f"joint-bilateral radius is {radius}; it must be at least 1")
    if min(tensor.shape[-2:]) <= radius:
        raise ConfigError(
            f"joint-bilateral target {format_size(tensor.shape[-2:])} is smaller than the window: "
            f"radius {radius} needs {radius + 1} pixels a side; use larger images or a smaller "
            "radius"
        )
