"""Triton kernels that fold interpolation and filter into one, and the transpose.

Per target pixel, ``T`` weights of interpolated pixels become those of the low-resolution cells
under them (:mod:`.triton_tiles`): a few per cent of the output in bytes. Where the weights are
those of a projected guidance, one kernel makes and folds them, and they are never written:
interpolation is the same for all pixels, so a block's weights ``[pixels, places]`` are multiplied
with the shares ``[places, cells]``. Any other kernel is folded a pixel a thread, which keeps all
weights of the pixel in registers, so every loop is unrolled: code and the time to compile it grow
with ``T``. Kernels are ``[B, T, H, W]``, folded kernels ``[B, cells, H, W]``, both contiguous. The
number of pixels is no part of what is compiled: another batch size compiles nothing anew.
"""

# ruff: noqa: N803, RUF005 - constants of a kernel are in capitals, as Triton writes them, and its
# tuples grow by addition only
# mypy: disallow-untyped-defs=False
# mypy: disable-error-code="import-untyped, import-not-found, assignment, misc"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_range import INTERPRETED, accumulator, block_weights, dot, reflect, run_blocks
from .triton_tiles import Folding, power_of_two

_ROW = 1024 if INTERPRETED else 128
"""Pixels of a program: one a thread. The interpreter likes few and large programs."""


_REGISTERS = {} if INTERPRETED else {"maxnreg": 128}
"""Two programs of 8 warps a multiprocessor; at 135 registers of a thread it would be one."""


def fold(kernel: Tensor, folding: Folding, dtype: torch.dtype) -> Tensor:
    """Return the weights ``[B, cells, H, W]`` of ``kernel [B, T, H, W]``."""
    folded = kernel.new_empty(len(kernel), folding.cells, *kernel.shape[2:], dtype=dtype)
    return _run(_fold_kernel, kernel, folded, folding, folded)


def fold_weights(
    projected: Tensor, temperature: Tensor, sigma: Tensor, folding: Folding, dtype: torch.dtype
) -> Tensor:
    """Return the weights ``[B, cells, H, W]`` of ``projected [B, H, W, K]``.

    They equal :func:`fold` of :func:`.triton_range.weights`, without the rounding of those.
    """
    batch, height, width, _ = projected.shape
    folded = projected.new_empty(batch, folding.cells, height, width, dtype=dtype)
    # A block of 4 pixels spans so many cells of its own; around them lies the window.
    rows, columns = (
        (factor + 2) // factor + window
        for factor, window in zip(folding.factor, folding.window, strict=True)
    )
    tensors = (projected, temperature, sigma, folded)
    run_blocks(
        _fold_weights_kernel, projected, folding.radius, 8, *tensors, **folding.constants,
        BICUBIC=folding.bicubic, COLUMNS=columns, CELLS=power_of_two(rows * columns, 16),
        **_REGISTERS,
    )  # fmt: skip
    return folded


def unfold(grad_folded: Tensor, folding: Folding, dtype: torch.dtype) -> Tensor:
    """Return the gradient ``[B, T, H, W]`` of the kernel: the transpose of :func:`fold`."""
    taps = (2 * folding.radius + 1) ** 2
    grad = grad_folded.new_empty(len(grad_folded), taps, *grad_folded.shape[2:], dtype=dtype)
    return _run(_unfold_kernel, grad_folded, grad, folding, grad_folded)


def _run(function: Any, given: Tensor, out: Tensor, folding: Folding, folded: Tensor) -> Tensor:
    """Launch over the pixels of ``given``; sums are of the type that ``folded`` needs."""
    batch, _, height, width = given.shape
    pixels = batch * height * width
    function[(triton.cdiv(pixels, _ROW),)](
        given, out, pixels, height, width, **folding.constants, RADIUS=folding.radius,
        BICUBIC=folding.bicubic, ROW=_ROW, SUM=accumulator(folded),
    )  # fmt: skip
    return out


@triton.jit
def _nodes(fine, length, FACTOR: tl.constexpr, BICUBIC: tl.constexpr, SUM: tl.constexpr):
    """Return which cells pixel ``fine`` of the interpolated map is made of, and their shares.

    Half-pixel centres, edges repeated; bicubic is cubic convolution with a = -0.75, as torch's.
    Positions are whole numbers of half pixels, so the shares are as exact on large maps.
    """
    position = 2 * fine + 1 - FACTOR  # from the first cell's centre, in 1 / (2 * FACTOR) of a cell
    before = (position + 2 * FACTOR) // (2 * FACTOR) - 1  # rounded down, also below 0
    past = (position - 2 * FACTOR * before).to(SUM) / (2 * FACTOR)  # in [0, 1)
    cells, shares = (), ()
    for node in tl.static_range(-1 if BICUBIC else 0, 3 if BICUBIC else 2):
        near = tl.abs(past - node)
        share = 1 - near
        if BICUBIC:
            inner = (1.25 * near - 2.25) * near * near + 1
            outer = ((-0.75 * near + 3.75) * near - 6) * near + 3
            share = tl.where(near <= 1, inner, outer)
        cells = cells + (tl.minimum(tl.maximum(before + node, 0), length - 1),)
        shares = shares + (share,)
    return cells, shares


@triton.jit
def _axis(position, length, RADIUS: tl.constexpr, FACTOR: tl.constexpr, WINDOW: tl.constexpr,
          BICUBIC: tl.constexpr, SUM: tl.constexpr):  # fmt: skip
    """Return the weights of one axis, tap by tap and in a tap cell by cell, one tensor each."""
    first = position // FACTOR - WINDOW // 2
    weights = ()
    for tap in tl.static_range(2 * RADIUS + 1):
        fine = reflect(position + tap - RADIUS, length)
        cells, shares = _nodes(fine, length // FACTOR, FACTOR, BICUBIC, SUM)
        for number in tl.static_range(WINDOW):
            weight = tl.where(cells[0] == first + number, shares[0], 0.0)
            for node in tl.static_range(1, 4 if BICUBIC else 2):
                weight += tl.where(cells[node] == first + number, shares[node], 0.0)
            weights = weights + (weight,)
    return weights


@triton.jit
def _shares(fine, cell, length, FACTOR: tl.constexpr, BICUBIC: tl.constexpr, SUM: tl.constexpr):
    """Return the shares ``[places, cells]`` of cells in places of the interpolated map."""
    cells, shares = _nodes(reflect(fine, length), length // FACTOR, FACTOR, BICUBIC, SUM)
    total = tl.where(cells[0][:, None] == cell[None, :], shares[0][:, None], 0.0)
    for node in tl.static_range(1, 4 if BICUBIC else 2):
        total += tl.where(cells[node][:, None] == cell[None, :], shares[node][:, None], 0.0)
    return total


@triton.jit
def _fold_weights_kernel(
    projected_ptr,  # [B, H, W, K]
    temperature_ptr,
    sigma_ptr,
    folded_ptr,  # [B, cells, H, W]
    height, width, keys,
    KEYS: tl.constexpr, PLACES: tl.constexpr, FACTOR_Y: tl.constexpr, FACTOR_X: tl.constexpr,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, BICUBIC: tl.constexpr, COLUMNS: tl.constexpr,
    CELLS: tl.constexpr, RADIUS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    weights, _, image, y, x, row, column = block_weights(
        projected_ptr, temperature_ptr, sigma_ptr, height, width, keys, KEYS, PLACES, RADIUS, SUM
    )
    number = tl.arange(0, CELLS)
    cell_y = tl.min(y) // FACTOR_Y - WINDOW_Y // 2 + number // COLUMNS
    cell_x = tl.min(x) // FACTOR_X - WINDOW_X // 2 + number % COLUMNS
    shares = _shares(row, cell_y, height, FACTOR_Y, BICUBIC, SUM)
    shares *= _shares(column, cell_x, width, FACTOR_X, BICUBIC, SUM)
    folded = dot(weights, shares, tl.zeros([weights.shape[0], CELLS], SUM))
    down = cell_y[None, :] - (y // FACTOR_Y - WINDOW_Y // 2)[:, None]
    right = cell_x[None, :] - (x // FACTOR_X - WINDOW_X // 2)[:, None]
    valid = (down >= 0) & (down < WINDOW_Y) & (right >= 0) & (right < WINDOW_X)
    valid &= ((y < height) & (x < width))[:, None]
    area = height * width
    entry = (down * WINDOW_X + right) * area + (y * width + x)[:, None]
    tl.store(folded_ptr + image * (WINDOW_Y * WINDOW_X) * area + entry, folded, valid)


@triton.jit
def _planes(pointer, pixel, valid, area, NUMBER: tl.constexpr, SUM: tl.constexpr):
    """Return NUMBER planes of a map ``[B, NUMBER, H, W]`` at the pixels, one tensor each."""
    planes = ()
    first = pointer + (pixel // area).to(tl.int64) * NUMBER * area + pixel % area
    for number in tl.static_range(NUMBER):
        planes = planes + (tl.load(first + tl.cast(number, tl.int64) * area, valid, 0).to(SUM),)
    return planes


@triton.jit(do_not_specialize=["num_pixels"])
def _fold_kernel(
    kernel_ptr,  # [B, T, H, W]
    folded_ptr,  # [B, cells, H, W]
    num_pixels, height, width,
    FACTOR_Y: tl.constexpr, FACTOR_X: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr,
    RADIUS: tl.constexpr, BICUBIC: tl.constexpr, ROW: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    side: tl.constexpr = 2 * RADIUS + 1
    pixel = tl.program_id(0) * ROW + tl.arange(0, ROW)
    area, valid = height * width, pixel < num_pixels
    y, x = pixel // width % height, pixel % width
    taps = _planes(kernel_ptr, pixel, valid, area, side * side, SUM)
    down = _axis(y, height, RADIUS, FACTOR_Y, WINDOW_Y, BICUBIC, SUM)
    across = _axis(x, width, RADIUS, FACTOR_X, WINDOW_X, BICUBIC, SUM)
    first = folded_ptr + (pixel // area).to(tl.int64) * (WINDOW_Y * WINDOW_X) * area + pixel % area
    for row in tl.static_range(WINDOW_Y):
        partial = ()  # [side]
        for j in tl.static_range(side):
            total = taps[j] * down[row]
            for i in tl.static_range(1, side):
                total += taps[i * side + j] * down[i * WINDOW_Y + row]
            partial = partial + (total,)
        for column in tl.static_range(WINDOW_X):
            total = partial[0] * across[column]
            for j in tl.static_range(1, side):
                total += partial[j] * across[j * WINDOW_X + column]
            tl.store(first + tl.cast(row * WINDOW_X + column, tl.int64) * area, total, valid)


@triton.jit(do_not_specialize=["num_pixels"])
def _unfold_kernel(
    grad_folded_ptr,  # [B, cells, H, W]
    grad_ptr,  # [B, T, H, W]
    num_pixels, height, width,
    FACTOR_Y: tl.constexpr, FACTOR_X: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr,
    RADIUS: tl.constexpr, BICUBIC: tl.constexpr, ROW: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    side: tl.constexpr = 2 * RADIUS + 1
    pixel = tl.program_id(0) * ROW + tl.arange(0, ROW)
    area, valid = height * width, pixel < num_pixels
    y, x = pixel // width % height, pixel % width
    cells = _planes(grad_folded_ptr, pixel, valid, area, WINDOW_Y * WINDOW_X, SUM)
    down = _axis(y, height, RADIUS, FACTOR_Y, WINDOW_Y, BICUBIC, SUM)
    across = _axis(x, width, RADIUS, FACTOR_X, WINDOW_X, BICUBIC, SUM)
    first = grad_ptr + (pixel // area).to(tl.int64) * (side * side) * area + pixel % area
    for j in tl.static_range(side):
        partial = ()  # [rows]
        for row in tl.static_range(WINDOW_Y):
            total = cells[row * WINDOW_X] * across[j * WINDOW_X]
            for column in tl.static_range(1, WINDOW_X):
                total += cells[row * WINDOW_X + column] * across[j * WINDOW_X + column]
            partial = partial + (total,)
        for i in tl.static_range(side):
            total = partial[0] * down[i * WINDOW_Y]
            for row in tl.static_range(1, WINDOW_Y):
                total += partial[row] * down[i * WINDOW_Y + row]
            tl.store(first + tl.cast(i * side + j, tl.int64) * area, total, valid)
