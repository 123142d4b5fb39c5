"""The joint-bilateral layer as batched matrix products, torch only, forward and backward.

Interpolation and filter are linear in the features, and their weights are the same for every
channel. Folded into one matrix, a target pixel is a weighted sum over few low-resolution cells: 5x5
for a bilinear base at 2 to 4 times with a 7x7 window, 3x3 from 5 times on, 7x7 for a bicubic base
at 2 times. So neither the interpolated map nor its windows are ever written: for blocks of one row
of cells by :data:`_BLOCK` columns, the kernels become a matrix ``[target pixels, cells]``, which
multiplies the features ``[cells, C]`` (:class:`_Apply`). Blocks are gathered a few megabytes at a
time and gathered again for the gradients.

The weights' dot products are local too: :class:`_Similarity` multiplies stretches of a row of
pixels with stretches of the rows around it, and keeps the diagonals.

Border rules are not written here: the matrices are read off ``F.interpolate`` and reflected indices
(:func:`_axis`), hence exact. Not differentiable twice.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd.function import once_differentiable

_BLOCK = 4
"""Columns of cells in one product; more waste multiplications, fewer make small products."""
_CHUNK_ON_CPU, _CHUNK = 2**19, 2**26
"""Gathered elements at a time: what caches hold, and elsewhere what keeps the device busy."""
_STRETCH = 32
"""Target pixels of a row in one product of dot products."""


def range_weights(
    projected: Tensor, temperature: Tensor, sigma: Tensor, radius: int, euclidean: bool = False
) -> Tensor:
    """Return the bilateral weights ``[B, T, H, W]`` of ``projected [B, K, H, W]``."""
    with _as_given(projected):
        wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
        keys = F.pad(wide, (radius,) * 4, mode="reflect")
        logits = _Similarity.apply(_channels_last(wide), _channels_last(keys), radius)
        if euclidean:  # the centre's own length is the same for all of its neighbours
            lengths = keys.square().sum(dim=1).unfold(1, 2 * radius + 1, 1)
            logits = 2 * logits - lengths.unfold(2, 2 * radius + 1, 1).flatten(3)
        offset = torch.linspace(-1, 1, 2 * radius + 1, dtype=wide.dtype, device=wide.device)
        distance = (offset[:, None].square() + offset.square()).flatten()  # [T]
        weights = torch.addcmul(-distance / (2 * sigma.square()), logits, temperature).softmax(-1)
        return rearrange(weights.to(projected.dtype), "b h w t -> b t h w")


def apply_kernel(low: Tensor, kernel: Tensor, base: str) -> Tensor:
    """Upsample ``low [B, C, h, w]`` by interpolation and ``kernel [B, T, H, W]``.

    A value that is not finite reaches the target pixels that its cell reaches, as NaN, and no
    others; this does not hold for the gradients.
    """
    with _as_given(low):
        out = _Apply.apply(_channels_last(low), _channels_last(kernel), base)
    return rearrange(out, "b h w c -> b c h w")


def joint_bilateral(
    low: Tensor, projected: Tensor, temperature: Tensor, sigma: Tensor, radius: int, base: str
) -> Tensor:
    """Upsample ``low [B, C, h, w]`` under the weights of ``projected [B, K, H, W]``."""
    return apply_kernel(low, range_weights(projected, temperature, sigma, radius), base)


def _as_given(tensor: Tensor) -> torch.autocast:
    """Return the context in which products keep the type of their operands."""
    return torch.autocast(tensor.device.type, enabled=False)


def _channels_last(map_: Tensor) -> Tensor:
    return rearrange(map_, "b c h w -> b h w c").contiguous()


# --- dot products of neighbours ---------------------------------------------------------------


class _Similarity(torch.autograd.Function):
    """Dot products ``[B, H, W, T]`` of pixels ``[B, H, W, K]`` and keys padded by the radius."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, keys: Tensor, radius: int) -> Tensor:
        ctx.save_for_backward(pixels, keys)
        taps = 2 * radius + 1
        out = pixels.new_empty(*pixels.shape[:3], taps, taps)
        for row, here, there in _stretches(pixels, taps):
            scores = pixels[:, :, here] @ keys[:, row, there].mT  # [B, H, n, n + 2 radius]
            out[:, :, here, row.start] = _diagonals(scores, taps)
        return out.flatten(3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        pixels, keys = ctx.saved_tensors
        taps = keys.shape[1] - pixels.shape[1] + 1
        grad = grad.unflatten(3, (taps, taps))
        grad_pixels, grad_keys = torch.zeros_like(pixels), torch.zeros_like(keys)
        with _as_given(grad):
            for row, here, there in _stretches(pixels, taps):
                size = here.stop - here.start
                scores = grad.new_zeros(*pixels.shape[:2], size, size + taps - 1)
                _diagonals(scores, taps).copy_(grad[:, :, here, row.start])
                grad_pixels[:, :, here] += scores @ keys[:, row, there]
                grad_keys[:, row, there] += scores.mT @ pixels[:, :, here]
        return grad_pixels, grad_keys, None


def _stretches(pixels: Tensor, taps: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield, for each row of taps and stretch of columns: rows of keys, pixels, their keys."""
    height, width = pixels.shape[1:3]
    for row in range(taps):
        for start in range(0, width, _STRETCH):
            stop = min(start + _STRETCH, width)
            yield slice(row, row + height), slice(start, stop), slice(start, stop + taps - 1)


def _diagonals(scores: Tensor, taps: int) -> Tensor:
    """View entries ``[.., i, i + j]`` of ``[B, H, n, n + taps - 1]`` as ``[.., i, j]``."""
    *batch, columns, _ = scores.stride()
    shape = (*scores.shape[:-1], taps)
    return scores.as_strided(shape, (*batch, columns + 1, 1))


# --- interpolation and filter in one matrix ---------------------------------------------------


class _Columns(NamedTuple):
    """A block of columns: which target pixels, which cells, and the weights between them."""

    pixels: slice
    cells: slice
    weights: Tensor  # [target pixels, taps, cells]


class _Plan(NamedTuple):
    """Weights that turn kernels of one size into matrices; batch and channels do not matter."""

    rows: Tensor
    """``[h, S]``: the rows of cells that the target pixels of a row of cells reach."""
    row_weights: Tensor
    """``[h, factor, taps, S]``"""
    columns: tuple[_Columns, ...]


def _all_finite(values: Tensor) -> bool:
    """Tell whether all values are finite; those of a tensor without data are taken to be."""
    if isinstance(values, FakeTensor):
        return True
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    return bool(total.isfinite())


class _Apply(torch.autograd.Function):
    """``[B, h, w, C], [B, H, W, T] -> [B, H, W, C]``, a chunk of blocks at a time."""

    @staticmethod
    def forward(ctx: Any, low: Tensor, kernel: Tensor, base: str) -> Tensor:
        ctx.save_for_backward(low, kernel)
        ctx.base = base
        out = low.new_empty(*kernel.shape[:3], low.shape[3])
        if _all_finite(low):
            return _upsample(_Blocks(low, kernel, base), out)
        finite = low.nan_to_num(0, 0, 0)
        reached = _reached(low != finite, kernel, base)
        return _upsample(_Blocks(finite, kernel, base), out).masked_fill_(reached, torch.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        low, kernel = ctx.saved_tensors
        blocks = _Blocks(low, kernel, ctx.base)
        with _as_given(grad):
            return *_gradients(blocks, grad.contiguous(), *ctx.needs_input_grad[:2]), None


class _Blocks:
    """The blocks of low-resolution cells that both directions go through, a chunk at a time."""

    def __init__(self, low: Tensor, kernel: Tensor, base: str) -> None:
        batch, height, width, channels = low.shape
        taps = round(kernel.shape[3] ** 0.5)
        factors = (kernel.shape[1] // height, kernel.shape[2] // width)
        self.wide = torch.promote_types(kernel.dtype, torch.float32)
        self.compute = torch.float32 if low.dtype == torch.float16 else low.dtype
        with unset_fake_temporarily():  # what is only measured must not leave a plan without data
            self.plan = _plan(height, width, *factors, taps // 2, base, self.wide, low.device)
        self.num_rows = batch * height
        self.kernels = kernel.view(self.num_rows, factors[0], kernel.shape[2], taps, taps)
        self.low = low.flatten(0, 1)  # [B * h, w, C]
        row = torch.arange(self.num_rows, device=low.device)
        self.row = row % height
        self.reached = (row - self.row)[:, None] + self.plan.rows[self.row]  # [B * h, S]
        budget = _CHUNK_ON_CPU if low.device.type == "cpu" else _CHUNK
        reach = self.reached.shape[1]
        self.chunk = max(1, budget // (reach * (_BLOCK + reach) * channels))

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield rows of cells, all rows that these reach ``[n * S]``, and their weights."""
        for start in range(0, self.num_rows, self.chunk):
            rows = slice(start, start + self.chunk)
            yield rows, self.reached[rows].flatten(), self.plan.row_weights[self.row[rows]]

    def by_pixels(self, map_: Tensor) -> Tensor:
        """View ``[B, H, W, C]`` as ``[rows of cells, rows of pixels in them, W, C]``."""
        return map_.view(*self.kernels.shape[:3], map_.shape[3])

    def matrix(self, columns: _Columns, rows: slice, row_weights: Tensor) -> Tensor:
        """Return the kernels folded over interpolation, ``[n, target pixels, cells]``."""
        kernels = self.kernels[rows, :, columns.pixels].to(self.wide)
        matrix = _fold_columns(_fold_rows(kernels, row_weights), columns.weights)
        return matrix.to(self.compute)

    def cells(self, columns: _Columns, reached: Tensor, row_weights: Tensor) -> Tensor:
        """Return the features that a matrix multiplies, ``[n, cells, C]``."""
        cells = self.low[:, columns.cells].index_select(0, reached).to(self.compute)
        return cells.view(len(row_weights), -1, cells.shape[2])

    def kernel_gradient(self, matrix: Tensor, columns: _Columns, row_weights: Tensor) -> Tensor:
        """Return the kernels' gradient from that of their matrix."""
        partial = _unfold_columns(matrix.to(self.wide), columns.weights, row_weights.shape[3])
        return _unfold_rows(partial, row_weights)


def _upsample(blocks: _Blocks, out: Tensor) -> Tensor:
    """Write the output ``[B, H, W, C]``."""
    pixels, limit = blocks.by_pixels(out), torch.finfo(out.dtype)
    for columns in blocks.plan.columns:
        for rows, reached, row_weights in blocks.chunks():
            matrix = blocks.matrix(columns, rows, row_weights)
            product = matrix @ blocks.cells(columns, reached, row_weights)
            if blocks.compute != out.dtype:
                product.clamp_(limit.min, limit.max)
            pixels[rows, :, columns.pixels] = product.unflatten(1, (pixels.shape[1], -1))
    return out


def _gradients(
    blocks: _Blocks, grad: Tensor, for_low: bool, for_kernel: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of features and kernels, summed over blocks in 32 bits at least."""
    pixels = blocks.by_pixels(grad)
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad_low = torch.zeros_like(blocks.low, dtype=wide) if for_low else None
    grad_kernel = torch.empty_like(blocks.kernels) if for_kernel else None
    for columns in blocks.plan.columns:
        strip = torch.zeros_like(blocks.low[:, columns.cells], dtype=wide)
        for rows, reached, row_weights in blocks.chunks():
            given = pixels[rows, :, columns.pixels].flatten(1, 2).to(blocks.compute)
            if grad_low is not None:
                spread = blocks.matrix(columns, rows, row_weights).mT @ given
                strip.index_add_(0, reached, spread.view(len(reached), *strip.shape[1:]).to(wide))
            if grad_kernel is not None:
                matrix = given @ blocks.cells(columns, reached, row_weights).mT
                gradient = blocks.kernel_gradient(matrix, columns, row_weights)
                grad_kernel[rows, :, columns.pixels] = gradient
        if grad_low is not None:
            grad_low[:, columns.cells] += strip
    if grad_low is not None:
        grad_low = grad_low.view(len(grad), -1, *grad_low.shape[1:]).to(grad.dtype)
    return grad_low, None if grad_kernel is None else grad_kernel.view(*grad.shape[:3], -1)


def _fold_rows(kernels: Tensor, weights: Tensor) -> Tensor:
    """Fold rows of taps into rows of cells: ``[n, u, x, taps, taps] -> [n, u, S, x, taps]``."""
    return einsum(kernels, weights, "n u x i j, n u i s -> n u s x j")


def _unfold_rows(grad: Tensor, weights: Tensor) -> Tensor:
    return einsum(grad, weights, "n u s x j, n u i s -> n u x i j")


def _fold_columns(partial: Tensor, weights: Tensor) -> Tensor:
    """Fold columns of taps into the block's: ``[n, u, S, x, taps] -> [n, pixels, cells]``."""
    matrix = einsum(partial, weights, "n u s x j, x j d -> n u x s d")
    return rearrange(matrix, "n u x s d -> n (u x) (s d)")


def _unfold_columns(grad: Tensor, weights: Tensor, num_rows: int) -> Tensor:
    grad = rearrange(grad, "n (u x) (s d) -> n u x s d", x=weights.shape[0], s=num_rows)
    return einsum(grad, weights, "n u x s d, x j d -> n u s x j")


@lru_cache(maxsize=32)
def _plan(
    height: int,
    width: int,
    row_factor: int,
    column_factor: int,
    radius: int,
    base: str,
    dtype: torch.dtype,
    device: torch.device,
) -> _Plan:
    """Return the weights for a grid of ``height x width`` cells."""
    reach = _reach(row_factor, radius, base)
    size = min(2 * reach + 1, height)
    first = (torch.arange(height) - reach).clamp(0, height - size)
    rows = first[:, None] + torch.arange(size)  # [h, S]
    interpolation, taps = _axis(height, row_factor, radius, base)
    taps = rearrange(taps, "(h u) t -> h u t 1", u=row_factor)
    row_weights = interpolation[taps, rearrange(rows, "h s -> h 1 1 s")]

    reach = _reach(column_factor, radius, base)
    interpolation, taps = _axis(width, column_factor, radius, base)
    columns = []
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        pixels = slice(start * column_factor, stop * column_factor)
        cells = slice(max(0, start - reach), min(width, stop + reach))
        weights = interpolation[taps[pixels]][:, :, cells].to(device, dtype)
        columns.append(_Columns(pixels, cells, weights))
    return _Plan(rows.to(device), row_weights.to(device, dtype), tuple(columns))


def _reach(factor: int, radius: int, base: str) -> int:
    """Return how many cells away from its own cell a target pixel can take from.

    The first sub-pixel of cell 0 looks left to target pixel ``-radius``, whose centre lies at
    ``(0.5 - radius) / factor - 0.5`` cells; interpolation starts at the cell below, or one earlier.
    """
    return -((1 - 2 * radius - factor) // (2 * factor)) + (base == "bicubic")


def _axis(cells: int, factor: int, radius: int, base: str) -> tuple[Tensor, Tensor]:
    """Return interpolation ``[cells * factor, cells]`` and the reflected taps of each pixel."""
    size = cells * factor
    identity = rearrange(torch.eye(cells, dtype=torch.float64), "c h -> 1 c h 1")
    columns = F.interpolate(identity, (size, 1), mode=base, align_corners=False)
    position = torch.arange(size)[:, None] + torch.arange(-radius, radius + 1)
    taps = size - 1 - (size - 1 - position.abs()).abs()  # reflected at both ends
    return rearrange(columns, "1 c h 1 -> h c"), taps


def _reached(cells: Tensor, kernel: Tensor, base: str) -> Tensor:
    """Return which of ``[B, H, W, C]`` depend on the marked of ``cells [B, h, w, C]``."""
    radius = round(kernel.shape[3] ** 0.5) // 2
    reached = cells.float()
    for axis in (1, 2):
        size = cells.shape[axis]
        weights, taps = _axis(size, kernel.shape[axis] // size, radius, base)
        support = (weights != 0)[taps].any(dim=1).to(reached)  # [pixels, cells]
        reached = torch.tensordot(support, reached, ([1], [axis])).movedim(0, axis)
    return reached > 0
