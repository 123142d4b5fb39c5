"""Linear probes for semantic segmentation as RADIO trains them: ADE20K and VOC.

Images fit in 2048 x 512 pixels times a random scale and are cropped to 512 x 512; a test image has
a shorter side of 512, is seen in windows of 512 x 512 that overlap by a third, and the mean of
their logits is resized to the size of its labels. mmsegmentation's recipe (RADIO's configurations
and their rates; AM-RADIO, arXiv 2312.06709, slides, its configurations show images whole;
FeatSharp, arXiv 2502.16025, table 2, Dense).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..types import Score, Size
from .augmentation import Augmentation, Labels, resized
from .encoder import Encoder
from .metrics import IGNORED
from .metrics.segmentation import Confusion, mean_iou, num_shown
from .probe_heads import Linear
from .probe_training import Example, ProbeHeads
from .trained import Meters, Outputs, TrainedBenchmark, read_pixels

Window = tuple[range, range]
"""Rows and columns."""


def ranges(side: int, window: int, step: int) -> list[range]:
    """Return windows that cover a side, ``step`` apart; the last ends where the side does."""
    count = -(-(side - window) // step) + 1
    starts = [min(number * step, side - window) for number in range(count)]
    return [range(start, start + window) for start in starts]


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticProbe(TrainedBenchmark):
    """Batch normalisation and a 1x1 convolution on the last map; mIoU over the whole set."""

    fit: Size = (2048, 512)
    """Longer and shorter side that images are made to fit in, in pixels."""

    slide: float = 2 / 3
    """Share of a window, which is as large as the crop, after which the next one of a test image
    begins; 0 shows images whole."""

    group: ClassVar[str] = "Dense"
    head: ClassVar[str] = "linear"
    num_classes: ClassVar[int]

    def augmentation(self) -> Augmentation:
        """Make images fit, then vary them."""
        return Augmentation(self.crop, self.fit)

    def test_example(self, image: Any) -> Example:
        """Read an image, whole, with labels of its original size."""
        pixels = read_pixels(image)
        height, width = pixels.shape[-2:]
        factor = min(max(self.fit) / max(height, width), min(self.fit) / min(height, width))
        pixels, _ = resized(pixels, {}, (round(height * factor), round(width * factor)))
        return Example(image.key, pixels, image.labels())

    def test_views(self) -> dict[Size, int]:
        """Take photographs to be 4:3."""
        size = min(self.fit), min(max(self.fit), min(self.fit) * 4 // 3)
        return dict(Counter((len(rows), len(columns)) for rows, columns in self.windows(size)))

    def windows(self, size: Size) -> list[Window]:
        """Return the rows and columns of the windows of a test image, from the upper left."""
        if not self.slide:
            return [(range(size[0]), range(size[1]))]
        sides = [
            ranges(side, min(side, window), max(int(window * self.slide), 1))
            for side, window in zip(size, self.crop, strict=True)
        ]
        return [(rows, columns) for rows in sides[0] for columns in sides[1]]

    def predict(self, encoder: Encoder, heads: ProbeHeads, pixels: Tensor) -> dict[str, Tensor]:
        """Return the mean of the logits of all windows that show a pixel."""
        height, width = pixels.shape[-2:]
        sums = counts = torch.zeros((), device=encoder.device)
        for rows, columns in self.windows((height, width)):
            window = pixels[:, rows.start : rows.stop, columns.start : columns.stop]
            logits = TrainedBenchmark.predict(self, encoder, heads, window)["segmentation"]
            around = (columns.start, width - columns.stop, rows.start, height - rows.stop)
            sums = sums + F.pad(logits, around)
            counts = counts + F.pad(torch.ones_like(logits[:, :1]), around)
        return {"segmentation": sums / counts}

    def heads(self, channels: Sequence[int]) -> dict[str, nn.Module]:
        """Make the linear head."""
        return {"segmentation": Linear(sum(channels), self.num_classes)}

    def losses(self, outputs: Outputs, labels: Labels) -> dict[str, Tensor]:
        """Return the cross-entropy, a mean over all pixels, those of no class included.

        A quick probe looks at every fourth row and column.
        """
        target = labels["segmentation"]
        if self.quick:
            target = target[:, 2::4, 2::4]
        logits = F.interpolate(outputs["segmentation"], target.shape[-2:], mode="bilinear")
        loss = F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="none")
        return {"cross_entropy": loss.mean()}

    def meters(self, device: torch.device | str) -> Meters:
        """Make an empty confusion matrix."""
        return {"confusion": Confusion(self.num_classes, device)}

    def measure(self, meters: Meters, outputs: Outputs, labels: Labels) -> None:
        """Count the pixels of an image by class and predicted class."""
        target = labels["segmentation"]
        logits = F.interpolate(outputs["segmentation"], target.shape, mode="bilinear")
        meters["confusion"].update(logits[0].argmax(dim=0), target)

    def scores(self, meters: Meters) -> list[Score]:
        """Return the mean IoU of the classes that the test shows, or somebody predicts."""
        confusion = meters["confusion"].compute()
        value = 100 * mean_iou(confusion, "met")
        return [self.score("miou", value, "%", classes=num_shown(confusion))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ade20k(SemanticProbe):
    """ADE20K scene parsing: 20,210 training and 2,000 test images, 150 classes."""

    name: ClassVar[str] = "ade20k"
    sources: ClassVar[Mapping[str, str]] = {"data": "data.ade20k"}
    num_classes: ClassVar[int] = 150


@dataclass(frozen=True, slots=True, kw_only=True)
class Voc(SemanticProbe):
    """VOC 2012: 10,582 training images (1,464 without the further labels), 1,449 of the test."""

    name: ClassVar[str] = "voc"
    sources: ClassVar[Mapping[str, str]] = {"data": "data.voc"}
    num_classes: ClassVar[int] = 21

    def images(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """List ``trainaug``, or ``train`` where that is all there is, and ``val``."""
        dataset = self.dataset()
        return dataset.split(dataset.training), dataset.split("val")

    def split_sizes(self, parts: Mapping[str, int]) -> tuple[int, int]:
        """Take the larger training split, where it is there."""
        return parts.get("trainaug") or parts["train"], parts["val"]
