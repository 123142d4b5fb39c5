"""PASCAL-Context for several tasks: segmentation, human parts, saliency, normals."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, DataError
from ...system.files import reason_of
from ..masks import class_numbers
from ..metrics import IGNORED
from . import LabelledDataset, LabelledImage
from .files import check_listed, read_classes, read_lines, read_normals, stems

_PERSON = 15
_PARTS = {
    1: "head hair lear lebrow leye mouth nose rear rebrow reye",
    2: "torso neck",
    3: "luarm ruarm",
    4: "llarm lhand rlarm rhand",
    5: "luleg ruleg",
    6: "llleg lfoot rlleg rfoot",
}
"""PASCAL-Part's 24 parts of a person by the six classes that they are folded to."""
_PART_CLASSES = {part: number for number, parts in _PARTS.items() for part in parts.split()}

# fmt: off
_INDOOR = (
    3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50,
    51, 53, 55, 56, 59, 61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104,
    105, 107, 111, 113, 115, 122, 124, 135, 141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172,
    174, 181, 183, 184, 191, 193, 195, 197, 199, 202, 213, 215, 216, 219, 220, 223, 225, 228, 230,
    232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261, 263, 269, 272, 273, 275, 281,
    283, 284, 285, 286, 287, 288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314, 315, 319, 323,
    329, 330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357, 368, 370, 371, 374, 379, 380, 383,
    384, 397, 401, 403, 405, 407, 408, 411, 412, 413, 414, 417, 419, 421, 423, 427, 429, 430, 432,
    440, 441, 442, 443, 444, 446, 454, 457,
)
"""Of PASCAL-Context's 459 classes those that NYU Depth v2 has by the same name, and tvmonitor.

The normals were predicted by a network that had learnt on NYU, so that only there they count.
"""
# fmt: on


@dataclass(frozen=True)
class PascalContext(LabelledDataset):
    """PASCAL-Context in ATRC's archive (``PASCALContext.tar.gz``), as multi-task works use it.

    ``JPEGImages/ID.jpg``, ``semseg/{VOC12,pascal-context}/ID.png`` (21 classes, VOC12 goes first),
    ``human_parts/ID.mat``, ``sal_distill/ID.png``, ``normals_distill/ID.png``,
    ``pascal-context/trainval/ID.mat`` (which says where normals count) and the lists
    ``ImageSets/Context/{train,val}.txt``. Needs scipy.
    """

    name: ClassVar[str] = "pascal_context"
    layout: ClassVar[str] = "JPEGImages/, ImageSets/, semseg/ and so on (PASCALContext)"
    licence: ClassVar[str] = "research (PASCAL's images)"
    published: ClassVar[Mapping[str, int]] = {"train": 4_998, "val": 5_105}
    num_classes: ClassVar[int] = 21

    def split(self, split: str) -> list[LabelledImage]:
        """List ``train`` or ``val``.

        Labels are ``segmentation``; ``parts``, 0 for background and 1 to 6, IGNORED in images
        without people; ``saliency``, 0 or 1; and ``normals``.
        """
        path = self.folder("ImageSets", "Context") / f"{split}.txt"
        names = read_lines(path)
        for folder, suffix in (
            ("JPEGImages", ".jpg"),
            ("sal_distill", ".png"),
            ("normals_distill", ".png"),
            ("pascal-context/trainval", ".mat"),
            ("human_parts", ".mat"),
        ):
            check_listed(path, names, self.root / folder, suffix)
        of_voc = set(stems(self.folder("semseg", "VOC12"), ".png"))
        others = [name for name in names if name not in of_voc]
        if others:
            check_listed(path, others, self.root / "semseg" / "pascal-context", ".png")
        return [
            LabelledImage(
                name,
                self.root / "JPEGImages" / f"{name}.jpg",
                partial(_read, self.root, name, "VOC12" if name in of_voc else "pascal-context"),
            )
            for name in names
        ]


def _read(root: Path, name: str, source: str) -> dict[str, Tensor]:
    mask = root / "semseg" / source / f"{name}.png"
    segmentation = read_classes(mask, PascalContext.num_classes, ignored=255)
    saliency = class_numbers(root / "sal_distill" / f"{name}.png") > 127
    normals = read_normals(root / "normals_distill" / f"{name}.png")
    context = _load(root / "pascal-context" / "trainval" / f"{name}.mat", "LabelMap")
    if context.shape != normals.shape[1:]:
        raise DataError(f"pascal_context: {name}: normals and LabelMap differ in size; copy again")
    return {
        "segmentation": segmentation,
        "parts": _parts(
            root / "human_parts" / f"{name}.mat", torch.full_like(segmentation, IGNORED)
        ),
        "saliency": torch.from_numpy(saliency).long(),
        "normals": normals * torch.from_numpy(np.isin(context, _INDOOR)),
    }


def _parts(path: Path, unknown: Tensor) -> Tensor:
    """Fold the parts of all people into one map; ``unknown`` where there are no people."""
    annotation = _load(path, "anno")
    found = np.zeros(unknown.shape, dtype=np.int64)
    anybody = False
    try:
        for item in np.atleast_1d(annotation["objects"]):
            if item["class_ind"] == _PERSON:
                for part in np.atleast_1d(item["parts"]):
                    found[part["mask"].astype(bool)] = _PART_CLASSES[part["part_name"]]
                    anybody = True
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no file of PASCAL-Part ({error!r}); copy it again") from error
    return torch.from_numpy(found) if anybody else unknown


def _load(path: Path, field: str) -> Any:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ConfigError(
            "pascal_context needs scipy; pip install 'radio-distill[eval]'"
        ) from error
    try:
        return loadmat(path, simplify_cells=True)[field]
    except Exception as error:  # scipy fails on damaged bytes with nearly any exception
        raise DataError(f"{path} cannot be read ({reason_of(error)}); copy it again") from error
