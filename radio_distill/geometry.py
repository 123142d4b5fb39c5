"""Homographies, and images and feature maps seen through them.

Points are (x, y) with the *edges* of an image at -1 and 1, so one matrix serves an image, its
feature map and the map upsampled by any factor, whatever their sizes: nothing is misregistered.
(On cell centres, ``align_corners=True``, translations would shrink by ``(W - 1) / W`` between maps
of different width.) :func:`in_unit` brings a homography of pixel positions there.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .errors import ConfigError
from .types import Size


def homography(source: Tensor, target: Tensor) -> Tensor:
    """Return the homography that takes four points ``[4, 2]`` to four others, ``[3, 3]``."""
    x, y = source.unbind(dim=1)
    u, v = target.unbind(dim=1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    for_u = torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y], dim=1)
    for_v = torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y], dim=1)
    solution = torch.linalg.solve(torch.cat([for_u, for_v]), torch.cat([u, v]))
    return torch.cat([solution, solution.new_ones(1)]).view(3, 3)


def transform(points: Tensor, matrix: Tensor) -> Tensor:
    """Apply a homography to points ``[N, 2]``."""
    mapped = F.pad(points.double(), (0, 1), value=1.0) @ matrix.T
    return (mapped[:, :2] / mapped[:, 2:]).float()


def in_unit(matrix: Tensor, size: Size) -> Tensor:
    """Return a homography ``[3, 3]`` of pixels of an image of ``size``, edges at -1 and 1.

    Pixel positions are (x, y) too, 0 at the outer edge of the first pixel.
    """
    height, width = size
    scale = torch.tensor([[2 / width, 0, -1], [0, 2 / height, -1], [0, 0, 1]]).to(matrix)
    return scale @ matrix @ scale.inverse()


def warp(
    maps: Tensor,
    homographies: Tensor,
    size: Size,
    mode: str = "bilinear",
    padding: str = "reflection",
) -> Tensor:
    """Sample views ``[B * V, C, *size]`` of maps ``[B, C, H, W]``, at the centres of their cells.

    For features: differentiable in ``maps``, and without a copy of a map for each of its views.
    Samples in fp32 under autocast too, and raises ConfigError where views and maps do not go
    together.

    Args:
        maps: ``[B, C, H, W]``.
        homographies: ``[B * V, 3, 3]``, the V views of a map one after the other.
        size: height and width of each view, in cells.
        mode: as of ``torch.nn.functional.grid_sample``.
        padding: what is shown outside the map, as of the same function.
    """
    if len(homographies) % len(maps):
        raise ConfigError(
            f"{len(homographies)} homographies for {len(maps)} maps; give each map as many views"
        )
    maps = maps if maps.dtype == torch.float64 else maps.float()
    exact = homographies.to(maps.device, torch.promote_types(homographies.dtype, maps.dtype))
    points = _points(exact, _centres(size[0]), _centres(size[1])).to(maps)
    # The views of a map are stacked into one tall view, so that they share the map.
    points = rearrange(points, "(b v) h w xy -> b (v h) w xy", b=len(maps))
    with torch.autocast(maps.device.type, enabled=False):
        views = F.grid_sample(maps, points, mode, padding_mode=padding, align_corners=False)
    views = rearrange(views, "b c (v h) w -> (b v) h w c", h=size[0])  # one copy: channels last
    return rearrange(views, "n h w c -> n c h w")


def valid_mask(homographies: Tensor, size: Size) -> Tensor:
    """Return bool ``[N, *size]``: the cells of a view that lie inside the image whole."""
    points = _points(homographies, _edges(size[0]), _edges(size[1]))
    corners = (points.abs().amax(-1) <= 1 + 1e-5).float()  # [N, h + 1, w + 1]; fp32 rounds at 1e-6
    return F.avg_pool2d(corners[:, None], 2, stride=1)[:, 0] == 1


def _points(homographies: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
    """Map the points of a view at rows ``ys`` and columns ``xs``: ``[N, len(ys), len(xs), 2]``."""
    x_part, y_part, constant = rearrange(homographies, "n i j -> j n 1 1 i")
    rows = y_part * rearrange(ys.to(homographies), "h -> h 1 1") + constant  # [N, h, 1, 3]
    points = x_part * rearrange(xs.to(homographies), "w -> w 1") + rows  # [N, h, w, 3]
    return points[..., :2] / points[..., 2:]


def _centres(num: int) -> Tensor:
    return (torch.arange(num, dtype=torch.float64) * 2 + 1) / num - 1


def _edges(num: int) -> Tensor:
    return torch.arange(num + 1, dtype=torch.float64) * 2 / num - 1


def inside(points: Tensor, size: Size) -> Tensor:
    """Say which pixel positions ``[N, 2]`` lie on an image of ``size``."""
    return ((points >= 0) & (points <= torch.tensor([size[1], size[0]]))).all(dim=1)


def sample(maps: Tensor, points: Tensor, size: Size) -> Tensor:
    """Interpolate ``[C, h, w]`` at pixel positions of an image of ``size``; ``[N, C]``."""
    position = points / torch.tensor([size[1], size[0]]) * 2 - 1
    grid = position[None, None].to(maps)
    values = F.grid_sample(maps[None], grid, padding_mode="border", align_corners=False)
    return rearrange(values, "1 c 1 n -> n c")
