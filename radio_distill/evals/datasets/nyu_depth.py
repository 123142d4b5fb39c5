"""NYU Depth v2 for depth alone, as BTS, DINOv2 and DINOv3 read it."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ...system.files import printable
from ..masks import class_numbers
from . import LabelledDataset, LabelledImage
from .files import check_listed, read_lines

_LISTS = {
    "train": ("nyu_train.txt", "nyudepthv2_train_files_with_gt.txt"),
    "val": ("nyu_test.txt", "nyudepthv2_test_files_with_gt.txt"),
}
_FOLDERS = {"train": (".", "sync", "train"), "val": (".", "official_splits/test", "test")}


@dataclass(frozen=True)
class NyuDepth(LabelledDataset):
    """NYU Depth v2 in BTS's layout.

    ``SCENE/rgb_NNNNN.jpg``, ``SCENE/sync_depth_NNNNN.png`` (millimetres) and, in the folder or
    beside it, lists ``nyu_{train,test}.txt`` of lines ``SCENE/rgb… SCENE/sync_depth… FOCAL``. The
    images may lie in ``sync/`` and ``official_splits/test/``, as BTS unpacks them.
    """

    name: ClassVar[str] = "nyu_depth"
    layout: ClassVar[str] = "scenes of rgb_*.jpg and sync_depth_*.png, nyu_train.txt, nyu_test.txt"
    licence: ClassVar[str] = "research"
    published: ClassVar[Mapping[str, int]] = {"train": 24_231, "val": 654}

    def split(self, split: str) -> list[LabelledImage]:
        """List ``train`` or ``val`` (the 654 test images) with labels ``depth``, as listed."""
        path = self._list(split)
        rows = [line.replace("\\", "/").split() for line in read_lines(path)]
        if short := [row for row in rows if len(row) < 2]:
            raise DataError(f"{path}: no image and depth in {printable(short[0])}; copy it again")
        pairs = [(row[0].lstrip("/"), row[1].lstrip("/")) for row in rows]
        places = [self.root / folder for folder in _FOLDERS[split]]
        folder = next((place for place in places if (place / pairs[0][0]).is_file()), places[0])
        files: dict[PurePosixPath, list[str]] = defaultdict(list)
        for name in (PurePosixPath(name) for pair in pairs for name in pair):
            files[name.parent].append(name.name)
        for parent, names in files.items():
            check_listed(path, names, folder / parent)
        return [
            LabelledImage(image, folder / image, partial(_read, folder / depth))
            for image, depth in pairs
        ]

    def _list(self, split: str) -> Path:
        places = [
            folder / name for folder in (self.folder(), self.root.parent) for name in _LISTS[split]
        ]
        for path in places:
            if path.is_file():
                return path
        raise DataError(
            f"no {_LISTS[split][0]} in {self.root} or beside it; name the folder of nyu_depth that "
            f"holds {self.layout}"
        )


def _read(path: Path) -> dict[str, Tensor]:
    return {"depth": torch.from_numpy(class_numbers(path).astype(np.float32) / 1000)}
