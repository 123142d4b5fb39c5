"""Near-duplicates: images whose summaries are alike, in groups of which one is kept.

Two images are near-duplicates where the cosine of their summaries reaches a threshold; a group is
a connected component of such pairs (DINOv2, appendix A). All pairs are looked at, by blocks on the
device: N²S/2 multiplications.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..types import Report, unheard

_ROWS = 4096  # of a block of pairs
_MARGIN = 4e-3
"""By which the cosine of rounded summaries may be off; candidates are computed anew in float64."""
MOST_PAIRS = 200
"""For each image on the average; with more, the threshold is no threshold."""


class Pairs(NamedTuple):
    """Pairs of a row and another row, and how alike they are."""

    first: np.ndarray
    second: np.ndarray
    cosine: np.ndarray


def near_pairs(
    first: Tensor,
    second: Tensor | None,
    threshold: float,
    device: torch.device,
    progress: Report = unheard,
) -> Pairs:
    """Find the pairs whose cosine is at least ``threshold``, sorted by their rows.

    Args:
        first: unit vectors ``[N, S]`` in half precision, on the CPU; rows of zeros are like none.
        second: ``[M, S]``; None for the rows of ``first`` that come later.
        threshold: above 0.
        device: where products are computed.
        progress: called with rows done and rows in all.

    Raises:
        ConfigError: there are more than ``MOST_PAIRS`` for each row.
    """
    parts, number = [], 0
    for start in range(0, len(first), _ROWS):
        blocks = [*_of_rows(first, second, start, threshold, device)]
        number += sum(len(block.first) for block in blocks)
        if number > MOST_PAIRS * len(first):
            raise ConfigError(
                f"--duplicates {threshold:g}: more than {MOST_PAIRS} pairs for each image are as "
                "much alike; raise the threshold, or name another teacher"
            )
        parts += blocks
        progress(min(start + _ROWS, len(first)), len(first))
    found = Pairs(*map(np.concatenate, zip(*parts, strict=True)))
    order = np.lexsort((found.second, found.first))
    return Pairs(*(column[order] for column in found))


def _of_rows(
    first: Tensor, second: Tensor | None, start: int, threshold: float, device: torch.device
) -> Iterator[Pairs]:
    """Yield the pairs of the rows from ``start`` on, by blocks of the other rows."""
    others = first if second is None else second
    on_gpu = device.type == "cuda"  # whose half precision is fast; a CPU's is emulated
    rows = first[start : start + _ROWS].to(device, torch.half if on_gpu else torch.float)
    for begin in range(start if second is None else 0, len(others), _ROWS):
        columns = others[begin : begin + _ROWS].to(device, rows.dtype)
        found = (rows @ columns.T >= threshold - _MARGIN).nonzero().cpu() + torch.tensor(
            [start, begin]
        )
        if second is None:
            found = found[found[:, 0] < found[:, 1]]
        i, j = found.unbind(dim=1)
        values = cosines(first[i], others[j]).numpy()
        enough = values >= threshold
        yield Pairs(i.numpy()[enough], j.numpy()[enough], values[enough])


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosines of rows ``[N, S]`` and rows, ``[N]`` in float64."""
    return F.cosine_similarity(first.double(), second.double(), dim=1)


def groups_of(number: int, pairs: Pairs) -> np.ndarray:
    """Return the connected component of each of ``number`` images: its first image, ``[N]``."""
    parent = np.arange(number)

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]  # halve the way for those who come later
            index = parent[index]
        return index

    for i, j in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
        low, high = sorted((root(i), root(j)))
        parent[high] = low
    while not np.array_equal(parent, above := parent[parent]):
        parent = above
    return parent


def kept_of_groups(groups: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Return for each image which one stands for its group, ``[N]``.

    That is the one with most pixels, of equals the first: copies are made smaller, seldom larger.
    """
    order = np.lexsort((np.arange(len(groups)), -pixels, groups))
    _, firsts = np.unique(groups[order], return_index=True)
    best = order[firsts]
    return best[np.searchsorted(groups[best], groups)]
