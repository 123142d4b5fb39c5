"""Of single objects: average precision of boxes, as COCO's own program counts it, and IoU of masks.

Boxes are counted by faster-coco-eval; masks by size, as SAM's followers report them on COCO.
"""

from typing import Any, Literal

import numpy as np
from torch import Tensor

from ...errors import ConfigError, DataError
from ...system.distributed import all_gather_object

MOST_BOXES = 100
"""Of an image, the surest, that count."""
_NAMES = {
    "ap": "AP_all", "ap50": "AP_50", "ap75": "AP_75",
    "ap/small": "AP_small", "ap/medium": "AP_medium", "ap/large": "AP_large",
    "ar": "AR_third",
}  # fmt: skip
"""Ours, and those of faster-coco-eval; ``ar`` is that of 100 boxes an image."""
Area = Literal["small", "medium", "large"]
SMALL, LARGE = 32**2, 96**2
"""Pixels; COCO's bounds of a medium object, which count to both sides of a mask's IoU."""


class BoxPrecision:
    """Precision over recalls, classes and ten bounds of the IoU, of a set fed image by image."""

    def __init__(self) -> None:
        check_installed()
        self.images: list[tuple[int, np.ndarray, np.ndarray]] = []

    def update(self, image: int, found: Tensor, truth: Tensor) -> None:
        """Add an image; all boxes are left, top, right, bottom in its pixels.

        Args:
            image: its number in the set.
            found: ``[N, 6]`` class, box, score.
            truth: ``[M, 7]`` class, box, area in square pixels, 1 for a crowd: what is found in
                one is neither right nor wrong.
        """
        self.images.append((image, _table(found), _table(truth)))

    def all_reduce(self) -> None:
        """Merge over all processes, once, at the end; alone, do nothing."""
        self.images = all_gather_object(self.images)

    def compute(self) -> dict[str, float]:
        """Return the measures in [0, 1]; one of a class of area that no object has is left out.

        Raises:
            DataError: there is no object.
        """
        from faster_coco_eval import COCO, COCOeval_faster

        # Of boxes that are equally sure, those of the first images count first.
        images = sorted(self.images, key=lambda item: item[0])
        truth = [
            {
                "image_id": number, "category_id": int(row[0]), "bbox": _sized(row[1:5]),
                "area": row[5], "iscrowd": int(row[6]),
            }
            for number, _, table in images for row in table
        ]  # fmt: skip
        if not truth:
            raise DataError("average precision: no test image shows an object")
        found = [
            {"image_id": number, "category_id": int(row[0]), "bbox": _sized(row[1:5])}
            | {"score": row[5]}
            for number, table, _ in images
            for row in table
        ]
        classes = sorted({item["category_id"] for item in truth + found})
        contents: dict[str, Any] = {
            "images": [{"id": number} for number, _, _ in images],
            "annotations": [item | {"id": place} for place, item in enumerate(truth, 1)],
            "categories": [{"id": number, "name": str(number)} for number in classes],
        }
        whole = COCO(contents)
        evaluation = COCOeval_faster(whole, whole.loadRes(found), "bbox", print_function=_silent)
        evaluation.run()
        values = evaluation.stats_as_dict
        return {ours: float(values[it]) for ours, it in _NAMES.items() if values[it] >= 0}


def check_installed() -> None:
    """Raise ConfigError where the package that counts is not there."""
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "average precision needs faster-coco-eval; pip install 'radio-distill[eval]'"
        ) from error


def _table(rows: Tensor) -> np.ndarray:
    table: np.ndarray = rows.detach().double().cpu().numpy()
    return table


def _sized(box: np.ndarray) -> list[float]:
    left, top, right, bottom = box.tolist()
    return [left, top, right - left, bottom - top]


def _silent(*_: Any) -> None:
    pass


def mask_iou(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the intersection over union of masks ``[N, H, W]`` bool, in [0, 1], ``[N]``."""
    overlap = (prediction & target).sum(dim=(1, 2)).double()
    union = (prediction | target).sum(dim=(1, 2)).double()
    return overlap / (union + 1e-7)


def area_classes(area: float) -> list[Area]:
    """Return the classes that an object of ``area`` pixels counts to; a bound counts to two."""
    classes: dict[Area, bool] = {
        "small": area <= SMALL, "medium": SMALL <= area <= LARGE, "large": area >= LARGE
    }  # fmt: skip
    return [name for name, inside in classes.items() if inside]


def mean_iou_by_area(ious: list[float], areas: list[float]) -> dict[str, float]:
    """Return ``iou``, the mean of all masks, and ``iou/AREA`` of each class of area that occurs.

    Args:
        ious: of each annotation.
        areas: of each annotation, the annotation's own ``area`` in pixels.
    """
    groups: dict[str, list[float]] = {"iou": ious}
    for iou, area in zip(ious, areas, strict=True):
        for name in area_classes(area):
            groups.setdefault(f"iou/{name}", []).append(iou)
    return {name: sum(values) / len(values) for name, values in groups.items() if values}
