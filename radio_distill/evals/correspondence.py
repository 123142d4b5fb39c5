"""Can one point be found again in another view by its feature alone?

Two benchmarks whose truth is geometry, not labels: images warped by known homographies, and
scikit-image's stereo pair with its measured disparity (Middlebury 2014, "Motorcycle").
Reported as Probe3D does (El Banani et al., 2024): recall, the share of points whose nearest
neighbour by cosine lies within a threshold of the true place. Features are sampled bilinearly at
points of the *image*, not at grid cells, so encoders of different patch size answer the same
questions.

Left out: Probe3D's ratio test, which keeps the surest matches of each encoder and so asks each one
something else; and its NAVI and ScanNet data, which must be downloaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot, prod
from typing import ClassVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ..config import size_pair
from ..data.folder import load_images
from ..errors import ConfigError
from ..geometry import homography, in_unit, inside, sample, transform, warp
from ..types import Report, Score, Size, unheard
from .demand import Demand, at_most
from .encoder import Encoder, to_pixels
from .examples import Show, shown_matches
from .protocol import file_names, protocol_of
from .shared import answers, scores_of

_STEREO_SIZE = (500, 741)
GREY = 0.5  # what a warped view shows beyond its image


@dataclass(frozen=True, slots=True)
class Correspondence:
    """Recall between an image and its warp by a random, seeded homography."""

    images: str
    size: int
    rotation: float = 30.0
    """Largest rotation, in degrees either way."""
    zoom: float = 1.4
    """Largest zoom, in or out."""
    perspective: float = 0.15
    """Largest shift of a corner, as a share of the side."""
    query_stride: int = 16
    """Pixels between the points that are looked for."""
    target_stride: int = 4
    """Pixels between the points they may be found at."""
    thresholds: tuple[float, ...] = (5, 10, 20)
    """In pixels of the view."""
    shares: tuple[float, ...] = (1, 2, 5)
    """Thresholds in % of the view's diagonal."""
    seed: int = 0

    name: ClassVar[str] = "correspondence"
    sources: ClassVar[dict[str, str]] = {"images": "images", "size": "dense_size"}

    def demand(self, parts: Mapping[str, int], limit: int | None = None) -> Demand:
        """Count the images and their warps."""
        images = at_most(parts["images"], limit)
        size = size_pair(self.size)
        strides = self.query_stride, self.target_stride
        points = [prod(side // stride for side in size) for stride in strides]
        return Demand(
            images=images, passes={size: 2 * images}, batch=2, products=images * prod(points)
        )

    def run(
        self,
        encoder: Encoder,
        limit: int | None = None,
        progress: Report = unheard,
        show: Show | None = None,
    ) -> list[Score]:
        """Match every image with its warp; all points of all images count alike."""
        size = size_pair(self.size)
        images = load_images(self.images, limit)
        generator = torch.Generator().manual_seed(self.seed)
        matrices = [
            random_homography(size, self.rotation, self.zoom, self.perspective, generator)
            for _ in images
        ]
        middle = self.thresholds[len(self.thresholds) // 2]

        def match(index: int, show: Show | None) -> Tensor:
            pixels = to_pixels(images[index][1], size)
            views = torch.stack([pixels, warped(pixels, matrices[index])])
            queries, truth, found = self._match(encoder, views, matrices[index])
            if show is not None:
                show(shown_matches([*views], [queries, truth, found], middle))
            return (found - truth).norm(dim=1)

        errors = answers(range(len(images)), match, progress, show)
        thresholds = self.thresholds, self.shares
        protocol = protocol_of(self, images=file_names(images.keys))
        return recalls(self.name, torch.cat(errors), size, *thresholds, len(images), protocol)

    def _match(
        self, encoder: Encoder, views: Tensor, matrix: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return points of an image, where they are in its warp, and where they are found."""
        size = (views.shape[2], views.shape[3])
        spatial = encoder(views).spatial
        queries = grid_points(size, self.query_stride)
        truth = transform(queries, matrix)
        shown = inside(truth, size)
        queries, truth = queries[shown], truth[shown]
        targets = grid_points(size, self.target_stride)
        nearest = nearest_neighbours(
            sample(spatial[0], queries, size), sample(spatial[1], targets, size)
        )
        return queries, truth, targets[nearest]


@dataclass(frozen=True, slots=True)
class Stereo:
    """Recall of disparity, each point looked for along its row of the other view."""

    stride: int = 8
    """Pixels between the points that are looked for."""
    thresholds: tuple[float, ...] = (5, 10, 20)
    """In pixels of the pair, 500 x 741."""
    shares: tuple[float, ...] = (1, 2)
    """Thresholds in % of the diagonal."""

    name: ClassVar[str] = "stereo"
    sources: ClassVar[dict[str, str]] = {}

    def demand(self, parts: Mapping[str, int], limit: int | None = None) -> Demand:
        """Count the pair's two views."""
        del parts, limit
        return Demand(images=2, passes={_STEREO_SIZE: 2}, batch=2)

    def run(
        self,
        encoder: Encoder,
        limit: int | None = None,
        progress: Report = unheard,
        show: Show | None = None,
    ) -> list[Score]:
        """Match the left view with the right; occluded points and points without truth are out.

        There is one pair, so ``limit`` changes nothing.
        """
        left, right, disparity = stereo_pair()
        size = (left.shape[1], left.shape[2])
        spatial = encoder(torch.stack([left, right])).spatial
        errors, matches = [], []
        rows = range(self.stride // 2, size[0], self.stride)
        visible = visible_in_right(disparity)
        for done, row in enumerate(rows, start=1):
            columns = torch.arange(self.stride // 2, size[1], self.stride)
            columns = columns[visible[row, columns]]
            every_column = torch.arange(size[1])
            nearest = nearest_neighbours(
                sample(spatial[0], _row_points(columns, row), size),
                sample(spatial[1], _row_points(every_column, row), size),
            )
            truth = columns - disparity[row, columns]
            errors.append((nearest - truth).abs())
            matches.append([_row_points(some, row) for some in (columns, truth, nearest)])
            progress(done, len(rows))
        if show is not None:
            points = [torch.cat(some) for some in zip(*matches, strict=True)]
            middle = self.thresholds[len(self.thresholds) // 2]
            show(shown_matches([left, right], points, middle))
        return recalls(self.name, torch.cat(errors), size, self.thresholds, self.shares, 1)


def stereo_pair() -> tuple[Tensor, Tensor, Tensor]:
    """Read scikit-image's pair: two views ``[3, H, W]``, disparity ``[H, W]``, inf if unknown."""
    try:
        from skimage.data import stereo_motorcycle
    except ImportError as error:
        raise ConfigError(
            "benchmark 'stereo' reads its images from scikit-image; "
            "pip install scikit-image, or take it out of evaluation.benchmarks"
        ) from error
    left, right, disparity = stereo_motorcycle()
    views = [
        rearrange(torch.from_numpy(np.array(view)), "h w c -> c h w") for view in (left, right)
    ]
    return views[0].float() / 255, views[1].float() / 255, torch.from_numpy(np.array(disparity))


def visible_in_right(disparity: Tensor) -> Tensor:
    """Say which pixels of the left view the right one shows too, ``[H, W]`` bool.

    A pixel is hidden where another one of its row, nearer by more than a pixel of disparity, lands
    on the same column.
    """
    known = disparity.isfinite()
    width = disparity.shape[1]
    column = torch.arange(width) - disparity.where(known, torch.zeros(()))
    landing = column.round().long()
    shown = known & (landing >= 0)
    nearest = torch.zeros_like(disparity).scatter_reduce(
        1, landing.clamp(0, width - 1), disparity.where(shown, torch.zeros(())), "amax"
    )
    return shown & (disparity >= nearest.gather(1, landing.clamp(0, width - 1)) - 1)


def recalls(
    benchmark: str,
    errors: Tensor,
    size: Size,
    thresholds: Sequence[float],
    shares: Sequence[float],
    num_samples: int,
    protocol: str = "",
) -> list[Score]:
    """Turn errors in pixels into recall at thresholds in pixels and in % of the diagonal.

    The middle one of the thresholds in pixels is the headline.
    """
    headline = f"recall@{thresholds[len(thresholds) // 2]:g}px"
    limits = {f"recall@{threshold:g}px": threshold for threshold in thresholds}
    limits |= {f"recall@{share:g}%": share / 100 * hypot(*size) for share in shares}
    found = {name: (errors <= limit).double().mean().item() for name, limit in limits.items()}
    return scores_of(benchmark, found, "Correspondence", num_samples, (headline,), protocol)


def random_homography(
    size: Size, rotation: float, zoom: float, perspective: float, generator: torch.Generator
) -> Tensor:
    """Draw a homography of pixel positions about the centre of ``size``, ``[3, 3]`` in float64.

    Rotation is uniform in degrees, zoom uniform in its logarithm, corners shift by up to
    ``perspective`` of the side. Positions are (x, y), 0 at the outer edge of the first pixel.
    """
    height, width = size
    draw = torch.rand(10, generator=generator, dtype=torch.float64) * 2 - 1
    angle = torch.deg2rad(draw[0] * rotation)
    scale = zoom ** draw[1]
    turn = scale * torch.stack(
        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
    )
    sides = torch.tensor([width, height], dtype=torch.float64)
    corners = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=torch.float64) * sides
    moved = (corners - sides / 2) @ turn.T + sides / 2 + draw[2:].view(4, 2) * perspective * sides
    return homography(corners, moved)


def warped(pixels: Tensor, matrix: Tensor) -> Tensor:
    """Show ``[3, H, W]`` as the homography moves it, at the same size, grey beyond its edges."""
    size = (pixels.shape[1], pixels.shape[2])
    origin = matrix.inverse()
    shown = warp(pixels[None], in_unit(origin, size)[None], size, padding="border")[0]
    known = inside(transform(grid_points(size, 1), origin), size)
    return shown.where(known.view(size), torch.tensor(GREY))


def grid_points(size: Size, stride: int) -> Tensor:
    """Return the centres of squares of ``stride`` pixels, (x, y), row by row, ``[N, 2]``."""
    y, x = (torch.arange(side // stride) * stride + stride / 2 for side in size)
    return torch.cartesian_prod(y, x).flip(1)


def nearest_neighbours(queries: Tensor, targets: Tensor) -> Tensor:
    """Return for each query ``[N, C]`` the index of the target ``[M, C]`` of largest cosine."""
    similarity = F.normalize(queries, dim=1) @ F.normalize(targets, dim=1).T
    return similarity.argmax(dim=1).cpu()


def _row_points(columns: Tensor, row: int) -> Tensor:
    return torch.stack([columns + 0.5, torch.full_like(columns, row) + 0.5], dim=1)
