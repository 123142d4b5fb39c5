"""Images drawn evenly over a hierarchy of clusters (Vo et al. 2024, section 3.3).

From the highest level down, each node shares what it may give among its children as water fills
basins: all get as much, but for those that have less.
"""

from collections.abc import Sequence

import numpy as np

from ..data.order import random_stream

_SHARES, _IMAGES = 0, 1  # what draws are for


def quotas(sizes: np.ndarray, total: int, draws: np.random.Philox) -> np.ndarray:
    """Share ``total`` among basins: min(x, size) each, and what is left over one by one at random.

    Args:
        sizes: int64 ``[K]``, which hold at least ``total`` together.
        total: to share.
        draws: which of the basins that hold more get one more.
    """
    assert total <= sizes.sum(), "there is as much as is asked for"
    low, high = 0, int(sizes.max(initial=0))  # the largest level at which it is enough for all
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if np.minimum(sizes, level).sum() <= total else (low, level - 1)
    shares = np.minimum(sizes, low)
    larger = np.flatnonzero(sizes > low)
    order = np.argsort(draws.random_raw(len(larger)), kind="stable")
    shares[larger[order[: total - shares.sum()]]] += 1
    return shares


def balanced(levels: Sequence[np.ndarray], total: int, seed: int) -> np.ndarray:
    """Draw images evenly from clusters, from clusters of these, and so on; bool ``[N]``.

    Args:
        levels: for each level the cluster that each item below is in: ``[N]``, ``[K1]``, ``[K2]``…
        total: images to draw; with as many as there are, or more, all are.
        seed: of the draws.
    """
    number = len(levels[0])
    if total >= number:
        return np.ones(number, bool)
    sizes = [np.bincount(levels[0])]  # images below each cluster, by level
    for labels in levels[1:]:
        sizes.append(np.bincount(labels, weights=sizes[-1]).astype(np.int64))
    draws = random_stream(seed, _SHARES)
    shares = quotas(sizes[-1], total, draws)
    for labels, below in zip(reversed(levels[1:]), reversed(sizes[:-1]), strict=True):
        shares = _to_children(shares, labels, below, draws)
    return _drawn(levels[0], shares, random_stream(seed, _IMAGES))


def _to_children(
    shares: np.ndarray, labels: np.ndarray, sizes: np.ndarray, draws: np.random.Philox
) -> np.ndarray:
    """Share what each node may give among its children, which are sorted by their node."""
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels, minlength=len(shares)))
    found = np.zeros_like(sizes)
    for share, children in zip(shares.tolist(), np.split(order, ends[:-1]), strict=True):
        found[children] = quotas(sizes[children], share, draws)
    return found


def _drawn(labels: np.ndarray, shares: np.ndarray, draws: np.random.Philox) -> np.ndarray:
    """Draw of each cluster as many of its images as its share."""
    order = np.lexsort((draws.random_raw(len(labels)), labels))  # by cluster, shuffled within
    starts = np.cumsum(np.bincount(labels, minlength=len(shares))) - np.bincount(labels)
    rank = np.arange(len(labels)) - starts[labels[order]]
    drawn = np.zeros(len(labels), bool)
    drawn[order] = rank < shares[labels[order]]
    return drawn
