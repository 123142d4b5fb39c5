"""Semantic correspondence on SPair-71k: is the knee of one horse found on another horse?

As Probe3D measures it (arXiv 2404.08636): images are padded with white to squares, each keypoint
goes to the cell of the other image with the nearest feature, and it is found if it lies within
0.10 of the longer side of the object's box. The published recall has its habits: 200 pairs of each
class, and a cell stands for its upper left corner, which is off by up to one cell. So PCK, as it is
usual in papers on semantic correspondence, stands beside it: all pairs, and cells at their centres.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..data.folder import in_batches, spread
from ..types import Report, Score, unheard
from .datasets.spair import Spair, SpairPair
from .demand import Demand, at_most
from .encoder import Encoder, open_image, to_pixels
from .examples import Show, ShownMatches, shown_matches
from .metrics.matching import pck_per_image, pck_per_point, transfer_errors, transferred
from .protocol import protocol_of
from .shared import answers


@dataclass(frozen=True, slots=True)
class _Matched:
    """How far from the truth a pair's keypoints were found, as shares of the box's longer side."""

    viewpoint: int
    """How much the view differs, 0 to 2."""
    published: Tensor
    """``[K]``."""
    centred: Tensor
    """``[K]``; a cell stands for its centre."""


Matched = Mapping[str, Sequence[_Matched]]
"""By class."""


@dataclass(frozen=True, slots=True)
class KeypointTransfer:
    """Recall and PCK of keypoints on the test split.

    * ``recall@0.10``: of the first ``pairs_per_class`` pairs in a seeded order, over the keypoints
      of a class, then the mean over classes;
    * ``recall@0.10/viewpoint0`` to ``2``: the same of pairs whose viewpoints differ so much;
    * ``pck@0.10/keypoint`` and ``pck@0.10/image``: over all pairs, the mean over all keypoints, and
      over pairs of the mean over their keypoints.
    """

    data: str
    size: int = 800
    """Of the padded image, in pixels."""
    threshold: float = 0.10
    """As a share of the longer side of the box in the target image."""
    pairs_per_class: int = 200
    batch_size: int = 4
    seed: int = 20

    name: ClassVar[str] = "spair"
    sources: ClassVar[dict[str, str]] = {"data": "data.spair"}

    def demand(self, parts: Mapping[str, int], limit: int | None = None) -> Demand:
        """Count the images of the pairs, each once."""
        images = min(2 * at_most(parts["test"], limit), parts["images"])
        return Demand(images=images, passes={(self.size, self.size): images}, batch=self.batch_size)

    def run(
        self,
        encoder: Encoder,
        limit: int | None = None,
        progress: Report = unheard,
        show: Show | None = None,
    ) -> list[Score]:
        """Match the pairs, class by class; ``limit`` thins them out."""
        pairs = spread(Spair(Path(self.data)).pairs(), limit)
        by_category: dict[str, list[SpairPair]] = {}
        for pair in pairs:
            by_category.setdefault(pair.category, []).append(pair)

        def match(category: str, show: Show | None) -> list[_Matched]:
            some = by_category[category]
            maps = self._encode(encoder, some)
            if show is not None:
                show(self._example(some[0], maps))
            return [_match(pair, maps) for pair in some]

        def report(done: int, categories: int) -> None:
            progress(len(pairs) * done // categories, len(pairs))

        matched = answers(list(by_category), match, report, show)
        return self._scores(dict(zip(by_category, matched, strict=True)))

    def _encode(self, encoder: Encoder, pairs: Sequence[SpairPair]) -> dict[Path, Tensor]:
        """Encode each image once; its normalised map stays on the encoder's device."""
        paths = list(dict.fromkeys(path for pair in pairs for path in (pair.source, pair.target)))
        size = encoder.nearest_size((self.size, self.size))
        maps: dict[Path, Tensor] = {}
        for some in in_batches(paths, self.batch_size):
            pixels = torch.stack([to_pixels(squared(open_image(path)), size) for path in some])
            maps |= zip(some, F.normalize(encoder(pixels).spatial, dim=1), strict=True)
        return maps

    def _example(self, pair: SpairPair, maps: Mapping[Path, Tensor]) -> ShownMatches:
        """Match a pair's keypoints again, to be drawn; a cell stands for its centre."""
        points, source, target = pair.keypoints(), maps[pair.source], maps[pair.target]
        left, top, right, bottom = points.target_box
        asked = (points.source / max(points.source_size)).to(source)
        found = max(points.target_size) * transferred(source, target, asked).cpu()
        sizes = {pair.source: points.source_size, pair.target: points.target_size}
        views = [to_pixels(path, size) for path, size in sizes.items()]
        within = self.threshold * max(right - left, bottom - top)
        return shown_matches(views, [points.source, points.target, found], within)

    def _scores(self, matched: Matched) -> list[Score]:
        every = [match for some in matched.values() for match in some]
        centred = [match.centred for match in every]
        at = f"@{self.threshold:.2f}"
        found = {f"recall{at}": self._recall(matched)}
        for viewpoint in sorted({match.viewpoint for match in every}):
            alike = {
                category: [match for match in some if match.viewpoint == viewpoint]
                for category, some in matched.items()
            }
            found[f"recall{at}/viewpoint{viewpoint}"] = self._recall(alike)
        found[f"pck{at}/keypoint"] = pck_per_point(centred, self.threshold), len(every)
        found[f"pck{at}/image"] = pck_per_image(centred, self.threshold), len(every)
        protocol = protocol_of(self, pairs={name: len(some) for name, some in matched.items()})
        return [
            Score(
                self.name, metric, 100 * value, "%", True, "Probe3D", count,
                headline=metric == f"recall{at}", details={"classes": len(matched)},
                protocol=protocol,
            )
            for metric, (value, count) in found.items()
        ]  # fmt: skip

    def _recall(self, matched: Matched) -> tuple[float, int]:
        """Return the mean over classes of their recall, in [0, 1], and of how many pairs it is."""
        recalls, count = [], 0
        for some in filter(None, matched.values()):
            kept = Random(self.seed).sample(some, min(self.pairs_per_class, len(some)))
            recalls.append(pck_per_point([match.published for match in kept], self.threshold))
            count += len(kept)
        return sum(recalls) / len(recalls), count


def _match(pair: SpairPair, maps: Mapping[Path, Tensor]) -> _Matched:
    points = pair.keypoints()
    left, top, right, bottom = points.target_box
    scale = max(right - left, bottom - top) / max(points.target_size)
    source, target = maps[pair.source], maps[pair.target]
    asked = (points.source / max(points.source_size)).to(source)
    truth = (points.target / max(points.target_size)).to(target)
    published, centred = (
        transfer_errors(source, target, asked, truth, as_published).cpu() / scale
        for as_published in (True, False)
    )
    return _Matched(points.viewpoint, published, centred)


def squared(image: Image.Image) -> Image.Image:
    """Pad an image with white, to the right or below, to a square."""
    square = Image.new("RGB", (max(image.size),) * 2, "white")
    square.paste(image)
    return square
