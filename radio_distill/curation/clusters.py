"""k-means, and k-means of its centroids: hierarchical k-means of Vo et al. (2024), section 3.

The density of k-means' centroids follows p^(d / (d + 2)), in many dimensions nearly that of the
data, p. Clusters of centroids are a step flatter, and so are clusters of as many points of each
cluster (resampling), so that the highest level covers what there is evenly, not what is frequent.

:func:`balanced` draws images evenly over that hierarchy (section 3.3): from the highest level down,
each node shares what it may give among its children as water fills basins: all get as much, but for
those that have less.

Points are ``[N, S]`` in half precision on the CPU; blocks of them go to the device. Distances are
float32, sums float64. The draws are Philox's, which no version of a library changes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..data.order import random_stream

Say = Callable[[str], None]

ITERATIONS = 50
"""Of k-means at most; it ends when no point changes its cluster."""
_BLOCK = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Distances, or numbers of points, at a time: what stays in a core's cache, or fills a GPU."""
_START_POINTS = 16
"""Points for each cluster among which k-means++ looks for its start."""
_ROUNDS = 10  # of resampling, at each level but the first
_FINEST, _FULLEST = 5, 50
"""Images of a cluster of the first level, of few images and of many."""
_FEW = 10_000  # clusters
_NEXT, _LEAST = 10, 1000  # clusters in one of the level above, and at least there
_SHARES, _IMAGES = 0, 1  # what draws of images are for


@dataclass(frozen=True)
class Clusters:
    """One level."""

    centroids: Tensor
    """``[K, S]`` float32, each the mean of its points."""
    labels: Tensor
    """``[N]`` int64: the cluster of each point; none of the K is empty."""
    distances: Tensor
    """``[N]`` float32: squared distance of each point to its centroid."""

    @property
    def sizes(self) -> Tensor:
        """Points of each cluster, ``[K]``."""
        return torch.bincount(self.labels, minlength=len(self.centroids))


def level_sizes(num_images: int) -> tuple[int, ...]:
    """Return how many clusters each level has where nobody says.

    The first has one for 50 images, as the published ones, but for few images one for 5, at most
    10,000; each level above a tenth, but none less than 1,000. A level with fewer clusters than
    there are kinds of images makes them less even than chance does.
    """
    sizes = [max(1, num_images // _FULLEST, min(num_images // _FINEST, _FEW))]
    while sizes[-1] // _NEXT >= _LEAST:
        sizes.append(sizes[-1] // _NEXT)
    return tuple(sizes)


def next_level(
    points: Tensor,
    levels: Sequence[Clusters],
    count: int,
    seed: int,
    device: torch.device,
    say: Say = lambda text: None,
) -> Clusters:
    """Cluster points ``[N, S]``, or, where there are levels, the highest one's centroids."""
    key = (seed, len(levels))
    if not levels:
        return resampled(points, count, 0, key, device, say)
    return resampled(levels[-1].centroids, count, _ROUNDS, key, device, say)


def resampled(
    points: Tensor,
    count: int,
    rounds: int,
    key: Sequence[int],
    device: torch.device,
    say: Say = lambda text: None,
) -> Clusters:
    """Return ``count`` clusters: k-means, then as often as ``rounds`` of a flatter sample.

    In a round the sample is, of each cluster, those of its points that are nearest to its centroid,
    half of the mean cluster; k-means of the sample gives new centroids, and all points go to these.
    """
    begin = starts(points, count, (*key, 0), device, say)
    clusters = k_means(points, begin, device, say=say)
    for number in range(1, rounds + 1):
        taken = nearest_members(clusters, -(-len(points) // (2 * count)))
        sample = points[taken]
        say(f"round {number} of {rounds}")
        found = k_means(sample, starts(sample, count, (*key, number), device), device)
        clusters = without_empty(*assigned(points, found.centroids, device), found.centroids)
    return clusters


def k_means(
    points: Tensor,
    centroids: Tensor,
    device: torch.device,
    iterations: int = ITERATIONS,
    say: Say = lambda text: None,
) -> Clusters:
    """Move centroids ``[K, S]`` to the means of what is nearest to them, until nothing changes.

    A centroid that loses all its points is dropped at the end (Lloyd 1982).
    """
    labels, distances = assigned(points, centroids, device)
    for number in range(1, iterations + 1):
        say(f"{len(centroids):,} clusters, iteration {number} of at most {iterations}")
        centroids = _means(points, labels, centroids, device)
        before = labels
        labels, distances = assigned(points, centroids, device)
        if torch.equal(before, labels):
            break
    return without_empty(labels, distances, centroids)


def assigned(points: Tensor, centroids: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the nearest centroid of each point, ``[N]``, and the squared distances, ``[N]``."""
    there = centroids.to(device)
    lengths = there.square().sum(dim=1)
    labels, distances = [], []
    for block in points.split(max(1, _BLOCK[device.type] // len(centroids))):
        here = block.to(device).float()
        least = torch.addmm(lengths, here, there.T, alpha=-2).min(dim=1)
        labels.append(least.indices.cpu())
        distances.append((least.values + here.square().sum(dim=1)).clamp(min=0).cpu())
    return torch.cat(labels), torch.cat(distances)


def without_empty(labels: Tensor, distances: Tensor, centroids: Tensor) -> Clusters:
    """Number the clusters that have points anew, in their order."""
    used, labels = labels.unique(return_inverse=True)
    return Clusters(centroids[used], labels, distances)


def _means(points: Tensor, labels: Tensor, before: Tensor, device: torch.device) -> Tensor:
    """Return the means of the clusters, ``[K, S]``; that of an empty one is what it was."""
    sums = torch.zeros(before.shape, dtype=torch.float64, device=device)
    pieces = max(1, _BLOCK[device.type] // points.shape[1])
    for block, numbers in zip(points.split(pieces), labels.split(pieces), strict=True):
        sums.index_add_(0, numbers.to(device), block.to(device).double())
    counts = torch.bincount(labels, minlength=len(before))[:, None]
    return torch.where(counts > 0, (sums.cpu() / counts.clamp(min=1)).float(), before.cpu())


def starts(
    points: Tensor,
    count: int,
    key: Sequence[int],
    device: torch.device,
    say: Say = lambda text: None,
) -> Tensor:
    """Draw points that lie apart, ``[min(count, N), S]`` float32: greedy k-means++.

    Each is the best of a few that are drawn with probabilities proportional to the squared distance
    to those before it (Arthur & Vassilvitskii 2007), out of some sixteen points for each that is
    wanted. The best is that with the least squared distances to be left.
    """
    draws = random_stream(*key)
    some = np.sort(
        np.argsort(draws.random_raw(len(points)), kind="stable")[: _START_POINTS * count]
    )
    sample = points[torch.from_numpy(some)].to(device).float()
    tries = 2 + int(math.log(count))
    shares = torch.from_numpy(draws.random_raw(count * tries) / 2.0**64).view(count, tries)
    lengths = sample.square().sum(dim=1)
    far = torch.ones(len(sample), dtype=torch.float64, device=device)  # the first: any
    chosen: list[Tensor] = []
    for share in shares[: len(sample)].to(device):
        sums = far.cumsum(dim=0)
        places = torch.searchsorted(sums, share * sums[-1], right=True).clamp(max=len(sample) - 1)
        apart = lengths + lengths[places][:, None] - 2 * sample[places] @ sample.T
        left = apart.clamp(min=0).double().scatter(1, places[:, None], 0.0)
        left = torch.minimum(far, left) if chosen else left[:1]
        best = left.sum(dim=1).argmin()
        far = left[best]
        chosen.append(places[best])
        if len(chosen) % 100 == 0:
            say(f"start {len(chosen):,} of {count:,}")
    return sample[torch.stack(chosen)].cpu()


def nearest_members(clusters: Clusters, count: int) -> Tensor:
    """Return the points, by number and rising, that are the ``count`` nearest to their centroid."""
    order = np.lexsort((clusters.distances.numpy(), clusters.labels.numpy()))
    ends = [0, *np.cumsum(clusters.sizes.numpy()).tolist()]
    taken = [order[start : min(start + count, end)] for start, end in pairwise(ends)]
    return torch.from_numpy(np.sort(np.concatenate(taken)))


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
