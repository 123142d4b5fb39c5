"""Losses of a fit: views that must agree, and two priors on fine maps.

The main loss is the squared error between a view of the upsampled map, brought back to the
teacher's grid, and the teacher's features of that view (FeatUp, arXiv 2403.10516, eq. 1). Total
variation and the conditional random field are priors on the fine map itself; FeatSharp (arXiv
2502.16025, appendix B.2) only reports them. Every loss keeps the images apart, ``[B]``, and is
computed in float32 (float64 stays), also under autocast. FeatUp's entropy of the downsampler's
kernel is left out: no preset gives it weight.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from radio_distill.distill.views import resize
from radio_distill.types import IMAGENET_STD

Variant = Literal["featup", "featsharp"]

LEAST_SCALE = 1e-4
"""Smallest standard deviation that :class:`UncertaintyNet` predicts; FeatUp's."""


def masked_mse(
    prediction: Tensor,
    target: Tensor,
    valid: Tensor | None = None,
    log_scale: Tensor | None = None,
) -> Tensor:
    """Return the squared error of ``[B, C, h, w]``, averaged over C and the valid cells: ``[B]``.

    With ``log_scale`` it is the negative log-likelihood, per channel and without its constant, of a
    normal distribution whose standard deviation is s in all channels of a cell:
    ``mse / (2 s^2) + log s``, least where s^2 is the mean squared error. It is FeatUp's eq. 1;
    FeatSharp's release has ``exp(-u) mse + u / 2`` instead, least at twice that variance.

    Args:
        prediction: the view of the upsampled map, at the teacher's grid.
        target: the teacher's features of the view.
        valid: ``[B, h, w]``, bool, or weights of at least 0 (of tile seams, for instance). A cell
            of weight 0 gives neither loss nor gradient, whatever it holds; a view of nothing but
            such cells has loss 0.
        log_scale: log s, ``[B, h, w]``, from :class:`UncertaintyNet`.
    """
    difference = _precise(prediction) - _precise(target)
    if valid is not None:  # before squaring: the gradient of a masked square of NaN is NaN
        difference = difference.masked_fill(rearrange(valid == 0, "b h w -> b 1 h w"), 0)
    values = difference.square().mean(dim=1)  # [B, h, w]
    if log_scale is not None:
        log_scale = _precise(log_scale)
        values = 0.5 * values * torch.exp(-2 * log_scale) + log_scale
    if valid is None:
        return reduce(values, "b h w -> b", "mean")
    weights = valid.to(values)
    values = values.masked_fill(valid == 0, 0) * weights
    least = torch.finfo(values.dtype).tiny
    return reduce(values, "b h w -> b", "sum") / reduce(weights, "b h w -> b", "sum").clamp(least)


class UncertaintyNet(nn.Module):
    """Predicts how far a cell can be relied on, linearly from the teacher's features of the view.

    It starts at s = 1, the spread of a normalised teacher's features.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.linear = nn.Conv2d(channels, 1, kernel_size=1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """Return log s, ``[B, h, w]``, of ``[B, C, h, w]``."""
        return _precise(self.linear(features)[:, 0]).clamp(min=math.log(LEAST_SCALE))


def total_variation(
    maps: Tensor, valid: Tensor | None = None, variant: Variant = "featsharp"
) -> Tensor:
    """Return how much neighbouring cells of ``[B, C, h, w]`` differ: ``[B]``.

    ``featsharp`` is the mean smooth L1 (Huber, beta 1) over vertical neighbours plus that over
    horizontal ones. ``featup`` is the sum of squared differences divided by C * h * w; its paper
    (eq. 8) applies it to the features' magnitudes, ``maps.norm(dim=1, keepdim=True)``.

    Args:
        maps: the upsampled map; at least 2 x 2 cells.
        valid: ``[B, h, w]`` bool; a pair counts where both cells do. For ``featup`` the divisor is
            C times the number of valid cells.
        variant: which of the two published forms.
    """
    sums, pairs = variation_sums(maps, valid, variant)
    if variant == "featsharp":
        return (sums / pairs.clamp(min=1)).sum(dim=1)
    cells = maps[:, 0].numel() / len(maps) if valid is None else valid.flatten(1).sum(1).clamp(1)
    return sums.sum(dim=1) / cells


def variation_sums(
    maps: Tensor, valid: Tensor | None = None, variant: Variant = "featsharp"
) -> tuple[Tensor, Tensor]:
    """Return the differences of vertical and horizontal neighbours: sums and numbers, ``[B, 2]``.

    A difference is averaged over channels; arguments are those of :func:`total_variation`.
    """
    maps = _precise(maps)
    if valid is None:
        valid = torch.ones_like(maps[:, 0], dtype=torch.bool)
    else:
        maps = maps.masked_fill(rearrange(~valid, "b h w -> b 1 h w"), 0)
    sums, pairs = [], []
    for axis in (2, 3):  # vertical neighbours, then horizontal ones
        length = maps.shape[axis] - 1
        ahead, behind = maps.narrow(axis, 1, length), maps.narrow(axis, 0, length)
        both = valid.narrow(axis - 1, 1, length) & valid.narrow(axis - 1, 0, length)
        if variant == "featup":
            values = (ahead - behind).square()
        else:
            values = F.smooth_l1_loss(ahead, behind, reduction="none")
        sums.append((values.mean(dim=1) * both).sum(dim=(1, 2)))
        pairs.append(both.sum(dim=(1, 2)))
    return torch.stack(sums, dim=1), torch.stack(pairs, dim=1)


def conditional_random_field(
    features: Tensor,
    guidance: Tensor,
    variant: Variant = "featsharp",
    points: int = 1000,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return how much features differ where nearby pixels look alike: ``[B]``.

    Pairs of ``points`` pixels, the same in all images, stand for all pairs; a map of no more
    pixels than that is taken whole. See :func:`pair_energy` for the two forms.

    Args:
        features: ``[B, C, H, W]``.
        guidance: ``[B, 3, *, *]`` RGB in [0, 1], brought to H x W.
        variant: which of the two published forms.
        points: pixels that are drawn; memory grows with their square.
        generator: of the draw; without one, torch's global generator draws.
    """
    height, width = features.shape[-2:]
    guidance = resize(_precise(guidance), (height, width)).to(features.device)
    if height * width > points:
        device = "cpu" if generator is None else generator.device
        chosen = torch.randint(height * width, (points,), generator=generator, device=device)
    else:
        chosen = torch.arange(height * width)
    chosen = chosen.to(features.device)
    rows, columns = chosen // width, chosen % width
    position = torch.stack([rows / height, columns / width])  # [2, n]
    return pair_energy(
        features[:, :, rows, columns], guidance[:, :, rows, columns], position, variant
    )


def pair_energy(features: Tensor, colour: Tensor, position: Tensor, variant: Variant) -> Tensor:
    """Return the mean over pairs of points of affinity times squared distance: ``[B]``.

    The affinity is ``exp(-p / 0.2 - c / 0.3)``, where p is the squared distance of positions and c
    that of colours in ImageNet's standard deviations, in which FeatUp's images are. ``featsharp``
    averages the squared distance of features over channels. ``featup`` sums it, and its affinity is
    10 times the above plus ``3 exp(-p / 0.01)``; it is meant for maps of few channels
    (:func:`project`). In which units FeatSharp's colours are is not published, so values compare
    among upsamplers here, not with its tables.

    Args:
        features: ``[B, C, n]``.
        colour: ``[B, 3, n]`` RGB in [0, 1].
        position: ``[2, n]``, row and column as shares of height and width.
        variant: which of the two published forms.
    """
    features = _precise(features)
    features = features - features.mean(dim=2, keepdim=True)  # the energy loses fewer digits
    colour = _precise(colour) / colour.new_tensor(IMAGENET_STD)[:, None]
    apart = _squared_distances(position.to(colour)[None])  # [1, n, n]
    affinity = torch.exp(-apart / 0.2 - _squared_distances(colour) / 0.3)  # [B, n, n]
    if variant == "featup":
        affinity = 10 * affinity + 3 * torch.exp(-apart / 0.01)
    affinity = affinity.to(features)
    # sum_ij a_ij |f_i - f_j|^2 = 2 sum_i a_i. |f_i|^2 - 2 sum_ij a_ij f_i.f_j, which needs no
    # difference of every pair. Autocast would round the products of the second term.
    with torch.autocast(features.device.type, enabled=False):
        smooth = features @ affinity  # [B, C, n]
    energy = features * (affinity.sum(dim=1, keepdim=True) * features - smooth)
    values = 2 * (energy.sum(dim=1) if variant == "featup" else energy.mean(dim=1))  # [B, n]
    return values.mean(dim=1) / values.shape[1]


def project(features: Tensor, dims: int, generator: torch.Generator | None = None) -> Tensor:
    """Project ``[B, C, h, w]`` on random orthonormal directions: ``[B, min(dims, C), h, w]``.

    Projected differences keep their mean square over channels, in expectation. (FeatUp's 30
    directions are of length 1 but not orthogonal, and others in each image.)
    """
    device = "cpu" if generator is None else generator.device
    shape = (features.shape[1], min(dims, features.shape[1]))
    directions = torch.linalg.qr(torch.randn(shape, generator=generator, device=device)).Q
    return einsum(features, directions.to(features), "b c h w, c k -> b k h w")


def _squared_distances(points: Tensor) -> Tensor:
    """Return those among the points of ``[B, K, n]`` for a small K: ``[B, n, n]``."""
    differences = rearrange(points, "b k n -> b k n 1") - rearrange(points, "b k n -> b k 1 n")
    return differences.square().sum(dim=1)


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
