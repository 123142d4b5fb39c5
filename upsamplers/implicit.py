"""Implicit FeatUp: a small network, fitted to one image, that gives its features at any point.

FeatUp (arXiv 2403.10516, section 3.2 and Table 7). The network sees where a point is and which
colour it has, and is right where every random view of its map, downsampled, is what the teacher
says of that view. It takes thousands of steps an image: the paper's ceiling of quality, for
images and comparison, not for the training loop.

Where the released code differs from the paper, this is the paper's:

=======================  ===================  ==================================
                         paper, here          released code
=======================  ===================  ==================================
steps                    2000                 1200
dropout                  0.1                  0.2, of whole channels
phases of the waves      none                 learned
colour beside its waves  no                   yes
terms of the loss        likelihood, TV 0.05  and magnitude 0.001, blur pin 0.1
=======================  ===================  ==================================

The paper does not say how many views are encoded beforehand; 3000 is the code's number. It names
no frequencies either, and the code's, e^-2 to e^10, are far above what the points of a map can
show: at any other resolution than the fitted one they drew a grid over the features. Here the waves
of position end where two fitted points make a period, those of colour at 15 of 255 levels a period,
which lost no fidelity. Three more things are this project's: features are brought to unit variance
by one number, so that the weight of the TV means the same for every teacher; cells beyond the
image's edge do not count; and the map may be fitted at fewer points than one a pixel.

:class:`Parts` has what the paper's Table 5 and Figure 9 leave out.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from radio_distill.config.fields import Positive, Weight
from radio_distill.distill.views import resize
from radio_distill.errors import ConfigError, DataError, DivergedError
from radio_distill.geometry import valid_mask, warp
from radio_distill.normalize.affine import mean_variance
from radio_distill.normalize.statistics import Moments
from radio_distill.protocols import Teacher
from radio_distill.system.precision import AUTO, autocast
from radio_distill.system.progress import Progress
from radio_distill.types import Features, Size

from .fit.downsamplers import build_downsampler
from .fit.losses import UncertaintyNet, masked_mse, total_variation
from .fit.views import ViewRange, draw_homographies, render
from .methods import tiling

logger = logging.getLogger(__name__)

VIEW_RANGE = ViewRange(scale=(1.0, 1.8), scale_chance=0.5, shift=30 / 224, flip=0.5)
"""Table 7: 30 of 224 pixels of padding, zoom up to 1.8; the rest as for FeatUp's other form."""
COMPONENTS = 128
NUM_FREQUENCIES = 30
LOWEST_FREQUENCY = math.exp(-2)
LEARNING_RATE = 1e-3
VIEWS_PER_STEP = 10
_VIEWS_PER_CALL = 64
_POINTS_PER_CALL = 1 << 16


@dataclass(frozen=True)
class Compression:
    """Principal components of a teacher's features, at a common scale."""

    mean: Tensor
    """``[C]``."""
    axes: Tensor
    """``[C, K]``, orthonormal."""
    scale: float
    """Brings the mean variance of the C channels to 1."""

    @classmethod
    def fit(cls, spatial: Tensor) -> "Compression":
        """Take the 128 (or C) largest components of ``[B, C, h, w]``; DataError if not finite."""
        moments = Moments(spatial.shape[1])
        moments.update(spatial.cpu())
        scale = float(mean_variance(moments).rsqrt())
        values, vectors = torch.linalg.eigh(moments.covariance)
        kept, axes = values[-COMPONENTS:], vectors[:, -COMPONENTS:]
        share = 100 * float(kept.sum() / values.sum())
        logger.info("%d components hold %.1f %% of the variance", len(kept), share)
        return cls(moments.mean.to(spatial), axes.to(spatial), scale)

    def compress(self, spatial: Tensor) -> Tensor:
        """Bring ``[B, C, h, w]`` to ``[B, K, h, w]``."""
        tokens = rearrange(spatial, "b c h w -> b h w c") - self.mean
        return rearrange(tokens @ self.axes * self.scale, "b h w k -> b k h w")

    def expand(self, tokens: Tensor) -> Tensor:
        """Bring ``[N, K]`` back to ``[N, C]``."""
        return tokens @ self.axes.T / self.scale + self.mean


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a fit consists of."""

    buffer: bool = False
    """Fit a free map, from a normal start, that is interpolated elsewhere: no network."""
    colours: bool = True
    """Whether the network knows the colour of a point, or its place alone."""
    uncertainty: bool = True
    """Whether cells that views cannot agree on count less, as a small net predicts."""
    downsampler: Literal["attention", "featup", "simple"] = "attention"
    """How the teacher pools the map, as ``fit.downsampler``."""
    total_variation: Weight = 0.05
    """Weight of the total variation of the features' magnitudes."""


@dataclass(frozen=True)
class ImplicitFeatures:
    """The features of one image at every resolution."""

    image: Tensor
    """``[1, 3, H, W]`` RGB in [0, 1]."""
    network: "_Network | _Buffer"
    """What it knows of N points to ``[N, K]``."""
    downsampler: nn.Module
    """The learned downsampler: how the teacher pools the map."""
    compression: Compression
    fitted: Size
    """Points of the map that it was fitted at; their distance is the shortest half wave."""

    @torch.no_grad()
    def render(self, grid: Size) -> Tensor:
        """Return ``[C, *grid]`` in the teacher's own space, at the centres of the grid's cells."""
        points = self.network.points(self.image, grid, self.fitted).split(_POINTS_PER_CALL)
        tokens = torch.cat([self.compression.expand(self.network(part)) for part in points])
        return rearrange(tokens, "(h w) c -> c h w", h=grid[0])

    @torch.no_grad()
    def predict(self, homographies: Tensor) -> Tensor:
        """Predict the teacher's maps ``[V, C, h, w]`` of views ``[V, 3, 3]`` of the image."""
        points = self.network.points(self.image, self.fitted, self.fitted)
        maps = pooled_views(self.network(points), self.downsampler, homographies, self.fitted)
        tokens = self.compression.expand(rearrange(maps, "v k h w -> (v h w) k"))
        return rearrange(tokens, "(v h w) c -> v c h w", v=len(maps), h=maps.shape[2])


def fit_implicit(
    teacher: Teacher,
    image: Tensor,
    size: Size,
    factor: int | None = None,
    steps: int = 2000,
    views: int = 3000,
    seed: int = 0,
    progress: bool = True,
    parts: Parts = Parts(),
) -> ImplicitFeatures:
    """Fit an implicit map to one image, on the device that the teacher answers on.

    Every view is encoded once, beforehand, and kept in 128 half-precision numbers a cell: 200 MB
    for 3000 views of 16 x 16 cells. Of these, each step compares 10.

    Args:
        teacher: the frozen encoder.
        image: ``[3, H, W]`` or ``[1, 3, H, W]`` RGB in [0, 1], of any size, brought to ``size``.
        size: what the teacher is shown, (height, width) in pixels.
        factor: points a side of a cell in the fitted map; None for the patch size, one a pixel.
        steps: updates.
        views: how many random views of the image to encode.
        seed: of views, first weights and dropout.
        progress: show progress bars.
        parts: what the fit consists of.

    Raises:
        ConfigError: an argument that cannot be, or a size that the teacher cannot take.
        DataError: an image or features that are not finite.
        DivergedError: a loss that is not finite.
    """
    factor = teacher.spec.patch_size if factor is None else factor
    image = _checked(image, factor=factor, steps=steps, views=views)
    draw = np.random.Generator(np.random.Philox(key=[seed, 0]))
    homographies = draw_homographies(views, VIEW_RANGE, draw, size[1] / size[0])
    targets, compression = encode_views(teacher, image, homographies, size, progress)
    image, homographies = image.to(targets.device), homographies.to(targets.device)
    devices = [targets.device] if targets.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        fit = _Fit(targets.shape[1:], factor, parts).to(targets.device)
        with Progress("fit implicit map", steps, "steps", visible=progress) as bar:
            _optimise(fit, image, targets, homographies, steps, draw, bar.update)
    fit.eval()
    return ImplicitFeatures(image, fit.network, fit.downsampler, compression, fit.size)


@dataclass(frozen=True)
class Implicit(Parts):
    """FeatUp's implicit network, fitted to each image anew: for `radio-distill upsample`."""

    factor: int
    steps: Positive = 2000
    """Updates."""
    views: Positive = 3000
    """Random views of the image that the teacher is asked about."""
    seed: int = 0
    """Of views, first weights and dropout."""

    def __call__(self, teacher: Teacher, pixels: Tensor, grid: Size) -> Features:
        """Return features with spatial ``[B, C, *grid]``; ConfigError for a grid that cannot be."""
        size = tiling.low_resolution(teacher, grid, self.factor)
        low = tiling.encode_low(teacher, pixels, grid, self.factor, 0)
        numbers = (self.factor, self.steps, self.views, self.seed)
        fits = (fit_implicit(teacher, image, size, *numbers, parts=self) for image in pixels)
        return Features(low.summary, torch.stack([fit.render(grid) for fit in fits]))

    def cost(self, grid: Size) -> int:
        """Return the teacher images of one image: itself, and its views."""
        return 1 + self.views


def fourier_features(image: Tensor, grid: Size, fitted: Size, colours: bool = True) -> Tensor:
    """Return what the network knows of the points of a grid: ``[h * w, 5 * 30 * 2]``, row by row.

    Sines and cosines (eq. 7) of row and column, with edges at -1 and 1, and of colour, each
    channel's range in the image brought to -1..1. Frequencies rise in equal ratios to what the
    points of the ``fitted`` grid can show, and for colours to e^4.

    Args:
        image: ``[1, 3, H, W]``.
        grid: where to look.
        fitted: the grid that a map was, or will be, fitted at.
        colours: without them it knows row and column alone, ``[h * w, 2 * 30 * 2]``.
    """
    channels = rearrange(image, "1 c h w -> c 1 (h w)")
    low, high = channels.amin(-1, keepdim=True), channels.amax(-1, keepdim=True)
    seen = rearrange(resize(image, grid), "1 c h w -> c h w")
    seen = 2 * (seen - low) / (high - low).clamp_min(1 / 255) - 1
    known = torch.cat([_places(grid, image.device), seen])[: 5 if colours else 2]
    values = rearrange(known, "c h w -> (h w) c 1")
    highest = torch.tensor([*(math.pi * num / 2 for num in fitted), *3 * (math.exp(4),)])
    steps = torch.linspace(0, 1, NUM_FREQUENCIES)
    frequencies = LOWEST_FREQUENCY * (highest[:, None] / LOWEST_FREQUENCY) ** steps  # [5, 30]
    waves = (values * frequencies[: len(known)].to(values)).flatten(1)  # [N, 150]
    return torch.cat([waves.sin(), waves.cos()], dim=1)


def _places(grid: Size, device: torch.device) -> Tensor:
    """Return row and column of a grid's centres ``[2, h, w]``, the image's edges at -1 and 1."""
    axes = [(2 * torch.arange(num, device=device) + 1) / num - 1 for num in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def encode_views(
    teacher: Teacher, image: Tensor, homographies: Tensor, size: Size, progress: bool = False
) -> tuple[Tensor, Compression]:
    """Encode views of ``[1, 3, H, W]``, 64 a call: ``[V, K, h, w]`` half-precision, compressed.

    The components are those of the first call. Raises DataError for features that are not finite.
    """
    maps: list[Tensor] = []
    compression = None
    with Progress("encode views", len(homographies), "img", visible=progress) as bar:
        for part in homographies.split(_VIEWS_PER_CALL):
            spatial = teacher.encode(render(image, part.to(image.device), size)).spatial
            if not spatial.isfinite().all():
                raise DataError(
                    "the teacher's features of a view are not finite; compute the teacher in "
                    "float32 (teachers.NAME.dtype)"
                )
            compression = compression or Compression.fit(spatial)
            maps.append(compression.compress(spatial).half())
            bar.update(sum(map(len, maps)))
    assert compression is not None, "no views"
    return torch.cat(maps), compression


def pooled_views(
    tokens: Tensor, downsampler: nn.Module, homographies: Tensor, size: Size
) -> Tensor:
    """See a fine map, ``[h * w, K]`` of ``size``, in views, pooled: ``[V, K, h / u, w / u]``.

    The downsampler weighs points by their features and their magnitude, its first channel.
    """
    fine = rearrange(tokens.float(), "(h w) k -> 1 k h w", h=size[0])
    both = torch.cat([fine.norm(dim=1, keepdim=True), fine], dim=1)
    pooled: Tensor = downsampler(warp(both, homographies, size))
    return pooled[:, 1:]


class _Network(nn.Sequential):
    """Fourier features of points to ``[N, K]``."""

    def __init__(self, components: int, colours: bool):
        inputs = (5 if colours else 2) * NUM_FREQUENCIES * 2
        super().__init__(
            *(nn.LayerNorm(inputs), nn.Dropout(0.1), nn.Linear(inputs, COMPONENTS), nn.ReLU()),
            *(nn.LayerNorm(COMPONENTS), nn.Dropout(0.1), nn.Linear(COMPONENTS, COMPONENTS)),
            *(nn.ReLU(), nn.Linear(COMPONENTS, components)),
        )
        self.colours = colours

    def points(self, image: Tensor, grid: Size, fitted: Size) -> Tensor:
        """Return what ``forward`` takes of the points of a grid, row by row."""
        return fourier_features(image, grid, fitted, self.colours)


class _Buffer(nn.Module):
    """A free map in the place of the network, interpolated bilinearly between its points."""

    def __init__(self, components: int, fitted: Size):
        super().__init__()
        self.map = nn.Parameter(torch.randn(1, components, *fitted))

    def points(self, image: Tensor, grid: Size, fitted: Size) -> Tensor:
        """Return what ``forward`` takes of the points of a grid, row by row: ``[N, 2]``."""
        return rearrange(_places(grid, image.device), "c h w -> (h w) c")

    def forward(self, points: Tensor) -> Tensor:
        """Return ``[N, K]``."""
        places = rearrange(points.flip(1), "n c -> 1 n 1 c")  # grid_sample has columns first
        found = F.grid_sample(self.map, places, padding_mode="border", align_corners=False)
        return rearrange(found, "1 k n 1 -> n k")


class _Fit(nn.Module):
    """Everything that is trained, for targets ``[K, h, w]``."""

    def __init__(self, shape: Sequence[int], factor: int, parts: Parts):
        super().__init__()
        components, height, width = shape
        self.size = (height * factor, width * factor)
        self.total_variation = parts.total_variation
        self.network: _Network | _Buffer
        if parts.buffer:
            self.network = _Buffer(components, self.size)
        else:
            self.network = _Network(components, parts.colours)
        kernel_size = round(29 / 16 * factor)  # Table 7: 29 for cells of 16 pixels
        self.downsampler = build_downsampler(parts.downsampler, components + 1, factor, kernel_size)
        self.uncertainty = UncertaintyNet(components) if parts.uncertainty else None

    def forward(
        self, points: Tensor, target: Tensor, homographies: Tensor, valid: Tensor
    ) -> Tensor:
        """Return the loss of views, FeatUp's eq. 1 and eq. 8."""
        tokens = self.network(points)
        prediction = pooled_views(tokens, self.downsampler, homographies, self.size)
        log_scale = torch.zeros_like(target[:, 0])
        if self.uncertainty is not None:
            log_scale = self.uncertainty(target)
        views = masked_mse(prediction, target, valid, log_scale).mean()
        magnitude = rearrange(tokens.float().norm(dim=1), "(h w) -> 1 1 h w", h=self.size[0])
        return views + self.total_variation * total_variation(magnitude, variant="featup").mean()


def _optimise(
    fit: _Fit,
    image: Tensor,
    targets: Tensor,
    homographies: Tensor,
    steps: int,
    draw: np.random.Generator,
    report: Callable[[int, str], None],
) -> None:
    grid = (targets.shape[-2], targets.shape[-1])
    valid = valid_mask(homographies, grid)  # [V, h, w]
    points = fit.network.points(image, fit.size, fit.size)
    optimizer = torch.optim.NAdam(fit.parameters(), lr=LEARNING_RATE)

    def loss_of_views() -> Tensor:
        chosen = torch.from_numpy(draw.integers(len(targets), size=VIEWS_PER_STEP))
        chosen = chosen.to(targets.device)
        with autocast(AUTO, targets.device):
            loss: Tensor = fit(points, targets[chosen].float(), homographies[chosen], valid[chosen])
        return loss

    descend("an implicit fit", loss_of_views, optimizer, steps, report)


def descend(
    fit: str,
    loss_of_step: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    report: Callable[[int, str], None],
) -> None:
    """Take ``steps`` down a loss; raises DivergedError, naming ``fit``, where it is not finite."""
    for step in range(steps):
        loss = loss_of_step()
        value = loss.item()
        if not math.isfinite(value):
            raise DivergedError(f"the loss of {fit} is {value} at step {step + 1}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step + 1, f"loss {value:.4f}")


def _checked(image: Tensor, **numbers: int) -> Tensor:
    """Return the image as ``[1, 3, H, W]``; raises for what cannot be fitted."""
    if image.ndim == 3:
        image = image[None]
    if image.ndim != 4 or image.shape[:2] != (1, 3):
        raise ConfigError(f"an implicit map is of one image [3, H, W], not {[*image.shape]}")
    if not image.isfinite().all():
        raise DataError("the image holds values that are not finite; read it again")
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{name} of an implicit fit is {value}; it must be at least 1")
    return image
