"""Heads of the probes: what is trained on the frozen maps of an encoder, in float32.

A head takes a list of maps ``[B, C, h, w]``, from early to late, and returns one map; all but the
pyramid read the maps side by side, resized to the grid of the last.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..system.distributed import all_reduce_sum, is_shared
from .losses import depth_from_bins

_MOMENTUM = 0.1


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the images of a step on all processes, on any device.

    torch's ``SyncBatchNorm`` runs on GPUs alone.
    """

    def __init__(self, channels: int):
        super().__init__(channels, momentum=_MOMENTUM)

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise ``[B, C, h, w]``; every process of a run must call."""
        if not (self.training and is_shared()):
            normalised: Tensor = super().forward(maps)
            return normalised
        cells = maps.new_full((1,), maps.numel() / maps.shape[1])
        sums = _sum_over_processes(torch.cat([maps.sum(dim=(0, 2, 3)), cells]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = maps - mean[:, None, None]
        variance = _sum_over_processes(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            cast(Tensor, self.running_mean).lerp_(mean, _MOMENTUM)
            cast(Tensor, self.running_var).lerp_(variance * count / (count - 1), _MOMENTUM)
            cast(Tensor, self.num_batches_tracked).add_(1)
        scale = (variance + self.eps).rsqrt() * self.weight
        return centred * scale[:, None, None] + self.bias[:, None, None]


class _SumOverProcesses(torch.autograd.Function):
    """A sum that gradients go through: each process gets those of all."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        return all_reduce_sum(values)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient)


def _sum_over_processes(values: Tensor) -> Tensor:
    total: Tensor = _SumOverProcesses.apply(values)
    return total


class Linear(nn.Sequential):
    """Batch normalisation and a 1x1 convolution: the linear probe of RADIO, DINOv2 and DINOv3.

    Args:
        channels: of all maps together.
        outputs: of the map that it returns.
        factor: how much finer the maps are made first, bilinearly (4 in DINOv2's depth).
    """

    def __init__(self, channels: int, outputs: int, factor: int = 1):
        last = nn.Conv2d(channels, outputs, 1)
        nn.init.normal_(last.weight, std=0.01)  # mmsegmentation's
        nn.init.zeros_(cast(Tensor, last.bias))
        super().__init__(BatchNorm(channels), last)
        self.factor = factor

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map ``[B, C, h, w]`` each to ``[B, K, factor h, factor w]``."""
        finer: Tensor = super().forward(_side_by_side(maps))
        # Interpolation may follow, since both layers work on single cells and are linear.
        return finer if self.factor == 1 else _resized(finer, self.factor)


class ConvProbe(nn.Sequential):
    """A 3x3 convolution, batch normalisation, GELU and a 1x1 convolution, as in MLoRE's program."""

    def __init__(self, channels: int, outputs: int):
        super().__init__(
            # A bias would be taken out again; Adam would drive it by the signs of rounding errors.
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            BatchNorm(channels),
            nn.GELU(),
            nn.Conv2d(channels, outputs, 1),
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map ``[B, C, h, w]`` each to ``[B, K, h, w]``."""
        output: Tensor = super().forward(_side_by_side(maps))
        return output


class Pyramid(nn.Module):
    """The head of Probe3D (arXiv 2404.08636): four layers, fused from deep to shallow, as in DPT.

    Args:
        channels: of each of the four maps.
        outputs: of the map that it returns.
        hidden: its width.
        as_published: nearest instead of bilinear upsampling, as in the program before November
            2025.
    """

    def __init__(
        self, channels: Sequence[int], outputs: int, hidden: int = 512, as_published: bool = False
    ):
        super().__init__()
        self.reduce = nn.ModuleList(nn.Conv2d(width, hidden, 1) for width in channels)
        self.skips = nn.ModuleList(_Residual(hidden) for _ in channels[1:])
        self.refine = nn.ModuleList(_Residual(hidden) for _ in channels)
        self.last = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, outputs, 3, padding=1),
        )
        self.as_published = as_published

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map ``[B, C, h, w]`` each to ``[B, K, 16 h, 16 w]``."""
        layers = [
            self._upsampled(reduce(layer), 2)
            for reduce, layer in zip(self.reduce, maps, strict=True)
        ]
        fused = self.refine[-1](layers.pop())
        for skip, refine in zip(reversed(self.skips), reversed(self.refine[:-1]), strict=True):
            fused = refine(skip(layers.pop()) + fused)
        return self._upsampled(self.last(self._upsampled(fused, 4)), 2)

    def _upsampled(self, maps: Tensor, factor: int) -> Tensor:
        if self.as_published:
            return F.interpolate(maps, scale_factor=factor, mode="nearest")
        return _resized(maps, factor, align_corners=True)


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
        )

    def forward(self, maps: Tensor) -> Tensor:
        refined: Tensor = self.layers(maps)
        return refined + maps


class DepthBins(nn.Module):
    """Depth that the bins of a head vote for; see :func:`.losses.depth_from_bins`.

    Args:
        head: returns one channel a bin.
        near: depth of the first bin, in metres.
        far: of the last.
    """

    def __init__(self, head: nn.Module, near: float, far: float):
        super().__init__()
        self.head, self.near, self.far = head, near, far

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return depth in metres, ``[B, 1, h, w]``."""
        return depth_from_bins(self.head(maps), self.near, self.far)


def _side_by_side(maps: Sequence[Tensor]) -> Tensor:
    """Return ``[B, sum of C, h, w]`` on the grid of the last map."""
    size = maps[-1].shape[-2:]
    same = [m if m.shape[-2:] == size else F.interpolate(m, size, mode="bilinear") for m in maps]
    return torch.cat(same, dim=1) if len(same) > 1 else same[0]


def _resized(maps: Tensor, factor: int, align_corners: bool = False) -> Tensor:
    return F.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=align_corners)
