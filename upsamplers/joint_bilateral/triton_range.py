"""Triton kernels of the bilateral weights, forward and backward.

A program takes a block of 4 x 4 pixels and multiplies them with all pixels around it, on tensor
cores; the products that belong to no pair of neighbours, over half, are dropped. Windows are never
written. Maps are ``[B, H, W, K]`` and weights ``[B, T, H, W]``, contiguous; sums are 32 bits wide,
64 for doubles.

The backward pass adds nothing atomically, so two runs give the same bits. With ``g[q, p]`` the
gradient of the product that pixel q makes with its neighbour p, the gradient of q itself is
``temperature * sum_p (g[q, p] + g[p, q]) * projected[p]``. Reflected borders let q meet p at
several of its taps, but never a p outside of its window.
"""

# ruff: noqa: N803 - constants of a kernel are in capitals, as Triton writes them
# mypy: disallow-untyped-defs=False, disable-error-code="import-untyped, import-not-found"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_tiles import power_of_two

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_ROW = 1024 if INTERPRETED else 32
"""Pixels of a program that looks at nothing beside them; the interpreter likes few programs."""
_SIDE = tl.constexpr(4)
"""Pixels a side of a block: 16, the least that a matrix instruction takes."""


def weights(projected: Tensor, temperature: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Return the weights ``[B, T, H, W]`` of ``projected [B, H, W, K]``."""
    batch, height, width, _ = projected.shape
    out = projected.new_empty(batch, (2 * radius + 1) ** 2, height, width)
    run_blocks(_weights_kernel, projected, radius, 2, projected, temperature, sigma, out)
    return out


def grad_logits(weights: Tensor, grad: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Return the gradients ``[B, T, H, W]`` before the softmax, and their sum times distance^2."""
    batch, taps, height, width = weights.shape
    out = torch.empty_like(weights, dtype=torch.promote_types(weights.dtype, torch.float32))
    pixels = batch * height * width
    programs = triton.cdiv(pixels, _ROW)
    distances = out.new_empty(programs)
    _grad_logits_kernel[(programs,)](
        weights, grad, out, distances, pixels, height * width,
        TAPS=power_of_two(taps), RADIUS=radius, ROW=_ROW, SUM=accumulator(weights),
    )  # fmt: skip
    return out, distances.sum()


def grad_projected(
    projected: Tensor, grad_logits: Tensor, temperature: Tensor, radius: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``projected [B, H, W, K]`` and of the temperature."""
    out, products = torch.empty_like(projected), grad_logits.new_empty(_blocks(projected))
    tensors = (projected, grad_logits, temperature, out, products)
    run_blocks(_grad_projected_kernel, projected, radius, 4, *tensors)
    return out, products.sum()


def run_blocks(
    function: Any, map_: Tensor, radius: int, warps: int, *tensors: Tensor, **own: Any
) -> None:
    """Launch over the blocks of ``map_ [B, H, W, K]``; surroundings are padded to powers of two."""
    _, height, width, keys = map_.shape
    constants = {"KEYS": power_of_two(keys, 16), "PLACES": power_of_two((4 + 2 * radius) ** 2, 16)}
    function[(_blocks(map_),)](
        *tensors, height, width, keys, **constants, **own, RADIUS=radius, SUM=accumulator(map_),
        num_warps=warps,
    )  # fmt: skip


def accumulator(tensor: Tensor) -> tl.dtype:
    """Return the type of a sum over values of ``tensor``."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def _blocks(map_: Tensor) -> int:
    return map_.shape[0] * triton.cdiv(map_.shape[1], 4) * triton.cdiv(map_.shape[2], 4)


@triton.jit
def dot(left, right, total):
    """Return ``left @ right + total``; 32-bit operands go over tensor cores in three parts."""
    if INTERPRETED:  # it would multiply the bit patterns of bfloat16
        left, right = left.to(total.dtype), right.to(total.dtype)
    return tl.dot(left, right, total, input_precision="tf32x3", out_dtype=total.dtype)


@triton.jit
def reflect(index, length):
    """Mirror an index at the first and at the last pixel, neither repeated."""
    return length - 1 - tl.abs(length - 1 - tl.abs(index))


@triton.jit
def _block(height, width, PLACES: tl.constexpr, RADIUS: tl.constexpr):
    """Return a block's image, rows and columns of its pixels, and those of its surroundings.

    With the surroundings comes how many there are; the padded rest is to be ignored.
    """
    across, down = tl.cdiv(width, _SIDE), tl.cdiv(height, _SIDE)
    first_x = tl.program_id(0) % across * _SIDE
    first_y = tl.program_id(0) // across % down * _SIDE
    image = (tl.program_id(0) // (across * down)).to(tl.int64)
    pixel, place = tl.arange(0, _SIDE * _SIDE), tl.arange(0, PLACES)
    reach: tl.constexpr = _SIDE + 2 * RADIUS
    row, column = first_y - RADIUS + place // reach, first_x - RADIUS + place % reach
    return image, first_y + pixel // _SIDE, first_x + pixel % _SIDE, row, column, place < reach**2


@triton.jit
def block_weights(
    projected_ptr, temperature_ptr, sigma_ptr, height, width, keys,
    KEYS: tl.constexpr, PLACES: tl.constexpr, RADIUS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Return the weights ``[pixels, places]`` of a block, zero where no pixel sees a place.

    With them come what :func:`_block` returns of pixels and places, and which of them meet.
    """
    image, y, x, row, column, real = _block(height, width, PLACES, RADIUS)
    inside, key = (y < height) & (x < width), tl.arange(0, KEYS)[None, :]
    entry = ((image * height + y) * width + x)[:, None] * keys + key
    centre = tl.load(projected_ptr + entry, inside[:, None] & (key < keys), 0)
    reached = real & (row < height + RADIUS) & (column < width + RADIUS)
    there = (image * height + reflect(row, height)) * width + reflect(column, width)
    entry = there[:, None] * keys + key
    around = tl.load(projected_ptr + entry, reached[:, None] & (key < keys), 0)
    products = dot(centre, tl.trans(around), tl.zeros([_SIDE * _SIDE, PLACES], SUM))

    down = tl.where(real, row, -height - PLACES)[None, :].to(SUM) - y[:, None].to(SUM)
    right = column[None, :].to(SUM) - x[:, None].to(SUM)
    neighbours = tl.maximum(tl.abs(down), tl.abs(right)) <= RADIUS
    temperature, sigma = tl.load(temperature_ptr).to(SUM), tl.load(sigma_ptr).to(SUM)
    narrowness = -1 / (2 * sigma * sigma * RADIUS * RADIUS)  # offsets are on linspace(-1, 1)
    logits = temperature * products + (down * down + right * right) * narrowness
    logits = tl.where(neighbours, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    weights = weights * (1 / tl.sum(weights, axis=1))[:, None]
    return weights, neighbours & inside[:, None], image, y, x, row, column


@triton.jit
def _weights_kernel(
    projected_ptr,  # [B, H, W, K]
    temperature_ptr,
    sigma_ptr,
    weights_ptr,  # [B, T, H, W]
    height, width, keys,
    KEYS: tl.constexpr, PLACES: tl.constexpr, RADIUS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    side: tl.constexpr = 2 * RADIUS + 1
    weights, met, image, y, x, row, column = block_weights(
        projected_ptr, temperature_ptr, sigma_ptr, height, width, keys, KEYS, PLACES, RADIUS, SUM
    )
    area = height * width
    entry = (y * width + x + (side + 1) * RADIUS * area - (y * side + x) * area)[:, None]
    entry += ((row * side + column) * area)[None, :]  # tap * area + pixel
    weights_ptr += image * (side * side) * area
    tl.store(weights_ptr + entry, weights, met)


@triton.jit(do_not_specialize=["num_pixels"])
def _grad_logits_kernel(
    weights_ptr,  # [B, T, H, W]
    grad_ptr,  # [B, T, H, W]
    grad_logits_ptr,  # [B, T, H, W]
    distances_ptr,  # [programs]
    num_pixels, area,
    TAPS: tl.constexpr, RADIUS: tl.constexpr, ROW: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    side: tl.constexpr = 2 * RADIUS + 1
    pixel, tap = tl.program_id(0) * ROW + tl.arange(0, ROW), tl.arange(0, TAPS)
    entry = ((pixel // area).to(tl.int64) * (side * side) * area + pixel % area)[:, None]
    entry += (tap * area)[None, :]
    valid = (pixel < num_pixels)[:, None] & (tap < side * side)[None, :]
    weights = tl.load(weights_ptr + entry, valid, 0).to(SUM)
    grad = tl.load(grad_ptr + entry, valid, 0).to(SUM)
    # 16-bit weights do not quite sum to one; without the division all logits would lean one way.
    total = tl.where(pixel < num_pixels, tl.sum(weights, axis=1), 1.0)
    grad = weights * (grad - (tl.sum(weights * grad, axis=1) / total)[:, None])
    tl.store(grad_logits_ptr + entry, grad, valid)
    row, column = tap // side - RADIUS, tap % side - RADIUS
    distance = (row * row + column * column).to(SUM) / (RADIUS * RADIUS)
    distances = tl.sum(tl.sum(grad * distance[None, :], axis=1), axis=0)
    tl.store(distances_ptr + tl.program_id(0), distances)


@triton.jit
def _image_of(index, length, number):
    """Return an index itself (number 0), or what reflects to it before (1), behind (2) the map."""
    before = tl.where(index > 0, -index, -length)
    behind = tl.where(index < length - 1, 2 * (length - 1) - index, -length)
    return tl.where(number == 0, index, tl.where(number == 1, before, behind))


@triton.jit
def _found(grad_logits_ptr, y, x, place_y, place_x, height, width, valid, RADIUS: tl.constexpr):
    """Return the gradient of what the pixels at y, x find at the places; 0 beyond the window."""
    side: tl.constexpr = 2 * RADIUS + 1
    down, right = place_y - y + RADIUS, place_x - x + RADIUS
    valid = valid & (down >= 0) & (down < side) & (right >= 0) & (right < side)
    entry = (down * side + right) * (height * width) + y * width + x
    return tl.load(grad_logits_ptr + entry, valid, 0)


@triton.jit
def _grad_projected_kernel(
    projected_ptr,  # [B, H, W, K]
    grad_logits_ptr,  # [B, T, H, W]
    temperature_ptr,
    grad_ptr,  # [B, H, W, K]
    products_ptr,  # [programs]
    height, width, keys,
    KEYS: tl.constexpr, PLACES: tl.constexpr, RADIUS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    side: tl.constexpr = 2 * RADIUS + 1
    image, y, x, row, column, real = _block(height, width, PLACES, RADIUS)
    inside, key = (y < height) & (x < width), tl.arange(0, KEYS)[None, :]
    within = real & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    valid = inside[:, None] & within[None, :]
    mirrored_y = (tl.min(y) <= RADIUS) | (tl.max(y) + RADIUS >= height - 1)
    mirrored_x = (tl.min(x) <= RADIUS) | (tl.max(x) + RADIUS >= width - 1)
    y, x, row, column = y[:, None], x[:, None], row[None, :], column[None, :]
    grad_logits_ptr += image * (side * side) * (height * width)
    both = tl.zeros([_SIDE * _SIDE, PLACES], SUM)
    for number in range(9):
        vertical, horizontal = number // 3, number % 3
        if ((vertical == 0) | mirrored_y) & ((horizontal == 0) | mirrored_x):
            up, left = _image_of(row, height, vertical), _image_of(column, width, horizontal)
            both += _found(grad_logits_ptr, y, x, up, left, height, width, valid, RADIUS)
            up, left = _image_of(y, height, vertical), _image_of(x, width, horizontal)
            both += _found(grad_logits_ptr, row, column, up, left, height, width, valid, RADIUS)
    entry = tl.trans((image * height + row) * width + column) * keys + key
    around = tl.load(projected_ptr + entry, within[:, None] & (key < keys), 0).to(SUM)
    grad = dot(both, around, tl.zeros([_SIDE * _SIDE, KEYS], SUM))
    entry = ((image * height + y) * width + x) * keys + key
    centre = tl.load(projected_ptr + entry, inside[:, None] & (key < keys), 0).to(SUM)
    # The logits are of degree two in the map, so this sum (Euler) counts the gradient twice.
    products = tl.sum(tl.sum(centre * grad, axis=1), axis=0) / 2
    tl.store(products_ptr + tl.program_id(0), products)
    grad = grad * tl.load(temperature_ptr).to(SUM)
    tl.store(grad_ptr + entry, grad, inside[:, None] & (key < keys))
