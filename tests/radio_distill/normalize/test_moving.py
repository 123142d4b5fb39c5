"""Statistics that follow the training equal the papers' formulas, on any number of processes."""

import math

import pytest
import torch

from radio_distill.normalize import NORMALIZERS, moving
from radio_distill.normalize.moving import BatchStandardise, EmaStandardise, momentum
from radio_distill.normalize.statistics import Moments

CPU = torch.device("cpu")
STEPS = 5


@pytest.fixture
def steps():
    """The maps of five steps, each step's of another mean and deviation; and what came before."""
    maps = [torch.randn(4, 3, 2, 5) * (index + 1) + 10 * index for index in range(STEPS)]
    before = Moments(3)
    before.update(torch.randn(8, 3, 4, 4))
    return maps, before


def of_tokens(maps):
    """Return mean and deviation of each channel, ``[C, 1, 1]``."""
    tokens = maps.double().transpose(0, 1).flatten(1)
    mean = tokens.mean(1)
    deviation = (tokens - mean[:, None]).square().mean(1).sqrt()
    return mean[:, None, None], deviation[:, None, None]


def test_momentum__is_half_a_cosine_from_1_to_a_thousandth():
    assert [momentum(at) for at in (0, 0.5, 1)] == pytest.approx([1, 0.5005, 0.001])
    assert momentum(0.25) == pytest.approx(0.001 + 0.999 * (1 + math.cos(math.pi / 4)) / 2)


def test_ema_standardise__is_the_average_before_the_step(steps):
    maps, before = steps
    normalizer = EmaStandardise().fit(before)
    mean = before.mean[:, None, None]
    deviation = before.covariance.diagonal().sqrt()[:, None, None]
    for index, spatial in enumerate(maps):
        for part in spatial.split(3):  # in two passes; the second still sees the average before
            normalizer.observe(part)
            expected = (part.double() - mean) / (deviation + 1e-6)
            torch.testing.assert_close(normalizer.apply(part.double()), expected)
        normalizer.end_step(index / STEPS, CPU)
        share, (new_mean, new_deviation) = momentum(index / STEPS), of_tokens(spatial)
        mean = (1 - share) * mean + share * new_mean
        deviation = (1 - share) * deviation + share * new_deviation


def test_batch_standardise__is_of_the_step_in_training_and_of_the_average_behind_it(steps):
    maps, before = steps
    maps[1][:, 2] = 7.0  # a channel that does not vary: its deviation is 1e-3
    normalizer = BatchStandardise().fit(before)
    mean = before.mean[:, None, None]
    deviation = before.covariance.diagonal().sqrt()[:, None, None]
    for index, spatial in enumerate(maps):
        for part in spatial.split(3):
            normalizer.observe(part)
        normalizer.begin_step(CPU)
        new_mean, new_deviation = of_tokens(spatial)
        new_deviation = new_deviation.clamp(min=1e-3)
        exact = spatial.double()
        expected = (exact - new_mean) / new_deviation
        torch.testing.assert_close(normalizer.apply(exact), expected, atol=1e-6, rtol=1e-6)
        normalizer.end_step(index / STEPS, CPU)
        share = momentum(index / STEPS)
        mean = (1 - share) * mean + share * new_mean
        deviation = (1 - share) * deviation + share * new_deviation
        expected = (exact - mean) / deviation
        torch.testing.assert_close(normalizer.apply(exact), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", [EmaStandardise, BatchStandardise])
def test_forget_step__a_skipped_step_counts_for_nothing(kind, steps):
    maps, before = steps
    plain, skipping = kind().fit(before), kind().fit(before)
    for index, spatial in enumerate(maps):
        for normalizer in (plain, skipping):
            normalizer.observe(spatial)
            normalizer.begin_step(CPU)
            normalizer.end_step(index / STEPS, CPU)
        skipping.observe(spatial * 100)
        skipping.begin_step(CPU)
        skipping.forget_step()
    for name, value in plain.state().items():
        torch.testing.assert_close(skipping.state()[name], value)


@pytest.mark.parametrize("kind", [EmaStandardise, BatchStandardise])
def test_end_step__a_teacher_that_nobody_saw_keeps_its_statistics(kind, steps):
    _, before = steps
    normalizer = kind().fit(before)
    expected = normalizer.state()
    normalizer.begin_step(CPU)
    normalizer.end_step(0.0, CPU)
    for name, value in normalizer.state().items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("kind", [EmaStandardise, BatchStandardise])
@pytest.mark.parametrize("cuts", [[2, 2], [4, 0], [1, 1, 2]])
def test_processes__share_their_statistics(kind, cuts, steps, monkeypatch):
    """Any number of them, of which some may see nothing, end as one that sees it all."""
    maps, before = steps
    alone, ranks = kind().fit(before), [kind().fit(before) for _ in cuts]
    for index, spatial in enumerate(maps):
        alone.observe(spatial)
        alone.begin_step(CPU)
        for rank, part in zip(ranks, spatial.split(cuts), strict=True):
            if len(part):
                rank.observe(part)
        sums = [rank._sums for rank in ranks if rank._sums is not None]
        with monkeypatch.context() as patch:
            patch.setattr(moving, "all_reduce_sum", lambda _, sums=sums: sum(sums))
            for rank in ranks:
                rank.begin_step(CPU)
            for rank in ranks:
                torch.testing.assert_close(rank.apply(spatial), alone.apply(spatial))
                rank.end_step(index / STEPS, CPU)
        alone.end_step(index / STEPS, CPU)
    for rank in ranks:
        for name, value in alone.state().items():
            torch.testing.assert_close(rank.state()[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ema_standardise", "batch_standardise"])
def test_state__a_run_that_is_resumed_goes_on_with_the_same_bits(name, steps):
    maps, before = steps
    whole, interrupted = (NORMALIZERS.get(name)().fit(before) for _ in range(2))
    for index, spatial in enumerate(maps):
        interrupted = NORMALIZERS.get(name)().load_state(interrupted.state())
        for normalizer in (whole, interrupted):
            normalizer.observe(spatial)
            normalizer.begin_step(CPU)
            normalizer.end_step(index / STEPS, CPU)
    assert all(torch.equal(whole.state()[key], interrupted.state()[key]) for key in whole.state())
