"""ImageNet-1k, for classification by neighbours and by text."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from ...data.images import readable_suffixes
from ...errors import DataError
from ...system.files import printable
from . import Dataset


@dataclass(frozen=True)
class ImageNet(Dataset):
    """ImageNet-1k as folders of classes: ``{train,val}/n01440764/NAME.JPEG``.

    A class is numbered as in the challenge of 2012, from 0 in the order of WordNet's numbers,
    whichever of them are there.
    """

    name: ClassVar[str] = "imagenet"
    layout: ClassVar[str] = "train/ and val/, each with n01440764/ and so on"
    licence: ClassVar[str] = "non-commercial research"
    published: ClassVar[Mapping[str, int]] = {"train": 1_281_167, "val": 50_000}
    num_classes: ClassVar[int] = 1_000

    def split(self, split: str) -> list[tuple[Path, int]]:
        """List the images of ``train`` or ``val`` with their class, sorted by class and name."""
        folder = self.folder(split)
        with os.scandir(folder) as entries:
            classes = sorted(item.name for item in entries if item.is_dir())
        if not classes:
            raise DataError(
                f"{folder} has no class folders n01440764/ and so on; move its images into "
                "theirs (for val as it is published, the script valprep.sh does)"
            )
        found = []
        for place in (folder / name for name in classes):
            if place.name not in _numbers():
                raise DataError(
                    f"{printable(place)} is no class of ImageNet-1k (n and 8 digits); take it "
                    "away, or name a set of your own in evaluation.labels"
                )
            number = _numbers()[place.name]
            found += [(place / name, number) for name in _image_names(place)]
        return found

    def count(self, part: str) -> int:
        """Count the images of a split."""
        return len(self.split(part))

    def tested(self) -> list[Path]:
        """List the images of ``val``."""
        return [path for path, _ in self.split("val")]


def _image_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = [item.name for item in entries if not item.name.startswith(".")]
    suffixes = readable_suffixes()
    names = [name for name in names if name.rpartition(".")[2].lower() in suffixes]
    if not names:
        raise DataError(f"class folder {folder} has no images; copy it again")
    return sorted(names)


@cache
def _numbers() -> dict[str, int]:
    from timm.data import ImageNetInfo

    return {name: number for number, name in enumerate(ImageNetInfo().label_names())}
