"""Triton kernels that multiply folded kernels and features, forward and backward.

With the weights of :mod:`.triton_fold`, a program multiplies ``[target pixels, cells]`` by
``[cells, channels]`` on tensor cores (:mod:`.triton_tiles`); neither an interpolated map nor
windows are ever written. Low-resolution maps are ``[B, h, w, C]``, target maps ``[B, H, W, C]``,
folded kernels ``[B, cells, H, W]``, all contiguous.

No kernel adds atomically, so two runs give the same bits; :mod:`.triton_tiles` has their launches.
A value of the map that is not finite can spoil the pixels of its whole tile.
"""

# ruff: noqa: N803 - constants of a kernel are in capitals, as Triton writes them
# mypy: disallow-untyped-defs=False, disable-error-code="import-untyped, import-not-found"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_range import INTERPRETED, accumulator, dot
from .triton_tiles import Folding, Settings, launch_settings, power_of_two

_PROGRAMS = 1024
"""Programs that fill a large GPU, assumed; fewer tiles than that are split by channel."""
_ROWS = 4 if INTERPRETED else 16
"""Rows of cells whose gradients one program sums; it reads a window less one row beside them."""
_STEP = 256 if INTERPRETED else 32
"""Target pixels of one product on the way to the gradient of the low-resolution map."""


def multiply(
    low: Tensor, folded: Tensor, folding: Folding, settings: Settings | None = None
) -> Tensor:
    """Return ``[B, H, W, C]``: each target pixel's cells of ``low [B, h, w, C]``, weighted.

    ``settings`` are for timing others than :mod:`.triton_tiles` has, here and below.
    """
    _, height, width, channels = low.shape
    out = low.new_empty(len(low), *folded.shape[2:], channels)
    products = _products(low, folding)
    chunks = max(1, min(triton.cdiv(channels, 256), _PROGRAMS // products))
    constants = _tile_constants(settings or launch_settings("multiply", low), low, folding)
    chunk = triton.cdiv(triton.cdiv(channels, chunks), constants["BLOCK"]) * constants["BLOCK"]
    saturate = low.dtype == torch.float16
    _multiply_kernel[(products, triton.cdiv(channels, chunk))](
        low, folded, out, height, width, CHUNK=chunk, SATURATE=saturate, **constants
    )
    return out


def grad_folded(
    low: Tensor, grad: Tensor, folding: Folding, settings: Settings | None = None
) -> Tensor:
    """Return the gradient ``[B, cells, H, W]`` of the folded kernel from ``grad [B, H, W, C]``."""
    _, height, width, _ = low.shape
    rows, columns = folding.window
    wide = torch.promote_types(low.dtype, torch.float32)
    out = low.new_empty(len(low), rows * columns, *grad.shape[1:3], dtype=wide)
    constants = _tile_constants(settings or launch_settings("grad_folded", low), low, folding)
    _grad_folded_kernel[(_products(low, folding),)](low, grad, out, height, width, **constants)
    return out


def grad_low(
    folded: Tensor, grad: Tensor, folding: Folding, settings: Settings | None = None
) -> Tensor:
    """Return the gradient ``[B, h, w, C]`` of the low-resolution map from ``grad [B, H, W, C]``."""
    batch, fine_height, fine_width, channels = grad.shape
    height, width = fine_height // folding.factor[0], fine_width // folding.factor[1]
    out = grad.new_empty(batch, height, width, channels)
    constants = _constants(settings or launch_settings("grad_low", grad), grad, folding) | {
        "ROWS": _ROWS,
        "COLUMNS": folding.strip,
        "CELLS": power_of_two(folding.window[0] * folding.strip, 16),
        "STEP": _STEP,
        "STEPS": triton.cdiv((folding.strip + folding.window[1] - 1) * folding.factor[1], _STEP),
    }
    strips = batch * triton.cdiv(width, folding.strip) * triton.cdiv(height, _ROWS)
    _grad_low_kernel[(strips, triton.cdiv(channels, constants["BLOCK"]))](
        folded, grad, out, height, width, **constants
    )
    return out


def _products(low: Tensor, folding: Folding) -> int:
    """Return how many products cover the map."""
    batch, height, width, _ = low.shape
    tile = folding.tile
    tiles = batch * triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.columns)
    return tiles * tile.products(folding.factor)


def _constants(settings: Settings, map_: Tensor, folding: Folding) -> dict[str, Any]:
    """Return constants and launch settings of a kernel for ``map_ [B, h, w, C]``."""
    channels = map_.shape[3]
    block = min(settings["BLOCK"] * 2 // map_.itemsize, power_of_two(channels, 16))
    own = {"SUM": accumulator(map_), "CHANNELS": channels, "BLOCK": block}
    return {**settings, **folding.constants, **own}


def _tile_constants(settings: Settings, low: Tensor, folding: Folding) -> dict[str, Any]:
    """Return those of a kernel whose programs make one product of a tile each."""
    constants, tile = _constants(settings, low, folding), folding.tile
    return {
        **constants,
        **tile.constants,
        "num_warps": constants["num_warps"] * tile.warp_groups,
    }


@triton.jit
def _tile(low_ptr, fine_ptr, folded_ptr, height, width, FACTOR_Y: tl.constexpr,
          FACTOR_X: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr,
          ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr, CELLS: tl.constexpr,
          CHANNELS: tl.constexpr):  # fmt: skip
    """Return where a product reads and writes: cells, target pixels, ``[pixels, cells]`` weights.

    Each of the three is a tensor of pointers (of the weights, pointer and entry), and one of
    whether there is such a place.
    """
    fine_columns: tl.constexpr = COLUMNS * FACTOR_X
    fine_pixels: tl.constexpr = ROWS * FACTOR_Y * fine_columns
    parts: tl.constexpr = (fine_pixels + PIXELS - 1) // PIXELS
    tile = tl.program_id(0) // parts
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    first_x, first_y = tile % across * COLUMNS, tile // across % down * ROWS
    image = (tile // (across * down)).to(tl.int64)

    number = tl.program_id(0) % parts * PIXELS + tl.arange(0, PIXELS)
    fine_y, fine_x = number // fine_columns, number % fine_columns
    y, x = first_y * FACTOR_Y + fine_y, first_x * FACTOR_X + fine_x
    inside = (number < fine_pixels) & (y < height * FACTOR_Y) & (x < width * FACTOR_X)
    pixel = y * (width * FACTOR_X) + x

    reach: tl.constexpr = COLUMNS + WINDOW_X - 1
    number = tl.arange(0, CELLS)
    row, column = number // reach, number % reach
    y, x = first_y - WINDOW_Y // 2 + row, first_x - WINDOW_X // 2 + column
    within = (row < ROWS + WINDOW_Y - 1) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    cell = y * width + x

    # Sums of a number of the pixel and one of the cell: little to compute for each entry.
    own_y, own_x = fine_y // FACTOR_Y, fine_x // FACTOR_X
    area = height * FACTOR_Y * width * FACTOR_X
    entry = (pixel - (own_y * WINDOW_X + own_x) * area)[:, None]
    entry += ((row * WINDOW_X + column) * area)[None, :]
    row = row[None, :] - tl.where(inside, own_y, CELLS)[:, None]
    column = column[None, :] - own_x[:, None]
    seen = (row >= 0) & (row < WINDOW_Y) & (column >= 0) & (column < WINDOW_X)

    area = height * width
    fine_area = area * FACTOR_Y * FACTOR_X
    low = low_ptr + (image * area + cell)[:, None] * CHANNELS
    fine = fine_ptr + (image * fine_area + pixel)[:, None] * CHANNELS
    folded_ptr += image * fine_area * (WINDOW_Y * WINDOW_X)
    return low, within[:, None], fine, inside[:, None], folded_ptr, entry, seen


@triton.jit
def _multiply_kernel(
    low_ptr,  # [B, h, w, C]
    folded_ptr,  # [B, cells, H, W]
    out_ptr,  # [B, H, W, C]
    height, width, CHUNK: tl.constexpr, SATURATE: tl.constexpr,
    FACTOR_Y: tl.constexpr, FACTOR_X: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr,
    SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr,
    CELLS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    low, within, out, inside, folded, entry, seen = _tile(
        low_ptr, out_ptr, folded_ptr, height, width, FACTOR_Y, FACTOR_X, WINDOW_Y, WINDOW_X,
        ROWS, COLUMNS, PIXELS, CELLS, CHANNELS
    )  # fmt: skip
    weights = tl.load(folded + entry, seen, 0)
    for start in range(0, CHUNK, BLOCK):
        channel = tl.program_id(1) * CHUNK + start + tl.arange(0, BLOCK)
        valid = (channel < CHANNELS)[None, :]
        cells = tl.load(low + channel[None, :], within & valid, 0)
        sums = dot(weights, cells, tl.zeros([PIXELS, BLOCK], SUM))
        if SATURATE:
            sums = tl.clamp(sums, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out + channel[None, :], sums, inside & valid)


@triton.jit
def _grad_folded_kernel(
    low_ptr,  # [B, h, w, C]
    grad_ptr,  # [B, H, W, C]
    grad_folded_ptr,  # [B, cells, H, W]
    height, width,
    FACTOR_Y: tl.constexpr, FACTOR_X: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr,
    SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr,
    CELLS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    low, within, grad, inside, grad_folded, entry, seen = _tile(
        low_ptr, grad_ptr, grad_folded_ptr, height, width, FACTOR_Y, FACTOR_X, WINDOW_Y, WINDOW_X,
        ROWS, COLUMNS, PIXELS, CELLS, CHANNELS
    )  # fmt: skip
    sums = tl.zeros([PIXELS, CELLS], SUM)
    for start in range(0, CHANNELS, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        valid = (channel < CHANNELS)[None, :]
        cells = tl.load(low + channel[None, :], within & valid, 0)
        given = tl.load(grad + channel[None, :], inside & valid, 0)
        sums = dot(given, tl.trans(cells), sums)
    tl.store(grad_folded + entry, sums, seen)


@triton.jit
def _grad_low_kernel(
    folded_ptr,  # [B, cells, H, W]
    grad_ptr,  # [B, H, W, C]
    grad_low_ptr,  # [B, h, w, C]
    height, width,
    FACTOR_Y: tl.constexpr, FACTOR_X: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr,
    SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CELLS: tl.constexpr,
    STEP: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum what target pixels give back to ROWS x COLUMNS cells, going down the rows of pixels.

    WINDOW_Y rows of cells are open at a time, each in the slot of its number modulo WINDOW_Y; the
    uppermost is written when the last row of pixels that reaches it has been added.
    """
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    strip = tl.program_id(0)
    first_x, first_y = strip % across * COLUMNS, strip // across % down * ROWS
    image = (strip // (across * down)).to(tl.int64)
    fine_width = width * FACTOR_X
    area = height * FACTOR_Y * fine_width
    folded_ptr += image * area * (WINDOW_Y * WINDOW_X)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    valid = channel < CHANNELS
    number = tl.arange(0, CELLS)
    slot, cell_x = number // COLUMNS, number % COLUMNS
    exists = (slot < WINDOW_Y) & (first_x + cell_x < width)

    sums = tl.zeros([CELLS, BLOCK], SUM)
    for step in range(ROWS + WINDOW_Y - 1):
        y = first_y - WINDOW_Y // 2 + step
        top = y - WINDOW_Y // 2
        row = (slot + WINDOW_Y - (top + WINDOW_Y) % WINDOW_Y) % WINDOW_Y  # of the slot, below top
        if (y >= 0) & (y < height):
            for part in range(FACTOR_Y * STEPS):
                start = y * FACTOR_Y * fine_width + part // STEPS * fine_width
                number = part % STEPS * STEP + tl.arange(0, STEP)
                fine_x = (first_x - WINDOW_X // 2) * FACTOR_X + number
                inside = (fine_x >= 0) & (fine_x < fine_width)
                inside = inside & (number < (COLUMNS + WINDOW_X - 1) * FACTOR_X)
                given = grad_ptr + (image * area + start + fine_x)[:, None] * CHANNELS + channel
                grad = tl.load(given, inside[:, None] & valid, 0)
                column = cell_x[:, None] + (WINDOW_X - 1 - number // FACTOR_X)[None, :]
                seen = exists[:, None] & inside[None, :] & (column >= 0) & (column < WINDOW_X)
                entry = (row[:, None] * WINDOW_X + column) * area + (start + fine_x)[None, :]
                sums = dot(tl.load(folded_ptr + entry, seen, 0), grad, sums)
        cell_y, done = top + row, row == 0
        wanted = exists & done & (cell_y >= first_y) & (cell_y < height)
        cell = (image * height + cell_y) * width + first_x + cell_x
        tl.store(grad_low_ptr + cell[:, None] * CHANNELS + channel, sums, wanted[:, None] & valid)
        sums = tl.where(done[:, None], 0.0, sums)
