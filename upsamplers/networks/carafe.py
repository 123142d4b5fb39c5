"""CARAFE: content-aware reassembly of features (arXiv 1905.02188).

Each cell's content predicts, for each of its ``factor * factor`` fine cells, how to mix the
neighbourhood of low-resolution cells around it. The image is not looked at. Ours differs in two
things: the edge is repeated rather than filled with zeros, so that a constant map stays constant to
its border, and the prediction starts at bilinear interpolation rather than at a box blur.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from radio_distill.config.fields import Odd, Positive

from . import Observation


class CarafeNetwork(nn.Module):
    """CARAFE (arXiv 1905.02188): kernels that the features predict.

    Args:
        channels: C of the features.
        factor: how much finer the result is.
        kernel_size: side of the neighbourhood, in low-resolution cells; the paper's k_up.
        encoder_size: side of the convolution that predicts; the paper's k_encoder.
        compressed_channels: what the features are squeezed to before it; the paper's C_m.
    """

    tile_levels: tuple[int, ...] = ()

    def __init__(
        self,
        channels: int,
        factor: int,
        kernel_size: Odd = 5,
        encoder_size: Odd = 3,
        compressed_channels: Positive = 64,
    ):
        super().__init__()
        self.factor = factor
        self.compress = nn.Conv2d(channels, compressed_channels, 1)
        self.encode = nn.Conv2d(
            compressed_channels,
            factor**2 * kernel_size**2,
            encoder_size,
            padding=encoder_size // 2,
            padding_mode="replicate",
        )
        nn.init.normal_(self.encode.weight, std=1e-3)
        self.encode.bias = nn.Parameter(bilinear_logits(factor, kernel_size).flatten())

    def forward(self, observation: Observation) -> Tensor:
        """Return ``[B, C, h * factor, w * factor]``."""
        logits = self.encode(self.compress(observation.low))  # [B, f * f * T, h, w]
        logits = rearrange(logits, "b (f t) h w -> b h w f t", f=self.factor**2)
        return reassemble(observation.low, logits.softmax(-1), self.factor)


def bilinear_logits(factor: int, kernel_size: int) -> Tensor:
    """Return logits ``[f * f, T]`` whose softmax is nearly bilinear interpolation.

    Each tap has a thousandth more than that, for a weight of zero could never learn.
    """
    line = interpolation_weights(factor, kernel_size)
    weights = torch.einsum("i a, j b -> i j a b", line, line)
    return (weights + 1e-3).log().flatten(2).flatten(0, 1).float()


def interpolation_weights(factor: int, kernel_size: int) -> Tensor:
    """Return what each fine cell along an axis takes of the cells around its own, ``[f, k]``."""
    fine = torch.arange(factor, dtype=torch.float64)
    position = (fine + 0.5) / factor - 0.5  # of fine cells, from the cell's centre
    taps = torch.arange(kernel_size) - kernel_size // 2
    return (1 - (taps - position[:, None]).abs()).clamp_min(0)


def reassemble(low: Tensor, weights: Tensor, factor: int) -> Tensor:
    """Mix each cell's neighbourhood by its own weights, as one small matrix product a cell.

    Args:
        low: features ``[B, C, h, w]``.
        weights: ``[B, h, w, f * f, T]``; fine cells and taps of the neighbourhood row by row.
        factor: f.

    Returns:
        ``[B, C, h * f, w * f]``, channels last. Neighbourhoods are copied in bands of rows that
        are no larger than the result, and again in the backward pass rather than kept.
    """
    height, num_taps = low.shape[2], weights.shape[-1]
    side = int(num_taps**0.5)
    padded = _repeat_edge(low, side // 2)
    rows = max(1, height * factor**2 // num_taps)
    bands = [
        checkpoint(
            _reassemble_band,
            padded[:, :, top : top + rows + side - 1],
            weights[:, top : top + rows],
            factor,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for top in range(0, height, rows)
    ]
    return torch.cat(bands, dim=2)


def neighbourhoods(spatial: Tensor, side: int) -> Tensor:
    """Return the cells around each cell, ``[B, h, w, side * side, C]``; the edge is repeated."""
    return _windows(_repeat_edge(spatial, side // 2), side)


def _reassemble_band(padded: Tensor, weights: Tensor, factor: int) -> Tensor:
    cells = _windows(padded, int(weights.shape[-1] ** 0.5))  # [B, h, w, T, C]
    fine = rearrange(weights @ cells, "b h w (i j) c -> b (h i) (w j) c", i=factor)
    return rearrange(fine, "b h w c -> b c h w")


def _windows(padded: Tensor, side: int) -> Tensor:
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)
    return rearrange(windows, "b c h w i j -> b h w (i j) c")


def _repeat_edge(spatial: Tensor, width: int) -> Tensor:
    return F.pad(spatial, (width,) * 4, mode="replicate")
