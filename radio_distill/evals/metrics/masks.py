"""IoU of masks by size, as SAM's followers report it on COCO."""

from typing import Literal

from torch import Tensor

Area = Literal["small", "medium", "large"]
SMALL, LARGE = 32**2, 96**2
"""Pixels; COCO's bounds of a medium object, which count to both sides."""


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
