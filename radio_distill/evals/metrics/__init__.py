"""Metrics: pure functions on tensors, and sums over a whole set fed batch by batch.

One file a task. A metric of single images returns one value an image; a metric of a set is a ratio
of sums, not a mean of ratios of batches, and is a class that adds up in float64, over batches and
processes (:class:`.Sums`). Where published numbers come out of a program with a mistake in it,
``as_published=True`` repeats the mistake, and the default is right.
"""

from .cam import average_drop, average_increase
from .classification import macro_accuracy, top_k_accuracy
from .depth import DepthErrors, PooledDepth, align_scale_and_shift, depth_errors, eigen_crop
from .detection import BoxPrecision, check_installed
from .fidelity import Fidelity, tokens_of
from .masks import area_classes, mask_iou, mean_iou_by_area
from .matching import (
    best_cells,
    pck_per_image,
    pck_per_point,
    ratio_matches,
    transfer_errors,
    transferred,
)
from .normals import NormalErrors, PooledNormals, angles_between, normal_errors, normals_from_depth
from .retrieval import recalls_both_ways
from .saliency import MaxF
from .segmentation import (
    IGNORED,
    Confusion,
    confusion_matrix,
    mean_iou,
    num_shown,
    pixel_accuracy,
)
from .sums import ImageMeans, Sums, check_finite

__all__ = [
    "IGNORED",
    "BoxPrecision",
    "Confusion",
    "DepthErrors",
    "Fidelity",
    "ImageMeans",
    "MaxF",
    "NormalErrors",
    "PooledDepth",
    "PooledNormals",
    "Sums",
    "align_scale_and_shift",
    "angles_between",
    "area_classes",
    "average_drop",
    "average_increase",
    "best_cells",
    "check_finite",
    "check_installed",
    "confusion_matrix",
    "depth_errors",
    "eigen_crop",
    "macro_accuracy",
    "mask_iou",
    "mean_iou",
    "mean_iou_by_area",
    "normal_errors",
    "normals_from_depth",
    "num_shown",
    "pck_per_image",
    "pck_per_point",
    "pixel_accuracy",
    "ratio_matches",
    "recalls_both_ways",
    "tokens_of",
    "top_k_accuracy",
    "transfer_errors",
    "transferred",
]
