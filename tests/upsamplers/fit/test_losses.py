"""Losses of the fit: parity with published values, identities, and gradients where masks are."""

import math

import pytest
import torch
from torch import Tensor

from upsamplers.fit.losses import (
    UncertaintyNet,
    conditional_random_field,
    masked_mse,
    pair_energy,
    project,
    total_variation,
)

IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


# Squared error and uncertainty


def test_masked_mse__is_the_mean_over_valid_cells_and_channels() -> None:
    prediction, target = normal(2, 5, 3, 4), normal(2, 5, 3, 4, seed=1)
    valid = torch.rand(2, 3, 4, generator=seeded(2)) > 0.4
    expected = [
        torch.stack(
            [(p[:, y, x] - t[:, y, x]).square().mean() for y, x in v.nonzero().tolist()]
        ).mean()
        for p, t, v in zip(prediction, target, valid, strict=True)
    ]
    torch.testing.assert_close(masked_mse(prediction, target, valid), torch.stack(expected))
    whole = torch.nn.functional.mse_loss(prediction, target)
    torch.testing.assert_close(masked_mse(prediction, target).mean(), whole)


def test_masked_mse__weights_of_cells() -> None:
    prediction, target = normal(1, 2, 1, 2), normal(1, 2, 1, 2, seed=1)
    left, right = (prediction - target).square().mean(1)[0, 0]
    weighted = masked_mse(prediction, target, torch.tensor([[[1.0, 3.0]]]))
    torch.testing.assert_close(weighted, ((left + 3 * right) / 4)[None])
    # Only the ratio of weights counts.
    small = masked_mse(prediction, target, torch.tensor([[[0.01, 0.03]]]))
    torch.testing.assert_close(small, weighted)


def test_masked_mse__invalid_cells_give_neither_loss_nor_gradient_even_if_nan() -> None:
    prediction, target = normal(2, 3, 2, 2), normal(2, 3, 2, 2, seed=1)
    log_scale = normal(2, 2, 2, seed=2).requires_grad_()
    valid = torch.ones(2, 2, 2, dtype=torch.bool)
    valid[0, 0, 0], valid[1] = False, False
    prediction[0, :, 0, 0], target[1] = torch.nan, torch.inf
    prediction.requires_grad_()
    loss = masked_mse(prediction, target, valid, log_scale)
    assert loss[1] == 0
    loss.sum().backward()
    assert prediction.grad is not None
    assert log_scale.grad is not None
    assert prediction.grad.isfinite().all()
    assert log_scale.grad.isfinite().all()
    assert torch.equal(prediction.grad.abs().sum(1) > 0, valid)
    assert torch.equal(log_scale.grad != 0, valid)


@pytest.mark.parametrize("masked", [False, True])
def test_masked_mse__gradient(masked: bool) -> None:
    prediction, target = normal(2, 3, 2, 3).double(), normal(2, 3, 2, 3, seed=1).double()
    log_scale = normal(2, 2, 3, seed=2).double()
    valid = torch.rand(2, 2, 3, generator=seeded(3)) > 0.3 if masked else None
    inputs = [value.requires_grad_() for value in (prediction, target, log_scale)]
    assert torch.autograd.gradcheck(lambda p, t, s: masked_mse(p, t, valid, s), inputs)


def test_masked_mse__uncertainty_is_the_likelihood_of_a_normal_distribution() -> None:
    prediction, target = normal(2, 4, 3, 3).double(), normal(2, 4, 3, 3, seed=1).double()
    log_scale = normal(2, 3, 3, seed=2).double()
    density = torch.distributions.Normal(prediction, log_scale.exp()[:, None])
    expected = -density.log_prob(target).mean(dim=(1, 2, 3)) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(masked_mse(prediction, target, None, log_scale), expected)


def test_masked_mse__best_variance_is_the_squared_error() -> None:
    prediction, target = normal(1, 4, 1, 1).double(), normal(1, 4, 1, 1, seed=1).double()
    best = 0.5 * (prediction - target).square().mean().log().reshape(1, 1, 1)
    best.requires_grad_()
    masked_mse(prediction, target, None, best).sum().backward()
    torch.testing.assert_close(best.grad, torch.zeros_like(best), atol=1e-12, rtol=0)


def test_masked_mse__half_precision_does_not_overflow() -> None:
    prediction = torch.full((1, 2, 2, 2), 300.0, dtype=torch.float16)  # squared, 90000 > 65504
    assert masked_mse(prediction, torch.zeros_like(prediction)).item() == 90000


def test_uncertainty__starts_at_one_and_learns_where_the_error_is() -> None:
    features = normal(4, 6, 5, 5)
    uncertainty = UncertaintyNet(6)
    assert torch.equal(uncertainty(features), torch.zeros(4, 5, 5))
    error = normal(4, 6, 5, 5, seed=1) * features[:, :1].exp()  # s is exp of the first channel
    optimizer = torch.optim.Adam(uncertainty.parameters(), 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        masked_mse(error, torch.zeros_like(error), None, uncertainty(features)).mean().backward()
        optimizer.step()
    assert (
        torch.corrcoef(torch.stack([uncertainty(features).flatten(), features[:, 0].flatten()]))[
            0, 1
        ]
        > 0.99
    )
    assert uncertainty.linear.weight[0, 0].item() == pytest.approx(1, abs=0.15)


def test_uncertainty__scale_has_a_floor() -> None:
    uncertainty = UncertaintyNet(2)
    torch.nn.init.constant_(uncertainty.linear.bias, -100.0)
    floor = torch.full((1, 3, 3), 1e-4)
    torch.testing.assert_close(uncertainty(normal(1, 2, 3, 3)).exp(), floor)


# Total variation


def test_total_variation__parity_featup(golden) -> None:
    published = golden("featup_losses")
    value = total_variation(published["feats"], variant="featup").mean()
    torch.testing.assert_close(value, published["tv"])


@pytest.mark.parametrize("variant", ["featup", "featsharp"])
def test_total_variation__identities(variant: str) -> None:
    constant = normal(2, 3, 1, 1).expand(2, 3, 4, 5)
    assert torch.equal(total_variation(constant, variant=variant), torch.zeros(2))
    maps = normal(2, 3, 4, 5).double()
    turned = total_variation(maps.transpose(2, 3), variant=variant)
    torch.testing.assert_close(total_variation(maps, variant=variant), turned)
    full = torch.ones(2, 4, 5, dtype=torch.bool)
    torch.testing.assert_close(
        total_variation(maps, full, variant), total_variation(maps, variant=variant)
    )
    assert torch.autograd.gradcheck(
        lambda m: total_variation(m, variant=variant), maps.requires_grad_()
    )


@pytest.mark.parametrize("variant", ["featup", "featsharp"])
def test_total_variation__masked_part_equals_the_part_alone(variant: str) -> None:
    maps = normal(1, 3, 6, 7)
    maps[..., 5:] = torch.nan
    maps.requires_grad_()
    valid = torch.zeros(1, 6, 7, dtype=torch.bool)
    valid[:, 1:, :4] = True
    value = total_variation(maps, valid, variant)
    torch.testing.assert_close(value, total_variation(maps[:, :, 1:, :4], variant=variant))
    value.sum().backward()
    assert maps.grad is not None
    assert maps.grad.isfinite().all()
    nothing = total_variation(maps, torch.zeros_like(valid), variant)
    assert torch.equal(nothing, torch.zeros(1))


# Conditional random field


def test_pair_energy__parity_featup(golden) -> None:
    published = golden("featup_losses")
    rows, columns = published["crf_coords"]
    height, width = published["feats"].shape[-2:]
    value = pair_energy(
        published["feats"][:, :, rows, columns],
        published["guidance"][:, :, rows, columns] * IMAGENET_STD[:, None],
        torch.stack([rows / height, columns / width]),
        "featup",
    )
    torch.testing.assert_close(value.mean(), published["crf"])


def test_pair_energy__featsharp_is_the_mean_of_all_pairs() -> None:
    features, colour = normal(2, 4, 9).double(), torch.rand(2, 3, 9, generator=seeded(1)).double()
    position = torch.rand(2, 9, generator=seeded(2)).double()
    expected = torch.zeros(2).double()
    for i in range(9):
        for j in range(9):
            distance = (features[..., i] - features[..., j]).square().mean(1)
            place = (position[:, i] - position[:, j]).square().sum()
            shade = ((colour[..., i] - colour[..., j]) / IMAGENET_STD).square().sum(1)
            expected += distance * torch.exp(-place / 0.2 - shade / 0.3) / 81
    torch.testing.assert_close(pair_energy(features, colour, position, "featsharp"), expected)


@pytest.mark.parametrize("variant", ["featup", "featsharp"])
def test_conditional_random_field__prefers_edges_where_the_image_has_them(variant: str) -> None:
    guidance = torch.zeros(1, 3, 16, 24)
    guidance[..., 12:] = 1.0
    aligned = 2 * guidance[:, :1].repeat(1, 5, 1, 1) - 1
    order = torch.randperm(16 * 24, generator=seeded())
    shuffled = aligned.flatten(2)[..., order].view_as(aligned)
    drawn = conditional_random_field(aligned, guidance, variant, 100, seeded())
    other = conditional_random_field(shuffled, guidance, variant, 100, seeded())
    assert drawn.shape == (1,)
    assert drawn < 0.5 * other
    constant = torch.full_like(aligned, 1e3)
    assert conditional_random_field(constant, guidance, variant).abs().item() < 1e-6


def test_conditional_random_field__a_sample_stands_for_all_pixels() -> None:
    features, guidance = normal(2, 6, 20, 30), torch.rand(2, 3, 20, 30, generator=seeded(1))
    whole = conditional_random_field(features, guidance)  # 600 pixels: all of them
    generator = seeded(2)
    draws = [
        conditional_random_field(features, guidance, points=300, generator=generator)
        for _ in range(30)
    ]
    # Drawn with replacement, a pair is one pixel twice with probability 1 / 300 beside 1 / 600.
    mean = torch.stack(draws).mean(0)
    torch.testing.assert_close(mean, whole, rtol=0.05, atol=0)


def test_conditional_random_field__guidance_of_another_size_and_gradient() -> None:
    features = normal(1, 4, 5, 6).double().requires_grad_()
    guidance = torch.rand(1, 3, 50, 60, generator=seeded())
    assert torch.autograd.gradcheck(lambda f: conditional_random_field(f, guidance), features)
    with torch.autocast("cpu", torch.bfloat16):
        low = conditional_random_field(features.float(), guidance)
    torch.testing.assert_close(low, conditional_random_field(features.float(), guidance))


# Projection


def test_project__is_orthonormal_and_keeps_mean_squares() -> None:
    basis = torch.eye(64).reshape(1, 64, 8, 8)  # its projection is the matrix itself
    directions = project(basis, 16, seeded()).flatten(2)[0]
    torch.testing.assert_close(directions @ directions.T, torch.eye(16), atol=1e-6, rtol=1e-5)
    features = normal(2, 64, 20, 20)
    few = project(features, 16, seeded())
    assert torch.equal(few, project(features, 16, seeded()))
    ratio = few.square().mean() / features.square().mean()
    assert ratio.item() == pytest.approx(1, abs=0.05)
    whole = project(features, 100, seeded())
    assert whole.shape == features.shape
    torch.testing.assert_close(whole.norm(dim=1), features.norm(dim=1))
