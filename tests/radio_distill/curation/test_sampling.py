import numpy as np
import pytest

from radio_distill.curation.clusters import balanced, quotas
from radio_distill.data.order import random_stream


def test_quotas__fill_as_water_does():
    sizes = np.array([1, 2, 50, 1000, 7])
    assert quotas(sizes, 40, random_stream(0)).tolist() == [1, 2, 15, 15, 7]


@pytest.mark.parametrize("total", [0, 1, 4, 5, 17, 59, 60])
def test_quotas__are_the_fairest_that_there_are(total):
    sizes = np.array([3, 0, 20, 7, 30])
    found = quotas(sizes, total, random_stream(total))
    assert found.sum() == total
    assert (found <= sizes).all()
    # Nobody who could have more has less than another by more than the one that is left over.
    hungry = found[found < sizes]
    assert not len(hungry) or found.max() - hungry.min() <= 1


def test_quotas__what_is_left_over_goes_to_any():
    sizes = np.full(8, 9)
    draws = [quotas(sizes, 11, random_stream(seed)) for seed in range(40)]
    assert all(sorted(found)[-3:] == [2, 2, 2] for found in draws)
    assert (np.sum(draws, axis=0) > 40).all()


def test_balanced__a_long_tail():
    """Clusters of 1,000, 100, 20 and 10 images below two nodes, of which one is a long tail."""
    sizes = [1000, 100, 20, 10]
    images = np.repeat(np.arange(4), sizes)
    drawn = balanced([images, np.array([0, 0, 1, 1])], 80, seed=0)
    by_cluster = np.bincount(images, weights=drawn, minlength=4)
    assert by_cluster.tolist() == [25, 25, 20, 10]  # 50 to node 0; node 1 has no more than 30
    flat = balanced([images], 80, seed=0)
    assert np.bincount(images, weights=flat).tolist() in ([24, 23, 20, 10 + 3], [25, 25, 20, 10])


def test_balanced__of_each_cluster_any_image_alike():
    images = np.repeat(np.arange(2), [10, 90])
    counts = sum(balanced([images], 20, seed).astype(int) for seed in range(300))
    assert set(counts[:10]) == {300}
    expected = 300 * 10 / 90
    assert abs(counts[10:] - expected).max() < 5 * expected**0.5


def test_balanced__all_where_there_are_no_more():
    assert balanced([np.zeros(5, int)], 7, seed=0).all()


def test_balanced__is_a_function_of_the_seed():
    images = np.arange(200) % 7
    assert (balanced([images], 50, 3) == balanced([images], 50, 3)).all()
    assert (balanced([images], 50, 3) != balanced([images], 50, 4)).any()
