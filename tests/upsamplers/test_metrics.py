"""Measures of upsamplers: parity with published values, and identities."""

import pytest
import torch
from torch import Tensor

from radio_distill.errors import DataError
from radio_distill.evals.metrics.fidelity import Fidelity
from radio_distill.normalize.phi_s import PhiS
from radio_distill.normalize.statistics import Moments
from upsamplers.fit.losses import conditional_random_field, total_variation
from upsamplers.metrics import (
    ConditionalRandomField,
    MeanDiscrepancy,
    TotalVariation,
    rbf_gamma,
    squared_mmd,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def fidelity(prediction: Tensor, target: Tensor, valid: Tensor | None = None) -> float:
    measure = Fidelity(target.shape[1])
    measure.update(prediction, target, valid)
    return measure.compute()


# Fidelity


def test_fidelity__is_the_ratio_of_two_errors() -> None:
    target, valid = normal(4, 6, 3, 5) + 100, uniform(4, 3, 5) > 0.3
    prediction = target + 0.3 * normal(4, 6, 3, 5, seed=1)
    tokens = target.movedim(1, -1)[valid].double()
    error = (prediction.movedim(1, -1)[valid].double() - tokens).square().mean()
    expected = (tokens - tokens.mean(0)).square().mean() / error
    assert fidelity(prediction, target, valid) == pytest.approx(expected.item(), rel=1e-9)


def test_fidelity__is_the_same_before_and_after_phi_s() -> None:
    target = normal(64, 8, 4, 4) * torch.linspace(0.1, 5, 8)[:, None, None] + 3
    prediction = target + normal(64, 8, 4, 4, seed=1)
    moments = Moments(8)
    moments.update(target)
    phi_s = PhiS().fit(moments)
    normalised = fidelity(phi_s.apply(prediction), phi_s.apply(target))
    assert normalised == pytest.approx(fidelity(prediction, target), rel=1e-5)
    # Not so where channels are scaled one by one.
    scale = torch.linspace(0.1, 5, 8)[:, None, None]
    assert fidelity(prediction / scale, target / scale) != pytest.approx(normalised, rel=0.1)


def test_fidelity__nothing_valid() -> None:
    with pytest.raises(DataError, match="valid"):
        fidelity(normal(1, 2, 3, 3), normal(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.bool))


# Total variation and the conditional random field


def test_total_variation__parity_featsharp(golden) -> None:
    published = golden("featsharp_tv")
    measure = TotalVariation()
    for feats, valid in zip(published["feats"].split(1), published["valid"].split(1), strict=True):
        measure.update(feats, valid[:, 0] > 0)
    assert measure.compute() == pytest.approx(published["raw"].item(), rel=1e-6)


def test_total_variation__of_equal_images_is_the_mean_loss() -> None:
    maps = normal(3, 4, 6, 7)
    measure = TotalVariation()
    measure.update(maps)
    assert measure.compute() == pytest.approx(total_variation(maps).mean().item(), rel=1e-6)
    constant = TotalVariation()
    constant.update(torch.full((1, 4, 6, 7), 2.5))
    assert constant.compute() == 0


def test_total_variation__a_single_row_has_no_vertical_neighbours() -> None:
    measure = TotalVariation()
    measure.update(normal(1, 4, 1, 7))
    with pytest.raises(DataError, match="2 x 2 cells"):
        measure.compute()


def test_conditional_random_field__is_the_mean_over_images_in_any_order() -> None:
    maps, images = normal(3, 4, 20, 20), uniform(3, 3, 40, 40)
    forward, backward = ConditionalRandomField(100), ConditionalRandomField(100)
    forward.update(maps, images)
    for index in (2, 0, 1):
        backward.update(maps[index : index + 1], images[index : index + 1])
    generator = torch.Generator().manual_seed(0)
    expected = conditional_random_field(maps, images, points=100, generator=generator).mean()
    assert forward.compute() == pytest.approx(expected.item(), rel=1e-6)
    assert backward.compute() == pytest.approx(expected.item(), rel=1e-6)


# Maximum mean discrepancy


@pytest.mark.parametrize("chunk", [7, 1024])
def test_squared_mmd__parity_featsharp(golden, chunk: int) -> None:
    published = golden("featsharp_mmd")
    for gamma, expected in ((published["gamma"].item(), "mmd"), (0.05, "mmd_gamma_005")):
        value = squared_mmd(published["x"], published["y"], gamma, chunk)
        assert value == pytest.approx(published[expected].item(), abs=2e-7)


def test_squared_mmd__is_the_estimator_of_all_pairs() -> None:
    x, y = (normal(9, 4) + 1e3).double(), (normal(7, 4, seed=1) + 1e3).double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-0.1 * (a[:, None] - b).square().sum(-1))

    xx = kernel(x, x).fill_diagonal_(0).sum() / (9 * 8)
    yy = kernel(y, y).fill_diagonal_(0).sum() / (7 * 6)
    expected = xx + yy - 2 * kernel(x, y).mean()
    for chunk in (1, 4, 100):
        assert squared_mmd(x, y, 0.1, chunk) == pytest.approx(expected.item(), abs=1e-9)


def test_squared_mmd__of_one_distribution_scatters_around_zero() -> None:
    values = [
        squared_mmd(normal(60, 5, seed=2 * i), normal(80, 5, seed=2 * i + 1), 0.1)
        for i in range(100)
    ]
    mean, std = torch.tensor(values).mean().item(), torch.tensor(values).std().item()
    assert abs(mean) < 3 * std / 10  # three standard errors
    assert min(values) < 0 < max(values)
    assert squared_mmd(normal(60, 5), normal(80, 5, seed=1) + 1, 0.1) > 10 * std


def test_rbf_gamma__is_of_the_median_among_different_rows() -> None:
    x = torch.tensor([[0.0], [1.0], [3.0]])  # squared distances 1, 4, 9
    assert rbf_gamma(x) == pytest.approx(1 / 8)
    # What the paper prints, gamma = median, sees nothing of normalised features.
    features = normal(50, 384)
    printed = torch.pdist(features).square().median().item()
    assert squared_mmd(features, normal(50, 384, seed=1) + 5, printed) == pytest.approx(0, abs=1e-9)
    assert squared_mmd(features, normal(50, 384, seed=1) + 5, rbf_gamma(features)) > 0.1


def test_mean_discrepancy__sees_all_tokens_of_a_small_set() -> None:
    low, high = normal(4, 6, 3, 5), 1.5 * normal(4, 6, 6, 10, seed=1)
    measure = MeanDiscrepancy(6)
    for index in range(4):
        measure.update(low[index : index + 1], high[index : index + 1])
    x, y = low.movedim(1, -1).reshape(-1, 6), high.movedim(1, -1).reshape(-1, 6)
    assert measure.compute() == pytest.approx(squared_mmd(x, y, rbf_gamma(x)), abs=1e-9)


def test_mean_discrepancy__sample_is_uniform() -> None:
    # The one channel of a token says which of 40 batches it came from.
    measure = MeanDiscrepancy(1, max_samples=500)
    for index in range(40):
        maps = torch.full((2, 1, 10, 10), float(index))
        measure.update(maps, maps)
    for sources, _ in (measure._low, measure._high):
        assert sources.shape == (500, 1)
        # 19.5 on average, within four standard errors of a uniform draw.
        assert sources.mean().item() == pytest.approx(19.5, abs=4 * 11.54 / 500**0.5)
        assert sources.unique().numel() > 35


def test_mean_discrepancy__flat_or_missing_features() -> None:
    measure = MeanDiscrepancy(3)
    with pytest.raises(DataError, match="2 tokens"):
        measure.compute()
    measure.update(torch.ones(1, 3, 4, 4), normal(1, 3, 8, 8))
    with pytest.raises(DataError, match="equal"):
        measure.compute()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_update__says_which_input_is_not_finite(bad: float) -> None:
    good, wrong = normal(1, 4, 3, 5), normal(1, 4, 3, 5)
    wrong[0, 1, 0, 0] = bad
    image = uniform(1, 3, 6, 10)
    with pytest.raises(DataError, match=r"1 of 60 .*prediction"):
        Fidelity(4).update(wrong, good)
    with pytest.raises(DataError, match=r"1 of 60 .*target"):
        Fidelity(4).update(good, wrong)
    with pytest.raises(DataError, match="total variation"):
        TotalVariation().update(wrong)
    with pytest.raises(DataError, match="random field"):
        ConditionalRandomField().update(wrong, image)
    with pytest.raises(DataError, match=r"discrepancy: .*teacher"):
        MeanDiscrepancy(4).update(wrong, good)
    with pytest.raises(DataError, match=r"discrepancy: .*upsampled"):
        MeanDiscrepancy(4).update(good, wrong)
    # Where it does not count, it does not matter.
    valid = torch.ones(1, 3, 5, dtype=torch.bool)
    valid[0, 0, 0] = False
    measure = Fidelity(4)
    measure.update(wrong, good + 1, valid)
    assert 0 < measure.compute() < float("inf")
