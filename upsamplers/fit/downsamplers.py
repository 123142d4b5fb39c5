"""Learned downsamplers: how a teacher is thought to pool fine features into one cell.

Fitting compares upsampled features with a teacher's by way of one of these (FeatUp, arXiv
2403.10516, section 3.1). Each takes a weighted mean over a window of pixels a cell, so features
stay in the teacher's space; they differ in where the weights come from. After fitting they are
thrown away.

``attention`` and ``simple`` are FeatUp's. Its JBU recipe has windows as wide as a cell; any other
kernel its program spreads over the map, windows drifting off their cells. Here they are centred
whatever the kernel, grids may be rectangular, and the border is replicated (to renormalise there
would draw the window's centre further inwards). Its state dict loads as it is.

``featsharp_attention`` and ``featsharp_simple`` are those of FeatSharp's released code, which
differ from the paper's: zeros beyond the border, windows ``(factor - 1) / 2`` pixels off centre.
Checkpoint keys are the same here: ``attn_kernel, kernel_bias, logit_bias, blur_kernel``.

In both published programs the random masks of the attention forms stay on in evaluation; here
they are on in ``train()`` only.

Shapes: u factor · k kernel_size · maps ``[B, C, h * u, w * u]`` -> ``[B, C, h, w]``.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from radio_distill.errors import ConfigError, UnknownNameError
from radio_distill.registry import nearest
from radio_distill.types import Size

TILE = 8
"""Most cells along one side of a tile, see :func:`pool`; measured on grids of 8 to 27 cells."""


class Windows(NamedTuple):
    """A window of ``kernel_size ** 2`` pixels for each cell of ``factor ** 2``."""

    factor: int
    kernel_size: int
    margin: int
    """Pixels of the window before the first pixel of its cell."""
    border: str
    """Padding beyond the map: ``replicate`` for its last pixel again, ``constant`` for zeros."""

    def grid(self, maps: Tensor) -> Size:
        """Return the (h, w) of ``maps [B, C, h * u, w * u]``; ConfigError where that cannot be."""
        height, width = maps.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ConfigError(
                f"a map of {height}x{width} does not divide by the downsampler's factor "
                f"{self.factor}; give it factor times the teacher's grid"
            )
        if self.kernel_size > min(height, width):
            raise ConfigError(
                f"downsampler windows of {self.kernel_size} pixels are larger than the map of "
                f"{height}x{width}; take a smaller kernel_size or larger images"
            )
        return height // self.factor, width // self.factor


def centred_windows(factor: int, kernel_size: int) -> Windows:
    """Return windows centred on their cells, of at least ``kernel_size`` and ``factor`` pixels.

    Window and cell must differ by an even number, so it is one pixel more where it has to be.
    """
    _check(factor, kernel_size)
    size = max(kernel_size, factor)
    size += (size - factor) % 2
    return Windows(factor, size, (size - factor) // 2, "replicate")


def featsharp_windows(factor: int, kernel_size: int) -> Windows:
    """Return the windows of FeatSharp's released code; raises ConfigError for an even kernel."""
    _check(factor, kernel_size)
    if kernel_size % 2 == 0:
        raise ConfigError(f"downsampler kernel_size is {kernel_size}; this form needs an odd one")
    return Windows(factor, kernel_size, kernel_size // 2, "constant")


def _check(factor: int, kernel_size: int) -> None:
    for name, value in (("factor", factor), ("kernel_size", kernel_size)):
        if value < 1:
            raise ConfigError(f"downsampler {name} is {value}; it must be at least 1")


def pool(maps: Tensor, weights: Tensor, windows: Windows) -> Tensor:
    """Return the weighted sums ``[B, C, h, w]`` over the windows of ``maps [B, C, H, W]``.

    The map is cut into tiles of a few cells, and the weights are written into one matrix for each
    tile, zero outside the windows. So the sum is a batched product of matrices, which machines do
    best, in bf16 above all, and the map is copied at most once, where unfolding makes
    ``(k / u) ** 2`` copies. What a tile has for cells of its neighbours, whose windows reach into
    it, is added up on the small grid. A NaN spreads over its tile.

    Args:
        maps: fine features.
        weights: ``[B, k * k, h, w]``, the taps of a window row by row; may broadcast.
        windows: where they lie.
    """
    grid, batch = windows.grid(maps), len(maps)
    y, x, place, inside = _plan(windows, grid, maps.device)
    taps = (weights * inside.to(weights)).expand(batch, -1, -1, -1).flatten(1)
    shape = (batch, y.tiles * x.tiles, y.reach * x.reach, y.pixels * x.pixels)
    operators = taps.new_zeros(batch, shape[1] * shape[2] * shape[3])
    operators = operators.scatter_add(1, place.expand(batch, -1), taps).view(shape).flatten(0, 1)

    missing = (x.tiles * x.pixels - maps.shape[3], y.tiles * y.pixels - maps.shape[2])
    if any(missing):
        maps = F.pad(maps, (0, missing[0], 0, missing[1]))
    tiles = rearrange(maps, "b c (ty y) (tx x) -> (b ty tx) (y x) c", ty=y.tiles, tx=x.tiles)
    sums = torch.bmm(operators.to(tiles.dtype), tiles)  # [B * tiles, reached cells, C]
    if shape[1] == 1:
        return rearrange(sums, "b (h w) c -> b c h w", h=grid[0])
    sums = rearrange(sums, "(b t) n c -> b (c n) t", b=batch)
    pooled = F.fold(
        sums,
        (y.tiles * y.cells, x.tiles * x.cells),
        kernel_size=(y.reach, x.reach),
        padding=(y.halo, x.halo),
        stride=(y.cells, x.cells),
    )
    return pooled[:, :, : grid[0], : grid[1]]


class _Axis(NamedTuple):
    """One axis of a map in tiles; the tensors are ``[grid cells, taps]``."""

    tiles: int
    cells: int
    """Cells of a tile."""
    pixels: int
    """Pixels of a tile."""
    halo: int
    """Cells on either side of a tile whose windows reach into it."""
    reach: int
    """Cells whose windows reach into a tile, its own included."""
    tile: Tensor
    """Which tile has the pixel of a tap."""
    cell: Tensor
    """The tap's cell, counted from the first that reaches into that tile."""
    pixel: Tensor
    """The tap's pixel, counted within that tile."""
    inside: Tensor


class _Plan(NamedTuple):
    """Places of the weights of one map in the matrices of its tiles."""

    rows: _Axis
    columns: _Axis
    place: Tensor
    """``[k * k * h * w]``: where in the matrices of a map each weight goes."""
    inside: Tensor
    """bool ``[k * k, h, w]``: taps that count."""


def _axis(windows: Windows, num_cells: int) -> _Axis:
    tiles = -(-num_cells // TILE)
    cells = -(-num_cells // tiles)
    pixels = cells * windows.factor
    own = torch.arange(num_cells)[:, None]
    taps = own * windows.factor - windows.margin + torch.arange(windows.kernel_size)
    within = taps.clamp(0, num_cells * windows.factor - 1)
    tile = within // pixels
    cell = own - tile * cells
    halo = max(0, -int(cell.min()), int(cell.max()) + 1 - cells)
    inside = (taps == within) | (windows.border == "replicate")
    reach = cells + 2 * halo
    return _Axis(tiles, cells, pixels, halo, reach, tile, cell + halo, within % pixels, inside)


@lru_cache(maxsize=16)
def _plan(windows: Windows, grid: Size, device: torch.device) -> _Plan:
    # A later call may need gradients, or data where this one is only measured.
    with torch.inference_mode(False), unset_fake_temporarily():
        y, x = (_axis(windows, num_cells) for num_cells in grid)
        matrix = y.reach * x.reach * y.pixels * x.pixels
        rows = (y.tile * x.tiles * matrix) + (y.cell * x.reach * y.pixels + y.pixel) * x.pixels
        columns = x.tile * matrix + x.cell * y.pixels * x.pixels + x.pixel
        place = rearrange(rows, "h i -> i 1 h 1") + rearrange(columns, "w j -> 1 j 1 w")
        inside = rearrange(y.inside, "h i -> i 1 h 1") & rearrange(x.inside, "w j -> 1 j 1 w")
        return _Plan(y, x, place.flatten().to(device), inside.flatten(0, 1).to(device))


class AttentionDownsampler(nn.Module):
    """FeatUp's attention downsampler (section 3.1): each pixel counts by its saliency.

    The weights of a window are ``softmax(w * saliency + b)``, as FeatUp's program has it (equation
    2 puts b inside); it equals that program where ``kernel_size = factor``, as in its JBU recipe.

    Two defaults differ, because fitted maps turn out too sharp where the downsampler pools wider
    than the teacher, and at the published learning rates b hardly leaves its start:

    * ``b`` starts as a Gaussian of about the cell's width, not flat; 7 pixels at 2x are 3.5 cells.
    * ``blur`` is off. FeatUp's Gaussian is of one pixel, there 1/16 of a cell, at 2x half of one.

    Where the truth was known (a teacher of cell means, 2x, 400 steps), error of the fine map
    from bilinear's 0.22: 0.20 so, 0.46 with blur, 1.03 with a flat start and no blur.

    ``featup`` in a recipe is this module as published, blur on and b flat.

    Args:
        channels: C.
        factor: u.
        kernel_size: least width of the windows, see :func:`centred_windows`.
        blur: whether a Gaussian of one pixel's standard deviation smooths the map first.
        flat: whether ``b`` starts at zero, so that all pixels of a window count alike.
        dropout: share of windows that ignore saliency, and of channels that a map's saliency
            does not see, while training. (FeatUp draws the latter for every pixel.)
    """

    blur_kernel: Tensor | None

    def __init__(
        self,
        channels: int,
        factor: int,
        kernel_size: int = 7,
        blur: bool = False,
        dropout: float = 0.2,
        flat: bool = False,
    ):
        super().__init__()
        self.windows = centred_windows(factor, kernel_size)
        self.dropout = dropout
        # Named as in FeatUp's checkpoints, where it follows a dropout.
        self.attention_net = nn.Sequential(nn.Identity(), nn.Linear(channels, 1))
        self.w = nn.Parameter(torch.ones(2 * (self.windows.kernel_size,)))
        logits = _cell_logits(self.windows)
        self.b = nn.Parameter(torch.zeros_like(logits) if flat else logits)
        kernel = _gaussian(variance=1.0) if blur else None
        self.register_buffer("blur_kernel", kernel, persistent=False)

    def forward(self, maps: Tensor, keep: Tensor | None = None) -> Tensor:
        """Downsample; ``keep [B, 1, h, w]`` (1 or 0) are windows that heed saliency, else drawn."""
        if self.blur_kernel is not None:
            maps = _blur(maps, self.blur_kernel, "reflect")
        logits = self._saliency(maps)  # [B, k * k, h, w]
        keep = _keep(logits[:, :1], self.dropout, self.training) if keep is None else keep
        w, b = (rearrange(part, "i j -> (i j) 1 1") for part in (self.w, self.b))
        return pool(maps, (logits * keep * w + b).softmax(dim=1), self.windows)

    def _saliency(self, maps: Tensor) -> Tensor:
        linear = cast(nn.Linear, self.attention_net[1])
        weight = linear.weight.expand(len(maps), -1)
        channels = F.dropout(weight, self.dropout, self.training)  # [B, C]
        saliency = torch.einsum("bchw,bc->bhw", maps, channels) + linear.bias
        return _unfold(saliency[:, None], self.windows)


class FeatSharpAttentionDownsampler(nn.Module):
    """The attention downsampler of FeatSharp's released code: weights are a convolution's output.

    Weights are ``softmax(conv(blurred) + logit_bias)``, sums run over zeros beyond the border,
    so border cells are darker.

    Args:
        channels: C.
        factor: u.
        kernel_size: width of the windows and of the convolution, odd.
        dropout: share of logits dropped while training.
    """

    blur_kernel: Tensor

    def __init__(self, channels: int, factor: int, kernel_size: int = 7, dropout: float = 0.2):
        super().__init__()
        self.windows = featsharp_windows(factor, kernel_size)
        self.dropout = dropout
        taps = kernel_size**2
        kernel = 1 + 0.01 * torch.randn(taps, channels, kernel_size, kernel_size)
        self.attn_kernel = nn.Parameter(kernel)
        self.kernel_bias = nn.Parameter(0.01 * torch.randn(taps))
        self.logit_bias = nn.Parameter(0.1 * torch.randn(1, taps, 1, 1))
        self.register_buffer("blur_kernel", _gaussian(variance=0.5**1.5))

    def forward(self, maps: Tensor, keep: Tensor | None = None) -> Tensor:
        """Downsample; ``keep [B, k * k, h, w]`` (1 or 0) are logits that count, else drawn."""
        self.windows.grid(maps)
        maps = _blur(maps, self.blur_kernel, "constant")
        factor, margin = self.windows.factor, self.windows.margin
        logits = F.conv2d(maps, self.attn_kernel, self.kernel_bias, factor, margin)
        keep = _keep(logits, self.dropout, self.training) if keep is None else keep
        return pool(maps, (logits * keep + self.logit_bias).softmax(dim=1), self.windows)


class SimpleDownsampler(nn.Module):
    """FeatUp's simple downsampler: one learned kernel ``|p| / sum |p|`` for all cells and channels.

    It starts as a Gaussian of about the cell's width (published: flat, in windows of one cell). In
    FeatSharp's released form it is ``softplus(p) / sum softplus(p)``, flat, in that form's windows.
    """

    def __init__(self, channels: int, factor: int, kernel_size: int = 7, featsharp: bool = False):
        super().__init__()
        self.featsharp = featsharp
        self.windows = (featsharp_windows if featsharp else centred_windows)(factor, kernel_size)
        flat = torch.ones(kernel_size, kernel_size)
        self.kernel_params = nn.Parameter(flat if featsharp else _cell_logits(self.windows).exp())

    def forward(self, maps: Tensor) -> Tensor:
        """Downsample."""
        kernel = F.softplus(self.kernel_params) if self.featsharp else self.kernel_params.abs()
        kernel = rearrange(kernel / kernel.sum(), "i j -> 1 (i j) 1 1")
        return pool(maps, kernel, self.windows)


DOWNSAMPLERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "attention": AttentionDownsampler,
    "featup": partial(AttentionDownsampler, blur=True, flat=True),
    "simple": SimpleDownsampler,
    "featsharp_attention": FeatSharpAttentionDownsampler,
    "featsharp_simple": partial(SimpleDownsampler, featsharp=True),
}
"""Name to ``(channels, factor, kernel_size) -> module``."""


def build_downsampler(name: str, channels: int, factor: int, kernel_size: int = 7) -> nn.Module:
    """Build a downsampler with fresh weights; raises UnknownNameError, ConfigError."""
    if name not in DOWNSAMPLERS:
        hint = nearest(name, list(DOWNSAMPLERS))
        raise UnknownNameError(f"unknown downsampler {name!r} ({hint})")
    return DOWNSAMPLERS[name](channels, factor, kernel_size)


def _cell_logits(windows: Windows) -> Tensor:
    """Return ``[k, k]`` logits of a Gaussian in the middle, half a cell in standard deviation."""
    offsets = torch.arange(windows.kernel_size) - (windows.kernel_size - 1) / 2
    logits = -2 * (offsets / windows.factor) ** 2
    return logits[:, None] + logits


def _gaussian(variance: float) -> Tensor:
    """Return ``[1, 1, 5, 5]`` weights that sum to one."""
    line = torch.softmax(-((torch.arange(5) - 2) ** 2) / (2 * variance), dim=0)
    return (line[:, None] * line)[None, None]


def _blur(maps: Tensor, kernel: Tensor, border: str) -> Tensor:
    channels, height, width = maps.shape[1:]
    if min(height, width) < 3:
        raise ConfigError(f"cannot blur a map of {height}x{width}; it needs 3 pixels a side")
    padded = F.pad(maps, (2, 2, 2, 2), mode=border)
    return F.conv2d(padded, kernel.to(maps.dtype).expand(channels, -1, -1, -1), groups=channels)


def _unfold(maps: Tensor, windows: Windows) -> Tensor:
    """Copy ``[B, 1, H, W]`` into windows ``[B, k * k, h, w]``, row by row."""
    h, _ = windows.grid(maps)
    padded = F.pad(maps, 4 * (windows.margin,), mode=windows.border)
    unfolded = F.unfold(padded, windows.kernel_size, stride=windows.factor)
    return rearrange(unfolded, "b k (h w) -> b k h w", h=h)


def _keep(like: Tensor, dropout: float, training: bool) -> Tensor:
    """Return ones, while training with a share of zeros; the rest is not scaled up."""
    keep = torch.ones_like(like)
    return torch.bernoulli(keep * (1 - dropout)) if training else keep
