"""Deep image prior: a convolutional network, fitted to one map, that gives a finer one.

Ulyanov et al. (arXiv 1711.10925), whose super-resolution FeatUp (arXiv 2403.10516, Table 1) brings
to features. An hourglass makes a fine map of fixed noise; it is right where, pooled, it is what the
teacher says of the image. What makes it better than any other map of which that holds is that such
networks draw what is smooth and repeats itself first. It sees neither image nor views.

FeatUp does not print its settings; the steps, rate and noise here are the method's own for 4x.
Channels are compressed as in :mod:`.implicit`. The norms are those of one image, as in the method,
whose batch is one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from radio_distill.config.fields import Positive, Weight
from radio_distill.errors import DataError
from radio_distill.protocols import Teacher
from radio_distill.system.precision import AUTO, autocast
from radio_distill.system.progress import Progress
from radio_distill.types import Features, Size

from .fit.downsamplers import build_downsampler
from .implicit import Compression, descend
from .methods import tiling

WIDTH, SKIP_WIDTH, NOISE_CHANNELS = 128, 4, 32
SCALES = 5
LEARNING_RATE = 0.01
NOISE = 0.1
"""The input is drawn evenly from 0 to this."""


@dataclass(frozen=True)
class DeepImagePrior:
    """Deep image prior (arXiv 1711.10925), fitted to each map: for `radio-distill upsample`."""

    factor: int
    steps: Positive = 2000
    """Updates; the method has twice as many at 8x."""
    jitter: Weight = 0.03
    """Deviation of what is added to the noise in each step; 0.05 at 8x."""
    downsampler: Literal["average", "attention", "simple"] = "average"
    """How the teacher pools the map: ``average``, or fitted with it, ``attention``, ``simple``."""
    seed: int = 0
    """Of noise and first weights."""

    def __call__(self, teacher: Teacher, pixels: Tensor, grid: Size) -> Features:
        """Return features with spatial ``[B, C, *grid]``; ConfigError for a grid that cannot be."""
        low = tiling.encode_low(teacher, pixels, grid, self.factor, 0)
        return Features(low.summary, torch.stack([self.fit(spatial) for spatial in low.spatial]))

    def cost(self, grid: Size) -> int:
        """Return the teacher images of one image: itself."""
        return 1

    def fit(self, spatial: Tensor) -> Tensor:
        """Fit to one map ``[C, h, w]`` and return ``[C, h * factor, w * factor]``.

        Raises:
            DataError: features that are not finite.
            DivergedError: a loss that is not finite.
        """
        if not spatial.isfinite().all():
            raise DataError("the teacher's features are not finite; compute it in float32")
        compression = Compression.fit(spatial[None])
        target = compression.compress(spatial[None]).float()
        with torch.random.fork_rng(devices=[spatial.device] if spatial.is_cuda else []):
            torch.manual_seed(self.seed)
            with Progress("fit deep image prior", self.steps, "steps") as bar:
                fine = self._optimise(target, bar.update)
        tokens = compression.expand(rearrange(fine, "1 k h w -> (h w) k"))
        return rearrange(tokens, "(h w) c -> c h w", h=fine.shape[2])

    def _optimise(self, target: Tensor, report: Callable[[int, str], None]) -> Tensor:
        """Return the fine map ``[1, K, h * factor, w * factor]`` of ``target [1, K, h, w]``."""
        _, components, height, width = target.shape
        size = (height * self.factor, width * self.factor)
        network = Hourglass(components, size).to(target.device)
        pool: nn.Module = nn.AvgPool2d(self.factor)
        if self.downsampler != "average":
            kernel_size = round(29 / 16 * self.factor)  # as the implicit fit
            pool = build_downsampler(self.downsampler, components, self.factor, kernel_size)
        trained = nn.ModuleList([network, pool.to(target.device)])
        noise = torch.rand(1, NOISE_CHANNELS, *size, device=target.device) * NOISE
        optimizer = torch.optim.Adam(trained.parameters(), lr=LEARNING_RATE)

        def loss_of_noise() -> Tensor:
            with autocast(AUTO, target.device):
                fine = network(noise + self.jitter * torch.randn_like(noise)).float()
                return F.mse_loss(pool(fine), target)

        descend("a deep image prior", loss_of_noise, optimizer, self.steps, report)
        with torch.no_grad(), autocast(AUTO, target.device):
            return network(noise).float()


class Hourglass(nn.Module):
    """Noise ``[1, 32, *size]`` to a map ``[1, K, *size]``, down by halves and up again.

    Of five scales those are left out whose map would have less than two cells a side.
    """

    def __init__(self, components: int, size: Size):
        super().__init__()
        scales = min(SCALES, max(0, min(size).bit_length() - 2))
        widths = [NOISE_CHANNELS, *(WIDTH,) * scales]
        self.skips = nn.ModuleList(_convolution(ins, SKIP_WIDTH, 1) for ins in widths[:-1])
        self.downs = nn.ModuleList(
            nn.Sequential(_convolution(ins, WIDTH, 3, stride=2), _convolution(WIDTH, WIDTH, 3))
            for ins in widths[:-1]
        )
        self.ups = nn.ModuleList(
            nn.Sequential(
                nn.InstanceNorm2d(WIDTH + SKIP_WIDTH, affine=True),
                _convolution(WIDTH + SKIP_WIDTH, WIDTH, 3),
                _convolution(WIDTH, WIDTH, 1),
            )
            for _ in range(scales)
        )
        self.last = nn.Conv2d(widths[-1], components, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``[1, K, H, W]`` of ``[1, 32, H, W]``."""
        kept = []
        for skip, down in zip(self.skips, self.downs, strict=True):
            kept.append(skip(maps))
            maps = down(maps)
        for up in self.ups:
            beside = kept.pop()
            finer = F.interpolate(maps, beside.shape[2:], mode="bilinear", align_corners=False)
            maps = up(torch.cat([beside, finer], dim=1))
        out: Tensor = self.last(maps)
        return out


def _convolution(channels: int, width: int, side: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, side, stride, side // 2, padding_mode="reflect"),
        nn.InstanceNorm2d(width, affine=True),
        nn.LeakyReLU(0.2),
    )
