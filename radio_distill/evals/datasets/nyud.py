"""NYU Depth v2 for several tasks: segmentation into 40 classes, depth, normals."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ...system.files import reason_of
from . import LabelledDataset, LabelledImage
from .files import check_listed, read_classes, read_lines, read_normals

_LABELS = {"segmentation": ".png", "depth": ".npy", "normals": ".png"}


@dataclass(frozen=True)
class Nyud(LabelledDataset):
    """NYU Depth v2 in ATRC's archive (``NYUDv2.tar.gz``), as multi-task works use it.

    ``images/ID.png``, ``segmentation/ID.png`` (0 is not labelled, 1 to 40 are classes 0 to 39 of
    ours), ``depth/ID.npy`` in metres, ``normals/ID.png`` and the lists ``gt_sets/{train,val}.txt``.
    """

    name: ClassVar[str] = "nyud"
    layout: ClassVar[str] = "images/, segmentation/, depth/, normals/ and gt_sets/ (NYUDv2)"
    licence: ClassVar[str] = "research"
    published: ClassVar[Mapping[str, int]] = {"train": 795, "val": 654}
    num_classes: ClassVar[int] = 40

    def split(self, split: str) -> list[LabelledImage]:
        """List ``train`` or ``val`` with labels ``segmentation``, ``depth`` and ``normals``."""
        path = self.folder("gt_sets") / f"{split}.txt"
        names = read_lines(path)
        for folder, suffix in ({"images": ".png"} | _LABELS).items():
            check_listed(path, names, self.root / folder, suffix)
        return [
            LabelledImage(
                name, self.root / "images" / f"{name}.png", partial(_read, self.root, name)
            )
            for name in names
        ]


def _read(root: Path, name: str) -> dict[str, Tensor]:
    masks = root / "segmentation"
    return {
        "segmentation": read_classes(masks / f"{name}.png", Nyud.num_classes, ignored=0, offset=1),
        "depth": _read_depth(root / "depth" / f"{name}.npy"),
        "normals": read_normals(root / "normals" / f"{name}.png"),
    }


def _read_depth(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path).astype(np.float32)).squeeze()
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} is no array ({reason_of(error)}); copy it again") from error
