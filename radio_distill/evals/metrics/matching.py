"""Correspondence: sure matches between point sets, keypoints carried over, and PCK."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Matches(NamedTuple):
    """Matches, the surest first: index of the source, of the target, and how sure, ``[K]`` each."""

    source: Tensor
    target: Tensor
    weight: Tensor


def ratio_matches(source: Tensor, target: Tensor, most: int = 1000, chunk: int = 2048) -> Matches:
    """Return the matches that stand out most from the second best: Lowe's ratio test, as Probe3D.

    A source point's match is its nearest target by cosine distance d; its weight is 1 - d₁/d₂.

    Args:
        source: ``[N, C]`` features, of any length.
        target: ``[M, C]`` features, two or more.
        most: matches that are kept.
        chunk: sources at a time.
    """
    target = F.normalize(target, dim=1)
    weights, nearest = [], []
    for part in F.normalize(source, dim=1).split(chunk):
        distance, index = (1 - part @ target.T).topk(2, dim=1, largest=False)
        weights.append(1 - distance[:, 0] / distance[:, 1].clamp(min=1e-9))
        nearest.append(index[:, 0])
    weight = torch.cat(weights)
    best = weight.topk(min(most, len(weight)))
    return Matches(best.indices, torch.cat(nearest)[best.indices], best.values)


def best_cells(queries: Tensor, target: Tensor) -> Tensor:
    """Return the cell (column, row) of a map ``[C, h, w]`` most like each of ``[K, C]``."""
    cells = F.normalize(target, dim=0).flatten(1)  # [C, h * w]
    index = (F.normalize(queries, dim=1) @ cells).argmax(dim=1)
    width = target.shape[2]
    return torch.stack([index % width, index // width], dim=1)


def transferred(
    source: Tensor, target: Tensor, source_points: Tensor, as_published: bool = False
) -> Tensor:
    """Return where keypoints land that are carried from one map to another, ``[K, 2]`` (x, y).

    Args:
        source: ``[C, h, w]`` features of a square image; so are those of ``target``.
        target: ``[C, h, w]``.
        source_points: ``[K, 2]`` (x, y) in [0, 1] of the source image.
        as_published: Probe3D's SPair arithmetic: the source is sampled as if its outer cells had
            their centres on the image's rim, and a match is the upper left corner of its cell, a
            bias of up to a cell. By default both are at cells' centres.
    """
    grid = (2 * source_points - 1)[None, None]
    unit = F.normalize(source[None], dim=1)  # first, so that no cell outweighs its neighbours
    queries = F.grid_sample(unit, grid, align_corners=as_published)[0, :, 0].T  # [K, C]
    h, w = target.shape[1:]
    found = best_cells(queries, target) + (0.0 if as_published else 0.5)
    return found / torch.tensor([w, h], device=found.device)


def transfer_errors(
    source: Tensor,
    target: Tensor,
    source_points: Tensor,
    target_points: Tensor,
    as_published: bool = False,
) -> Tensor:
    """Return how far :func:`transferred` points land from the truth ``target_points``, ``[K]``."""
    landed = transferred(source, target, source_points, as_published)
    return (landed - target_points).norm(dim=1)


def pck_per_point(errors: list[Tensor], threshold: float) -> float:
    """Return the share of all points within a threshold; errors ``[K]`` of each image pair."""
    return (torch.cat(errors) < threshold).double().mean().item()


def pck_per_image(errors: list[Tensor], threshold: float) -> float:
    """Return the mean over pairs of the share of a pair's points within a threshold."""
    return torch.stack([(error < threshold).double().mean() for error in errors]).mean().item()
