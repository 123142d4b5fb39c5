"""PASCAL VOC 2012 segmentation, 21 classes with background."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from . import LabelledDataset, LabelledImage
from .files import check_listed, read_classes, read_lines


@dataclass(frozen=True)
class Voc(LabelledDataset):
    """PASCAL VOC 2012 (``VOCdevkit/VOC2012``), with or without the masks of SBD.

    ``JPEGImages/ID.jpg``, ``SegmentationClass/ID.png`` and the lists
    ``ImageSets/Segmentation/{train,val}.txt``; for ``trainaug``, its list there and
    ``SegmentationClassAug/ID.png``. In the masks 0 is background, a class, and 255 is void.
    """

    name: ClassVar[str] = "voc"
    layout: ClassVar[str] = "JPEGImages/, SegmentationClass/ and ImageSets/ (VOC2012)"
    licence: ClassVar[str] = "research (flickr's terms)"
    published: ClassVar[Mapping[str, int]] = {"train": 1_464, "trainaug": 10_582, "val": 1_449}
    num_classes: ClassVar[int] = 21

    @property
    def training(self) -> str:
        """The larger training split that is there, ``trainaug`` or ``train``."""
        return "trainaug" if self._list("trainaug").is_file() else "train"

    def split(self, split: str) -> list[LabelledImage]:
        """List ``train``, ``trainaug`` or ``val`` with labels ``segmentation``, as listed."""
        images = self.folder("JPEGImages")
        labels = self.folder("SegmentationClassAug" if split == "trainaug" else "SegmentationClass")
        names = read_lines(self._list(split))
        check_listed(self._list(split), names, images, ".jpg")
        check_listed(self._list(split), names, labels, ".png")
        return [
            LabelledImage(name, images / f"{name}.jpg", partial(_read, labels / f"{name}.png"))
            for name in names
        ]

    def _list(self, split: str) -> Path:
        return self.root / "ImageSets" / "Segmentation" / f"{split}.txt"


def _read(path: Path) -> dict[str, Tensor]:
    return {"segmentation": read_classes(path, Voc.num_classes, ignored=255)}
