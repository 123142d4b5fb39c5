import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_distill.errors import DataError
from radio_distill.normalize.statistics import CHUNK, Moments


def assert_same(moments: Moments, other: Moments, rtol: float = 1e-12) -> None:
    assert moments.count == other.count
    torch.testing.assert_close(moments.mean, other.mean, rtol=rtol, atol=1e-13)
    torch.testing.assert_close(moments.covariance, other.covariance, rtol=rtol, atol=1e-13)


def of_parts(parts: list[torch.Tensor]) -> Moments:
    moments = Moments(parts[0].shape[1])
    for part in parts:
        moments.update(part)
    return moments


def test_update__equals_torch_cov(skewed_tokens, moments_of):
    tokens = skewed_tokens(20, 500)
    moments = moments_of(tokens)
    expected = torch.cov(tokens.T, correction=0)
    assert moments.count == 500
    torch.testing.assert_close(moments.mean, tokens.mean(0), rtol=1e-14, atol=0)
    assert (moments.covariance - expected).abs().max() <= 1e-14 * expected.abs().max()


def test_update__tokens_of_a_map_are_its_positions():
    spatial = torch.randn(3, 5, 4, 7)
    tokens = spatial.double().permute(0, 2, 3, 1).reshape(-1, 5)
    moments = of_parts([spatial])
    torch.testing.assert_close(moments.covariance, torch.cov(tokens.T, correction=0))


def test_update__large_mean_costs_no_digits():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1000, 4, dtype=torch.float64, generator=generator)
    expected = torch.cov(tokens.T, correction=0)
    moments = of_parts([(part + 1e6).T[None, :, :, None] for part in tokens.split(100)])
    # The data itself is rounded to 1e6 * 1e-16 = 1e-10; sums of raw squares would be off by 1e-4.
    assert (moments.covariance - expected).abs().max() < 1e-9


def test_update__more_tokens_than_a_chunk():
    spatial = torch.randn(3, 2, CHUNK // 2, 1)
    tokens = spatial.double().permute(0, 2, 3, 1).reshape(-1, 2)
    moments = of_parts([spatial])
    assert moments.count == len(tokens) > CHUNK
    torch.testing.assert_close(moments.covariance, torch.cov(tokens.T, correction=0))


def test_update__counts_valid_tokens_only():
    spatial, valid = torch.randn(2, 6, 3, 4), torch.rand(2, 3, 4) > 0.4
    tokens = spatial.permute(0, 2, 3, 1)[valid].double()
    spatial.permute(0, 2, 3, 1)[~valid] = float("nan")
    moments = Moments(6)
    moments.update(spatial, valid)
    assert moments.count == int(valid.sum())
    torch.testing.assert_close(moments.covariance, torch.cov(tokens.T, correction=0))


def test_update__no_valid_token_changes_nothing():
    moments = of_parts([torch.randn(2, 3, 4, 4)])
    before = moments.covariance.clone()
    moments.update(torch.randn(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool))
    assert moments.count == 32
    assert torch.equal(moments.covariance, before)


def test_update__keeps_no_graph_and_ignores_autocast():
    spatial = torch.randn(2, 8, 4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = of_parts([spatial])
    assert not moments.covariance.requires_grad
    tokens = spatial.detach().double().permute(0, 2, 3, 1).reshape(-1, 8)
    torch.testing.assert_close(moments.covariance, torch.cov(tokens.T, correction=0))


def test_covariance__error_without_tokens():
    with pytest.raises(DataError, match="no tokens"):
        _ = Moments(4).covariance


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(sizes=sizes, channels=st.integers(1, 6), seed=st.integers(0, 99))
def test_update__any_split_gives_the_whole(sizes, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(1, channels, sum(sizes), 1, dtype=torch.float64, generator=generator) + 3
    assert_same(of_parts(list(whole.split(sizes, dim=2))), of_parts([whole]))


def test_from_state__gives_equal_moments():
    moments = of_parts([torch.randn(2, 5, 3, 3)])
    for copy in (Moments.from_state(moments.state()), pickle.loads(pickle.dumps(moments))):
        assert_same(copy, moments, rtol=0)
    continued = Moments.from_state(moments.state())
    extra = torch.randn(1, 5, 2, 2)
    continued.update(extra)
    moments.update(extra)
    assert_same(continued, moments, rtol=0)


def test_all_reduce__alone_changes_nothing():
    moments = of_parts([torch.randn(2, 5, 3, 3)])
    before = moments.covariance.clone()
    moments.all_reduce()
    assert torch.equal(moments.covariance, before)


def reduce_on_rank(rank: int, parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    moments = of_parts([parts[rank]])
    moments.all_reduce()
    return moments.state()


@pytest.mark.distributed
def test_all_reduce__two_processes_equal_one(two_processes):
    whole = torch.randn(1, 6, 27, 1) * 4 + 9
    cases = [list(whole.split([20, 7], dim=2)), [whole, whole[:, :, :0]]]  # unequal, and nothing
    for parts in cases:
        first, second = two_processes(reduce_on_rank, parts)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert_same(Moments.from_state(first), of_parts([whole]))
