"""Do matching features show the same point of space? Views with depth and pose know.

As Probe3D measures correspondence on NAVI (arXiv 2404.08636): features are brought to a fourth of
the image's size, every cell with depth looks for its nearest by cosine in the other view, the
1,000 matches that stand out most (:func:`.metrics.ratio_matches`) are kept, and a match is as wrong
as the two points are far apart in metres. Unlike in ``correspondence`` each encoder picks the
matches that it is judged by.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb, prod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ..data.folder import spread
from ..errors import DataError
from ..types import Report, Score, Size, unheard
from .augmentation import nearest
from .datasets.navi import Navi, NaviImage
from .datasets.redwood import Redwood, RgbdFrame
from .demand import Demand, at_most
from .depth_probes import object_in
from .encoder import Encoder, to_pixels
from .examples import Show, shown_matches
from .metrics.matching import ratio_matches
from .protocol import file_names, protocol_of
from .shared import answers, scores_of

ROTATIONS = (0, 30, 60, 90, 120)
"""Degrees that bound the classes of pairs."""


class View(NamedTuple):
    """An image, and where in space its cells lie."""

    pixels: Tensor
    """``[3, H, W]`` RGB in [0, 1]."""
    points: Tensor
    """``[3, h, w]`` metres in the camera's frame, z away from it; z is 0 where depth is unknown."""
    pose: Tensor
    """``[4, 4]`` from the frame that views share to the camera's."""
    focal: float
    """In pixels of ``pixels``."""


class _Errors(NamedTuple):
    """What is wrong with the matches of a pair."""

    metres: Tensor
    """``[K]``."""
    pixels: Tensor
    """``[K]``, in the second view."""
    rotation: float
    """Degrees between the two cameras."""


@dataclass(frozen=True, slots=True)
class PosedMatching(ABC):
    """Recall of matches within distances in space, pooled over pairs and matches."""

    data: str
    size: int = 512
    """Shorter side of the images, in pixels."""
    stride: int = 4
    """Pixels between the points that are matched."""
    most: int = 1000
    """Matches of a pair that are kept."""
    metres: tuple[float, ...] = (0.01, 0.02, 0.05)
    pixels: tuple[float, ...] = (5, 25, 50)
    seed: int = 8

    name: ClassVar[str]
    group: ClassVar[str]
    sources: ClassVar[dict[str, str]]

    @abstractmethod
    def pairs(self) -> Sequence[tuple[Any, Any]]:
        """List the pairs of images."""

    @abstractmethod
    def pairs_in(self, parts: Mapping[str, int]) -> tuple[int, Size]:
        """Return how many pairs a set with such parts has, and the size of their images."""

    @abstractmethod
    def view(self, image: Any) -> View:
        """Read an image of a pair."""

    def demand(self, parts: Mapping[str, int], limit: int | None = None) -> Demand:
        """Count the views of the pairs, and compare all of their cells."""
        known, size = self.pairs_in(parts)
        pairs, cells = at_most(known, limit), prod(side // self.stride for side in size)
        return Demand(images=2 * pairs, passes={size: 2 * pairs}, products=pairs * cells**2)

    def run(
        self,
        encoder: Encoder,
        limit: int | None = None,
        progress: Report = unheard,
        show: Show | None = None,
    ) -> list[Score]:
        """Match the pairs; ``limit`` thins them out."""
        pairs, near = spread(self.pairs(), limit), self.pixels[len(self.pixels) // 2]

        def match(pair: tuple[Any, Any], show: Show | None) -> _Errors:
            views = [self.view(image) for image in pair]
            errors, places = self._errors(encoder, *views)
            if show is not None:
                show(shown_matches([view.pixels for view in views], places, near))
            return errors

        errors = answers(pairs, match, progress, show)
        if not sum(len(error.metres) for error in errors):
            raise DataError(f"{self.name}: no pair of images has depth in both; nothing to match")
        metres, pixels = (
            torch.cat([getattr(error, name) for error in errors]) for name in ("metres", "pixels")
        )
        recalls = {f"recall@{100 * limit:g}cm": _share(metres, limit) for limit in self.metres}
        found = {"mean_recall": sum(recalls.values()) / len(recalls)} | recalls
        found |= {f"recall@{limit:g}px": _share(pixels, limit) for limit in self.pixels}
        middle = self.metres[len(self.metres) // 2]
        for low, high in pairwise(ROTATIONS):
            some = [error.metres for error in errors if low <= error.rotation < high]
            if some:
                found[f"recall@{100 * middle:g}cm/{low}-{high}°"] = _share(torch.cat(some), middle)
        names = file_names(item.image for pair in pairs for item in pair)
        protocol = protocol_of(self, images=names)
        return scores_of(self.name, found, self.group, len(pairs), ("mean_recall",), protocol)

    def _errors(
        self, encoder: Encoder, first: View, second: View
    ) -> tuple[_Errors, tuple[Tensor, Tensor, Tensor]]:
        """Match two views; return what is wrong, and (x, y) in pixels of the matches, ``[K, 2]``.

        These are of the points in the first view, of the truth and of what was found in the second.
        """
        features, points, cells = [], [], []
        for view in (first, second):
            spatial = encoder(view.pixels[None]).spatial
            spatial = F.interpolate(spatial, view.points.shape[-2:], mode="bicubic")[0]
            known = view.points[2] > 0
            features.append(rearrange(spatial, "c h w -> h w c")[known.to(spatial.device)])
            points.append(rearrange(view.points, "c h w -> h w c")[known])
            pixels = view.pixels.shape[-1] / known.shape[-1]  # from cell to cell
            cells.append(pixels * (known.nonzero().flip(1) + 0.5))
        motion = second.pose @ first.pose.inverse()
        rotation = _angles(motion[:3, :3]).item()
        if min(map(len, points)) < 2:
            nowhere = torch.empty(0, 2)
            return _Errors(nowhere[:, 0], nowhere[:, 0], rotation), (nowhere, nowhere, nowhere)
        matches = ratio_matches(features[0], features[1], self.most)
        source, target = matches.source.cpu(), matches.target.cpu()
        moved = points[0][source] @ motion[:3, :3].T + motion[:3, 3]
        found = points[1][target]
        shown = [
            second.focal * point[:, :2] / point[:, 2:].clamp_min(1e-9) for point in (moved, found)
        ]
        off, place = shown[0] - shown[1], cells[1][target]
        errors = _Errors((moved - found).norm(dim=1), off.norm(dim=1), rotation)
        return errors, (cells[0][source], place + off, place)


@dataclass(frozen=True, slots=True)
class NaviMatching(PosedMatching):
    """NAVI's wild sets: every fourth image of an object, and another one of it.

    The other is drawn among those whose camera is turned by up to 120 degrees.
    """

    every: int = 4

    name: ClassVar[str] = "navi_correspondence"
    group: ClassVar[str] = "Probe3D"
    sources: ClassVar[dict[str, str]] = {"data": "data.navi"}

    def pairs_in(self, parts: Mapping[str, int]) -> tuple[int, Size]:
        """Count a pair for every fourth image."""
        return -(-parts["wild"] // self.every), (self.size, self.size)

    def pairs(self) -> list[tuple[NaviImage, NaviImage]]:
        """Draw a partner for each image, and keep every fourth pair."""
        generator = torch.Generator().manual_seed(self.seed)
        images, pairs = Navi(Path(self.data)).split("val"), []
        for name in dict.fromkeys(image.object for image in images):
            alike = [image for image in images if image.object == name]
            turns = torch.stack([image.pose()[:3, :3] for image in alike])
            for image, turn in zip(alike, turns, strict=True):
                angles = _angles(turn @ turns.mT)
                fit = (angles > 0) & (angles <= ROTATIONS[-1])
                fit &= torch.tensor([other is not image for other in alike])
                if fit.any():
                    partner = int(torch.multinomial(fit.float(), 1, generator=generator))
                    pairs.append((image, alike[partner]))
        return pairs[:: self.every]

    def view(self, image: NaviImage) -> View:
        """Read the square around the object, at the size asked for."""
        pixels, depth, (rows, columns) = object_in(image, self.size)
        intrinsics = image.intrinsics((depth.shape[0], depth.shape[1]))
        points = in_space(depth, intrinsics)
        cells = self.size // self.stride
        return View(
            nearest(pixels[:, rows, columns], (self.size, self.size)) / 255,
            nearest(points[:, rows, columns], (cells, cells)),
            image.pose(),
            intrinsics[0, 0].item() * self.size / (rows.stop - rows.start),
        )


@dataclass(frozen=True, slots=True)
class RgbdMatching(PosedMatching):
    """The same in a room: pairs of frames of one sequence, at distances that fit a room."""

    size: int = 480
    metres: tuple[float, ...] = (0.05, 0.10, 0.25)
    most_pairs: int = 500

    name: ClassVar[str] = "rgbd_correspondence"
    group: ClassVar[str] = "Correspondence"
    sources: ClassVar[dict[str, str]] = {"data": "data.redwood"}

    def pairs_in(self, parts: Mapping[str, int]) -> tuple[int, Size]:
        """Count the pairs of frames of 4:3."""
        pairs = at_most(comb(parts["frames"], 2), self.most_pairs)
        return pairs, (self.size, self.size * 4 // 3)

    def pairs(self) -> list[tuple[RgbdFrame, RgbdFrame]]:
        """List all pairs, thinned out evenly where there are too many."""
        return spread(list(combinations(Redwood(Path(self.data)).frames(), 2)), self.most_pairs)

    def view(self, image: RgbdFrame) -> View:
        """Read a frame, resized so that its shorter side is the size asked for."""
        depth = image.labels()["depth"]
        factor = self.size / min(depth.shape)
        height, width = (round(factor * side / self.stride) for side in depth.shape)
        size = height * self.stride, width * self.stride
        points = nearest(in_space(depth, image.intrinsics, 0.0), (height, width))
        focal = image.intrinsics[0, 0].item() * factor
        return View(to_pixels(image.image, size), points, image.pose, focal)


def in_space(depth: Tensor, intrinsics: Tensor, centre: float = 0.5) -> Tensor:
    """Return where the pixels of a depth map ``[H, W]`` lie in the camera's frame, ``[3, H, W]``.

    ``intrinsics`` ``[3, 3]`` are of pixels, with ``centre`` at the centre of the first.
    """
    rows, columns = (torch.arange(side) + centre for side in depth.shape)
    x = (columns - intrinsics[0, 2]) / intrinsics[0, 0] * depth
    y = ((rows - intrinsics[1, 2]) / intrinsics[1, 1])[:, None] * depth
    return torch.stack([x, y, depth])


def _angles(rotations: Tensor) -> Tensor:
    """Return the angles of rotations ``[..., 3, 3]`` in degrees."""
    traces = rotations.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return torch.rad2deg(((traces - 1) / 2).clamp(-1, 1).acos())


def _share(errors: Tensor, limit: float) -> float:
    return (errors < limit).double().mean().item()
