import numpy as np
import pytest
import torch
from torch.nn import functional as F

from radio_distill.curation import duplicates
from radio_distill.curation.duplicates import Pairs, groups_of, kept_of_groups, near_pairs
from radio_distill.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def vectors() -> torch.Tensor:
    """Ninety unit vectors, of which every third is near the one before it."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(90, 16, generator=generator)
    points[2::3] = points[1::3] + 0.1 * torch.randn(30, 16, generator=generator)
    return F.normalize(points, dim=1).half()


def brute_force(first, second, threshold):
    cosines = F.cosine_similarity(first.double()[:, None], second.double()[None], dim=2)
    return {(i, j): cosines[i, j] for i, j in (cosines >= threshold).nonzero().tolist()}


@pytest.mark.parametrize("rows", [7, 4096])
@pytest.mark.parametrize("threshold", [0.3, 0.98])
def test_near_pairs__are_those_of_all_cosines(vectors, rows, threshold, monkeypatch):
    monkeypatch.setattr(duplicates, "_ROWS", rows)
    found = near_pairs(vectors, None, threshold, CPU)
    expected = {
        (i, j): float(value)
        for (i, j), value in brute_force(vectors, vectors, threshold).items()
        if i < j
    }
    pairs = zip(found.first.tolist(), found.second.tolist(), strict=True)
    assert dict(zip(pairs, found.cosine.tolist(), strict=True)) == pytest.approx(expected)
    assert len(expected) >= 25
    others = near_pairs(vectors[:40], vectors[40:], threshold, CPU)
    pairs = set(zip(others.first.tolist(), others.second.tolist(), strict=True))
    assert pairs == set(brute_force(vectors[:40], vectors[40:], threshold))


def test_near_pairs__too_many(vectors, monkeypatch):
    monkeypatch.setattr(duplicates, "MOST_PAIRS", 3)
    with pytest.raises(ConfigError, match=r"--duplicates 0\.01"):
        near_pairs(vectors, None, 0.01, CPU)


def test_near_pairs__zeros_are_like_nothing():
    assert len(near_pairs(torch.zeros(4, 8).half(), None, 0.5, CPU).first) == 0


def test_groups__are_scipys_connected_components():
    sparse = pytest.importorskip("scipy.sparse")
    rng = np.random.default_rng(0)
    first, second = np.sort(rng.integers(0, 500, (2, 300)), axis=0)
    graph = sparse.coo_array((np.ones(300), (first, second)), (500, 500))
    _, theirs = sparse.csgraph.connected_components(graph, directed=False)
    ours = groups_of(500, Pairs(first, second, np.ones(300)))
    assert (
        len(np.unique(ours)) == len(np.unique(theirs)) == len(set(zip(ours, theirs, strict=True)))
    )
    for group in np.unique(ours):
        assert np.flatnonzero(ours == group)[0] == group


def test_a_chain_is_one_group():
    chain = np.arange(50)
    ours = groups_of(51, Pairs(chain[::-1], chain[::-1] + 1, np.ones(50)))
    assert set(ours) == {0}


def test_kept_of_groups__the_largest_then_the_first():
    groups = np.array([0, 1, 0, 1, 4, 0])
    pixels = np.array([10, 30, 20, 30, 1, 20])
    assert kept_of_groups(groups, pixels).tolist() == [2, 1, 2, 1, 4, 2]
