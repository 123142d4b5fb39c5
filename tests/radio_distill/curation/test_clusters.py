import numpy as np
import pytest
import torch

from radio_distill.curation.clusters import (
    Clusters,
    assigned,
    k_means,
    level_sizes,
    nearest_members,
    next_level,
    resampled,
    starts,
)

CPU = torch.device("cpu")


@pytest.fixture
def points() -> torch.Tensor:
    """Three hundred points around twelve centres, with overlap."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(12, 8, generator=generator)
    noise = torch.randn(300, 8, generator=generator)
    return (centres[torch.arange(300) % 12] + 0.6 * noise).half()


def test_k_means__is_scikit_learns_from_the_same_start(points):
    cluster = pytest.importorskip("sklearn.cluster")
    begin = points[:12].float()
    theirs = cluster.KMeans(12, init=begin.numpy(), n_init=1, max_iter=50, tol=0, algorithm="lloyd")
    theirs.fit(points.float().numpy())
    ours = k_means(points, begin, CPU)
    assert 2 < theirs.n_iter_ < 50
    assert ours.labels.tolist() == theirs.labels_.tolist()
    np.testing.assert_allclose(ours.centroids, theirs.cluster_centers_, atol=1e-5)
    assert float(ours.distances.sum()) == pytest.approx(theirs.inertia_, rel=1e-5)


def test_k_means__by_brute_force_at_every_iteration(points):
    data = points.double()
    centroids = data[:5].clone()
    for iterations in range(1, 5):
        labels = (data[:, None] - centroids).square().sum(dim=2).argmin(dim=1)
        centroids = torch.stack([data[labels == number].mean(dim=0) for number in range(5)])
        ours = k_means(points, points[:5].float(), CPU, iterations)
        torch.testing.assert_close(ours.centroids.double(), centroids, atol=1e-6, rtol=0)


def test_assigned__by_brute_force(points):
    centroids = points[::7].double()
    labels, distances = assigned(points, centroids.float(), CPU)
    theirs = (points.double()[:, None] - centroids).square().sum(dim=2).min(dim=1)
    assert torch.equal(labels, theirs.indices)
    torch.testing.assert_close(distances.double(), theirs.values, atol=1e-4, rtol=0)


def test_k_means__drops_a_cluster_that_loses_its_points():
    points = torch.tensor([[0.0], [1.0], [10.0], [11.0]]).half()
    ours = k_means(points, torch.tensor([[0.0], [100.0], [10.0]]), CPU)
    assert ours.centroids.flatten().tolist() == [0.5, 10.5]
    assert ours.labels.tolist() == [0, 0, 1, 1]


def test_starts__take_one_of_each_far_group():
    centres = 100 * torch.eye(10)
    generator = torch.Generator().manual_seed(1)
    numbers = torch.arange(400) % 10
    points = (centres[numbers] + 0.01 * torch.randn(400, 10, generator=generator)).half()
    for seed in range(5):
        found = starts(points, 10, (seed,), CPU)
        assert sorted(found.argmax(dim=1).tolist()) == list(range(10))


def test_starts__are_the_better_of_two_draws_by_squared_distance():
    """From 0, 1 is drawn by 1 : 1.44 against -1.2; it stays only where both draws are 1."""
    points = torch.tensor([[0.0], [1.0], [-1.2]]).half()
    pairs = [starts(points, 2, (seed,), CPU).flatten().tolist() for seed in range(900)]
    seconds = [second for first, second in pairs if first == 0]
    share, expected = seconds.count(1.0) / len(seconds), (1 / 2.44) ** 2
    assert 250 < len(seconds) < 350
    assert abs(share - expected) < 4 * (expected * (1 - expected) / len(seconds)) ** 0.5
    assert sorted(starts(points, 5, (0,), CPU).flatten().tolist()) == pytest.approx(
        [-1.2, 0, 1], abs=1e-3
    )


def test_equal_points_make_one_cluster():
    points = torch.ones(20, 4).half()
    assert len(resampled(points, 3, 2, (0,), CPU).centroids) == 1


def test_nearest_members():
    labels, distances = torch.tensor([0, 1, 0, 0, 1]), torch.tensor([3.0, 1.0, 1.0, 2.0, 0.0])
    clusters = Clusters(torch.zeros(2, 1), labels, distances)
    assert nearest_members(clusters, 2).tolist() == [1, 2, 3, 4]
    assert nearest_members(clusters, 1).tolist() == [2, 4]


def hierarchy(points, sizes, seed):
    levels = []
    for size in sizes:
        levels.append(next_level(points, levels, size, seed, CPU))
    return levels


def test_higher_levels_are_flatter():
    """On a line on which nine tenths of the points lie in a tenth of the length.

    k-means in one dimension gives centroids of density p^(1/3); clusters of these are flatter yet.
    """
    generator = torch.Generator().manual_seed(2)
    dense, thin = (
        torch.rand(2700, 1, generator=generator) / 10,
        torch.rand(300, 1, generator=generator),
    )
    levels = hierarchy(torch.cat([dense, thin]).half(), (300, 30), 0)
    shares = [float((level.centroids < 0.1).float().mean()) for level in levels]
    assert 0.9 > shares[0] > 1.15 * shares[1]
    assert [len(level.centroids) for level in levels] == [300, 30]


def test_hierarchy__is_a_function_of_the_seed(points):
    first, again, other = (hierarchy(points, (30, 5), seed) for seed in (0, 0, 1))
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.labels, two.labels)
        assert torch.equal(one.centroids, two.centroids)
    assert not torch.equal(first[0].labels, other[0].labels)


def test_level_sizes():
    sizes = {
        1: (1,),
        30: (6,),
        1200: (240,),
        100_000: (10_000, 1_000),
        10_000_000: (200_000, 20_000, 2_000),
    }
    assert {number: level_sizes(number) for number in sizes} == sizes
