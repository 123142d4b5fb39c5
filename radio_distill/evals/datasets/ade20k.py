"""ADE20K scene parsing, 150 classes."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from . import LabelledDataset, LabelledImage
from .files import read_classes, same_stems

_FOLDERS = {"train": "training", "val": "validation"}


@dataclass(frozen=True)
class Ade20k(LabelledDataset):
    """ADE20K as in the scene parsing challenge of 2016 (``ADEChallengeData2016``).

    ``images/{training,validation}/NAME.jpg`` and ``annotations/…/NAME.png``, in which 0 is not
    labelled and 1 to 150 are the classes 0 to 149 of ours.
    """

    name: ClassVar[str] = "ade20k"
    layout: ClassVar[str] = "images/ and annotations/ of ADEChallengeData2016"
    licence: ClassVar[str] = "research and education"
    published: ClassVar[Mapping[str, int]] = {"train": 20_210, "val": 2_000}
    num_classes: ClassVar[int] = 150

    def split(self, split: str) -> list[LabelledImage]:
        """List ``train`` or ``val``, sorted, with labels ``segmentation``."""
        images = self.folder("images", _FOLDERS[split])
        labels = self.folder("annotations", _FOLDERS[split])
        return [
            LabelledImage(stem, images / f"{stem}.jpg", partial(_read, labels / f"{stem}.png"))
            for stem in same_stems(images, labels, (".jpg", ".png"))
        ]


def _read(path: Path) -> dict[str, Tensor]:
    return {"segmentation": read_classes(path, Ade20k.num_classes, ignored=0, offset=1)}
