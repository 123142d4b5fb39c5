import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_distill.errors import DataError
from radio_distill.normalize.statistics import FLOOR, SummaryMoments


def of_parts(parts: list[torch.Tensor], starts: list[int], kept: int = 64) -> SummaryMoments:
    moments = SummaryMoments(parts[0].shape[1], kept)
    for part, start in zip(parts, starts, strict=True):
        moments.update(part, start)
    return moments


def dispersion_of(summaries: torch.Tensor, kept: int = 64) -> float:
    return of_parts([summaries], [0], kept).dispersion()


def draw(number: int, channels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, channels, generator=generator) + 0.5


def ring(polar: float, number: int = 8) -> torch.Tensor:
    """``[n, 3]`` unit vectors at one angle from the first axis, evenly around it."""
    turn = torch.arange(number, dtype=torch.float64) * (2 * math.pi / number)
    around = math.sin(polar) * torch.stack([turn.cos(), turn.sin()], 1)
    return torch.cat([torch.full((number, 1), math.cos(polar)).double(), around], 1)


@pytest.mark.parametrize("polar", [0.01, 0.7, 1.5])
def test_dispersion__of_a_ring_is_its_angle_squared(polar):
    assert dispersion_of(ring(polar)) == pytest.approx(polar**2, rel=1e-6)


def test_dispersion__of_two_rings_is_the_mean():
    summaries = torch.cat([ring(0.3), ring(1.1)])
    assert dispersion_of(summaries) == pytest.approx((0.3**2 + 1.1**2) / 2, rel=1e-6)


def test_dispersion__mean_direction_is_that_of_lengths_too():
    """Two directions at a right angle, one three times as long: the mean is at atan(1/3) of it."""
    near = math.atan(1 / 3)
    expected = (near**2 + (math.pi / 2 - near) ** 2) / 2
    assert dispersion_of(torch.tensor([[3.0, 0.0], [0.0, 1.0]])) == pytest.approx(expected)


def test_dispersion__of_one_direction_is_the_floor():
    assert dispersion_of(torch.tensor([[0.3, 0.4, 0.5]]).repeat(5, 1)) == FLOOR


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_dispersion__does_not_depend_on_the_scale(scale, seed):
    summaries = draw(20, 5, seed).double()
    scaled = dispersion_of(summaries * scale)
    assert scaled == pytest.approx(dispersion_of(summaries), rel=1e-6)


def test_dispersion__of_a_von_mises_fisher_distribution():
    """On the sphere in three dimensions, whose density in θ is that of exp(κ cos θ) sin θ."""
    kappa, number = 4.0, 2000
    theta = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    density = torch.exp(kappa * theta.cos()) * theta.sin()
    expected = torch.trapezoid(density * theta**2, theta) / torch.trapezoid(density, theta)
    # Its quantiles, each as a ring, so that the mean direction is exactly the axis.
    share = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    polar = torch.acos(1 + torch.log(share + (1 - share) * math.exp(-2 * kappa)) / kappa)
    summaries = torch.cat([ring(float(angle), 4) for angle in polar])
    measured = dispersion_of(summaries, kept=len(summaries))
    assert measured == pytest.approx(float(expected), rel=1e-3)


def test_dispersion__angles_of_the_first_images_to_the_mean_of_all():
    first, rest = ring(0.5), ring(1.0)
    assert dispersion_of(torch.cat([first, rest]), kept=8) == pytest.approx(0.25, rel=1e-6)
    tilted = torch.tensor([[0.0, 1.0, 0.0]]).repeat(8, 1)
    with_tilt = of_parts([first, tilted], [0, 8], kept=8).dispersion()
    mean = torch.cat([first, tilted]).sum(0)
    expected = torch.acos(first @ mean / mean.norm()).square().mean()
    assert with_tilt == pytest.approx(float(expected), rel=1e-6)


def test_dispersion__error_without_summaries():
    with pytest.raises(DataError, match="no summaries"):
        SummaryMoments(4, 8).dispersion()


def test_dispersion__refuses_an_image_counted_twice():
    summaries = draw(3, 4)
    with pytest.raises(AssertionError, match="twice"):
        of_parts([summaries, summaries], [0, 2]).dispersion()


def test_update__keeps_no_graph_and_ignores_autocast():
    summaries = draw(4, 6).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = of_parts([summaries], [0])
    assert moments.dispersion() == dispersion_of(summaries.detach())


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(sum),
    kept=st.sampled_from([1, 7, 64]),
    data=st.data(),
)
def test_update__any_split_in_any_order_gives_the_whole(sizes, kept, data):
    whole = draw(sum(sizes), 5)
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    parts = data.draw(st.permutations(list(itertools.pairwise(starts))))
    moments = of_parts([whole[start:stop] for start, stop in parts], [at for at, _ in parts], kept)
    assert moments.count == len(whole)
    assert moments.dispersion() == pytest.approx(dispersion_of(whole, kept), rel=1e-12)


def test_all_reduce__alone_changes_nothing():
    moments = of_parts([draw(5, 4)], [0])
    before = moments.dispersion()
    moments.all_reduce()
    assert moments.dispersion() == before
    assert moments.count == 5


def reduce_on_rank(rank: int, parts: list[torch.Tensor], starts: list[int]) -> tuple[int, float]:
    moments = of_parts([parts[rank]], [starts[rank]], kept=10)
    moments.all_reduce()
    return moments.count, moments.dispersion()


@pytest.mark.distributed
def test_all_reduce__two_processes_equal_one(two_processes):
    whole = draw(13, 6)
    first, second = two_processes(reduce_on_rank, list(whole.split([8, 5])), [0, 8])
    assert first == second
    count, dispersion = first
    assert count == 13
    assert dispersion == pytest.approx(dispersion_of(whole, kept=10), rel=1e-12)
