"""Object detection on COCO: torchvision's FCOS on the frozen map of an encoder.

::

    map ─► batch norm, 1x1 ─► levels of 8, 16, 32 and 64 px a cell ─► FCOS ─► boxes

As FeatSharp (arXiv 2502.16025, table 1) asks whether an upsampler helps, with ViTDet's pyramid
and training; but its detector is DINO's in detectron2, which no package index has, and ours is FCOS
(arXiv 1904.01355). So encoders may be compared with each other, and no value with a published one.

An image fills a rectangle of ``crop`` from its upper left corner, in training and in the test. The
encoder sees the rectangle at the nearest size that it takes, and levels have cells of so many
pixels of it whatever the encoder's patch and upsampler are: all are measured with one ruler.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.transforms.v2 import functional as vision

from ..errors import ConfigError, DataError
from ..types import Score, Size
from .augmentation import Labels, padded
from .datasets.coco import Coco
from .encoder import Encoder
from .examples import ShownBoxes
from .metrics import IGNORED
from .metrics.detection import BoxPrecision, check_installed
from .probe_heads import BatchNorm
from .probe_training import Example, ProbeHeads, encode
from .trained import Decay, Meters, Outputs, TrainedBenchmark, read_pixels

STRIDES = (8, 16, 32, 64)
"""Pixels from cell to cell of the levels; each finds objects of up to eight times that."""
CATEGORIES: tuple[str, ...] = tuple(
    name
    for name in FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    if name not in ("__background__", "N/A")
)
"""The 80 of COCO 2017, in its order."""


class DetectionImage(NamedTuple):
    """An image and its objects."""

    key: str
    image: Path
    number: int
    """COCO's."""
    size: Size
    """As its annotations mean it."""
    objects: np.ndarray
    """``[M, 7]`` float64 as :class:`.metrics.detection.BoxPrecision` takes them; no tensor, since
    workers would share each of 100,000 as a file."""
    most: int
    """M of the image of the split that shows most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CocoDetection(TrainedBenchmark):
    """COCO 2017: 117,266 training images that show objects, 5,000 test images, 80 classes."""

    crop: Size = (512, 512)
    steps: int = 90_000
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    warmup_steps: int = 250
    decay: Decay = "step"
    gradient_clip: float = 0.1
    scale: tuple[float, float] = (0.1, 2.0)
    """Of training images, 1 for one that just fits in the crop; what is beyond it is cut off at a
    place that is drawn (large-scale jittering)."""
    width: int = 256
    """Channels of the levels and of FCOS, a multiple of 64."""

    name: ClassVar[str] = "coco_detection"
    sources: ClassVar[Mapping[str, str]] = {"data": "data.coco"}
    group: ClassVar[str] = "Detection"
    head: ClassVar[str] = "fcos"
    pools_step: ClassVar[bool] = True  # FCOS divides by the cells in objects of all images

    def images(self) -> tuple[Sequence[DetectionImage], Sequence[DetectionImage]]:
        """List ``train``, but images without an object, and ``val``."""
        check_installed()
        train, test = (_images(Coco(Path(self.data)), split) for split in ("train", "val"))
        return [image for image in train if not image.objects[:, 6].all()], test

    def training_example(
        self, image: DetectionImage, random: np.random.Generator | None
    ) -> Example:
        """Read an image, and scale, crop and mirror it; without a generator, fit it in the crop."""
        scale = 1.0 if random is None else random.uniform(*self.scale)
        pixels, boxes = self._scaled(image, scale)
        classes, crowds = torch.from_numpy(image.objects)[:, [0, 6]].unbind(dim=1)
        spare = [
            max(have - most, 0) for have, most in zip(pixels.shape[1:], self.crop, strict=True)
        ]
        top, left = (0 if random is None else int(random.integers(side + 1)) for side in spare)
        pixels = pixels[:, top : top + self.crop[0], left : left + self.crop[1]]
        height, width = pixels.shape[1:]
        x = (boxes[:, 0::2] - left).clamp(0, width)
        y = (boxes[:, 1::2] - top).clamp(0, height)
        if random is not None and random.random() < 0.5:
            pixels, x = pixels.flip(-1), (width - x).flip(1)
        objects = torch.stack([classes, x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)
        is_cut_off = (x[:, 1] - x[:, 0] < 1) | (y[:, 1] - y[:, 0] < 1)
        objects = objects[~is_cut_off & (crowds == 0)].float()
        # Images of a step are stacked, so all have as many rows; those that fill up are no class.
        objects = F.pad(objects, (0, 0, 0, image.most - len(objects)), value=IGNORED)
        return Example(image.key, padded(pixels, {}, self.crop)[0], {"objects": objects})

    def test_example(self, image: DetectionImage) -> Example:
        """Read an image and fit it in the crop, with boxes in its own pixels."""
        pixels, _ = self._scaled(image, 1.0)
        about = torch.tensor([image.number, *image.size])
        labels = {"objects": torch.from_numpy(image.objects), "image": about}
        return Example(image.key, padded(pixels, {}, self.crop)[0], labels)

    def fitted(
        self, encoder: Encoder, pixels: Tensor, labels: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return both as they are: the encoder resizes the whole, and boxes stay in its pixels."""
        return pixels, labels

    def heads(self, channels: Sequence[int]) -> dict[str, nn.Module]:
        """Make the levels and FCOS' towers; raises ConfigError for a width that has no groups."""
        if self.width % 64:  # two channels of each of 32 groups, for levels of one cell
            raise ConfigError(f"evaluation.options.{self.name}.width is no multiple of 64")
        return {"objects": Detector(sum(channels), self.width, _grids(self.crop))}

    def losses(self, outputs: Outputs, labels: Labels) -> dict[str, Tensor]:
        """Return FCOS' losses: focal, generalised IoU, and cross-entropy of the centre-ness."""
        output = outputs["objects"]
        targets = []
        for rows in labels["objects"]:
            known = rows[rows[:, 0] != IGNORED]
            targets.append({"boxes": known[:, 1:], "labels": known[:, 0].long()})
        cells = cells_of(self.crop, output.device)
        counts = [len(level) for level in cells]
        terms: dict[str, Tensor] = _fcos().compute_loss(
            targets, _parts(output), [torch.cat(cells)] * len(output), counts
        )
        return terms

    def meters(self, device: torch.device | str) -> Meters:
        """Make an empty meter of COCO's average precision."""
        return {"precision": BoxPrecision()}

    @torch.no_grad()
    def predict(self, encoder: Encoder, heads: ProbeHeads, pixels: Tensor) -> dict[str, Tensor]:
        """Return the output for an image of the size of the crop, ``[1, N, K + 5]``."""
        return heads(encode(self, encoder, pixels[None]))

    def measure(self, meters: Meters, outputs: Outputs, labels: Labels) -> None:
        """Count the boxes that are found in an image."""
        found = self._found(outputs["objects"], labels["image"])
        meters["precision"].update(int(labels["image"][0]), found, labels["objects"])

    def scores(self, meters: Meters) -> list[Score]:
        """Return average precision and recall; they count in no Δm, as in FeatSharp."""
        values = meters["precision"].compute()
        return [
            self.score(name, 100 * value, "%", headline=False) for name, value in values.items()
        ]

    def shown(self, pixels: Tensor, labels: Labels, outputs: Outputs) -> ShownBoxes:
        """Make an example of the truth but crowds, and of as many boxes, the surest."""
        size = _sizes(labels["image"])
        height, width = self._size_in_crop(size)
        into = torch.tensor([width / size[1], height / size[0]]).repeat(2)
        truth = labels["objects"].cpu()
        truth = truth[truth[:, 6] == 0]
        found = self._found(outputs["objects"], labels["image"]).cpu()[: len(truth)]
        return ShownBoxes(
            pixels[:, :height, :width].cpu(),
            truth=truth[:, 1:5].float() * into,
            prediction=found[:, 1:5] * into,
            truth_names=[CATEGORIES[int(number)] for number in truth[:, 0]],
            prediction_names=[CATEGORIES[int(number)] for number in found[:, 0]],
        )

    def _size_in_crop(self, size: Size, scale: float = 1.0) -> Size:
        """Return the size of an image that fits in the crop, times a scale."""
        factor = scale * min(most / side for most, side in zip(self.crop, size, strict=True))
        return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))

    def _scaled(self, image: DetectionImage, scale: float) -> tuple[Tensor, Tensor]:
        """Read an image at a scale: pixels ``[3, H, W]``, and boxes ``[M, 4]`` in them."""
        pixels = read_pixels(image)
        if tuple(pixels.shape[1:]) != image.size:
            raise DataError(
                f"{image.image} is {pixels.shape[2]}x{pixels.shape[1]} px, its boxes are of "
                f"{image.size[1]}x{image.size[0]}; take both from one copy of the set"
            )
        height, width = self._size_in_crop(image.size, scale)
        by = torch.tensor([width / image.size[1], height / image.size[0]]).repeat(2)
        boxes = torch.from_numpy(image.objects)[:, 1:5] * by
        return vision.resize(pixels, [height, width], antialias=True), boxes

    def _found(self, output: Tensor, about: Tensor) -> Tensor:
        """Return what is found in an image, ``[N, 6]`` class, box in its own pixels, score.

        The surest come first.
        """
        size = _sizes(about)
        height, width = self._size_in_crop(size)
        cells = cells_of(self.crop, output.device)
        counts = [len(level) for level in cells]
        parts = {name: part.split(counts, dim=1) for name, part in _parts(output).items()}
        (found,) = _fcos().postprocess_detections(parts, [cells], [(height, width)])
        back = torch.tensor([size[1] / width, size[0] / height]).repeat(2).to(found["boxes"])
        columns = (found["labels"][:, None], found["boxes"] * back, found["scores"][:, None])
        return torch.cat(columns, dim=1)


class Detector(nn.Module):
    """A pyramid of a map, and torchvision's FCOS on its levels.

    Args:
        channels: of the map.
        width: of the levels.
        grids: heights and widths of the levels.
    """

    def __init__(self, channels: int, width: int, grids: Sequence[Size]):
        super().__init__()
        # The shift of the first is bias enough for both.
        self.reduce = nn.Sequential(BatchNorm(channels), nn.Conv2d(channels, width, 1, bias=False))
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(32, width),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(32, width),
            )
            for _ in grids
        )
        self.fcos = FCOSHead(width, 1, len(CATEGORIES))
        self.grids = list(grids)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map ``[B, C, h, w]`` to ``[B, N, K + 5]``, of each cell of each level.

        The columns are K logits of classes, the distances to the four sides in cells, and the logit
        of how near the cell is to the object's centre.
        """
        reduced = self.reduce(maps[-1])
        levels = [
            level(F.interpolate(reduced, grid, mode="bilinear", antialias=True))
            for level, grid in zip(self.levels, self.grids, strict=True)
        ]
        return torch.cat([*self.fcos(levels).values()], dim=2)


def cells_of(size: Size, device: torch.device | str = "cpu") -> list[Tensor]:
    """Return the squares of the cells of each level, ``[N, 4]`` left, top, right, bottom.

    Cells of a level are spread evenly over an image of ``size``; squares have its stride as side.
    """
    levels = []
    for stride, grid in zip(STRIDES, _grids(size), strict=True):
        rows, columns = (
            (torch.arange(count, device=device) + 0.5) * (side / count)
            for count, side in zip(grid, size, strict=True)
        )
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        centres = torch.stack([x, y], dim=-1).reshape(-1, 2)
        levels.append(torch.cat([centres - stride / 2, centres + stride / 2], dim=1))
    return levels


def _grids(size: Size) -> list[Size]:
    return [(-(-size[0] // stride), -(-size[1] // stride)) for stride in STRIDES]


def _parts(output: Tensor) -> dict[str, Tensor]:
    """Return an output of the detector as torchvision calls its parts."""
    names = ("cls_logits", "bbox_regression", "bbox_ctrness")
    return dict(zip(names, output.split([len(CATEGORIES), 4, 1], dim=2), strict=True))


def _sizes(about: Tensor) -> Size:
    _, height, width = about.tolist()
    return height, width


@cache
def _fcos() -> FCOS:
    """Return torchvision's detector for its losses and its choice of boxes; it has no weights."""
    backbone: Any = nn.Identity()
    backbone.out_channels = 32
    with torch.device("meta"):
        return FCOS(backbone, len(CATEGORIES), score_thresh=0.05)


def _images(dataset: Coco, split: str) -> list[DetectionImage]:
    """List the images of a split with their objects."""
    found = dataset.objects(split)
    if unknown := [name for name in found.categories.values() if name not in CATEGORIES]:
        raise DataError(f"{dataset.root} has {unknown[0]!r}, which is no category of COCO 2017")
    numbers = [CATEGORIES.index(name) for name in found.categories.values()]
    rows: dict[int, list[list[float]]] = {image.id: [] for image in found.images}
    for item in found.objects:
        left, top, width, height = item.box
        box = [left, top, left + width, top + height]
        rows[item.image.id].append([numbers[item.category], *box, item.area, item.crowd])
    most = max(map(len, rows.values()), default=0)
    return [
        DetectionImage(
            image.path.name, image.path, image.id, (image.height, image.width),
            np.array(rows[image.id], dtype=np.float64).reshape(-1, 7), most,
        )
        for image in found.images
    ]  # fmt: skip
