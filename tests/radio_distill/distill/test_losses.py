import math

import pytest
import torch
import torch.nn.functional as F

from radio_distill.config import LossConfig
from radio_distill.distill.losses import (
    KINDS,
    am_radio,
    angle,
    distillation_loss,
    feature_loss,
    mesa,
    summary_loss,
)
from radio_distill.errors import ConfigError, UnknownNameError
from radio_distill.types import Features

SUMMARY, FEATURE = ["cosine", "mse"], ["mse", "cosine", "am_radio"]


def maps(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, *shape, dtype=torch.float64, generator=generator) * 3
    return draw[0], draw[1]


@pytest.mark.parametrize("shape", [(3, 8, 4, 6), (1, 5, 1, 1)])
def test_feature_loss__equals_torch(shape):
    x, y = maps(*shape)
    mse, cosine, both = (feature_loss(name)(x, y) for name in FEATURE)
    torch.testing.assert_close(mse, F.mse_loss(x, y, reduction="none").mean((1, 2, 3)))
    similarity = F.cosine_similarity(x, y).mean((1, 2))
    torch.testing.assert_close(cosine, 1 - similarity)
    smooth = F.smooth_l1_loss(x, y, reduction="none", beta=2.0).mean((1, 2, 3))
    torch.testing.assert_close(both, 0.9 * (1 - similarity) + 0.1 * smooth)


def test_summary_loss__equals_torch():
    x, y = maps(7, 12)
    torch.testing.assert_close(summary_loss("cosine")(x, y), 1 - F.cosine_similarity(x, y))
    torch.testing.assert_close(summary_loss("mse")(x, y), (x - y).square().mean(1))


def test_losses__by_hand():
    x = torch.tensor([[3.0, 4.0]])  # of length 5
    y = torch.tensor([[4.0, 3.0]])
    assert summary_loss("cosine")(x, y).item() == pytest.approx(1 - 24 / 25)
    assert summary_loss("mse")(x, y).item() == pytest.approx(1)
    # Smooth L1 at beta 2: an error of 1 costs 1²/4, one of 5 costs 5 - 1.
    assert am_radio(x, y).item() == pytest.approx(0.9 * (1 - 24 / 25) + 0.1 * 0.25, rel=1e-5)
    far = am_radio(torch.tensor([[5.0]]), torch.tensor([[10.0]])).item()
    assert far == pytest.approx(0.1 * 4)
    assert am_radio(torch.tensor([[5.0]]), torch.tensor([[10.0]]), beta=10).item() == pytest.approx(
        0.1 * 25 / 20
    )


@pytest.mark.parametrize("name", FEATURE)
def test_feature_loss__zero_for_equal_and_two_for_opposite_directions(name):
    x, _ = maps(2, 6, 3, 3)
    assert feature_loss(name)(x, x).abs().max() < 1e-15
    if name == "cosine":
        torch.testing.assert_close(feature_loss(name)(x, -5 * x), torch.full((2,), 2.0).double())


@pytest.mark.parametrize("name", FEATURE)
def test_feature_loss__mask_equals_leaving_cells_out(name):
    x, y = maps(2, 6, 3, 4)
    valid = torch.ones(2, 3, 4, dtype=torch.bool)
    valid[0, :, 3] = False
    valid[1, 1:] = False
    loss = feature_loss(name)
    masked = loss(x, y, valid)
    torch.testing.assert_close(masked[:1], loss(x[:1, :, :, :3], y[:1, :, :, :3]))
    torch.testing.assert_close(masked[1:], loss(x[1:, :, :1], y[1:, :, :1]))
    torch.testing.assert_close(loss(x, y, torch.ones_like(valid)), loss(x, y))


@pytest.mark.parametrize("name", FEATURE)
def test_feature_loss__image_without_valid_cells_costs_nothing(name):
    x, y = maps(2, 6, 3, 3)
    x.requires_grad_()
    valid = torch.zeros(2, 3, 3, dtype=torch.bool)
    valid[1] = True
    losses = feature_loss(name)(x, y, valid)
    losses.sum().backward()
    assert losses[0] == 0
    assert losses[1] > 0
    assert not x.grad[0].any()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", FEATURE)
def test_feature_loss__images_do_not_touch_each_other(name):
    x, y = maps(4, 6, 3, 3)
    loss = feature_loss(name)
    apart = torch.cat([loss(x[:1], y[:1]), loss(x[1:], y[1:])])
    torch.testing.assert_close(loss(x, y), apart)


@pytest.mark.parametrize("name", FEATURE)
def test_feature_loss__gradients(name):
    x, y = maps(2, 4, 2, 3)
    valid = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(0)) > 0.3
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: feature_loss(name)(x, y, valid), x)


@pytest.mark.parametrize("name", SUMMARY)
def test_summary_loss__gradients(name):
    x, y = maps(3, 5)
    assert torch.autograd.gradcheck(lambda x: summary_loss(name)(x, y), x.requires_grad_())


@pytest.mark.parametrize("name", FEATURE)
def test_feature_loss__float32_under_autocast(name):
    x, y = (item.to(torch.bfloat16) for item in maps(2, 256, 5, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = feature_loss(name)(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), feature_loss(name)(x.double(), y.double()))


@pytest.mark.parametrize("name", SUMMARY)
def test_summary_loss__float32_under_autocast(name):
    x, y = (item.to(torch.bfloat16) for item in maps(2, 256))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = summary_loss(name)(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), summary_loss(name)(x.double(), y.double()))


def test_loss_lookups__unknown_names():
    with pytest.raises(UnknownNameError, match="'am_radio'"):
        feature_loss("amradio")
    with pytest.raises(UnknownNameError, match="summary loss 'kl'"):
        summary_loss("kl")


def encoder(batch: int, width: int, channels: int, grid: tuple[int, int], seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    spatial = torch.randn(batch, channels, *grid, generator=generator)
    return Features(torch.randn(batch, width, generator=generator), spatial)


@pytest.fixture
def pair() -> tuple[dict[str, Features], dict[str, Features]]:
    """Student and teachers: a CLIP with another grid, a SAM without summary."""
    predictions = {"clip": encoder(3, 6, 8, (4, 6), 1), "sam": encoder(3, 6, 5, (4, 6), 2)}
    targets = {"clip": encoder(3, 6, 8, (3, 4), 3), "sam": encoder(3, 6, 5, (4, 6), 4)}
    targets["sam"] = targets["sam"]._replace(summary=None)
    return predictions, targets


def teacher(summary: float = 1.0, feature: float = 1.0) -> tuple[float, float]:
    return summary, feature


def loss_of(predictions, targets, config, weights, **options):
    """The loss, with weights given as ``{teacher: (summary, features)}``."""
    flat = {
        f"{name}/{kind}": value
        for name, pair in weights.items()
        for kind, value in zip(KINDS, pair, strict=True)
    }
    return distillation_loss(predictions, targets, config, flat, **options)


def test_distillation_loss__is_the_weighted_sum_by_hand(pair):
    predictions, targets = pair
    weights = {"clip": teacher(0.5, 2.0), "sam": teacher(1.0, 3.0)}
    report = loss_of(predictions, targets, LossConfig(), weights)

    clip, student = targets["clip"], predictions["clip"]
    summary = 1 - F.cosine_similarity(student.summary, clip.summary)
    shrunk = F.interpolate(student.spatial, (3, 4), mode="bilinear", antialias=True)
    clip_map = (shrunk - clip.spatial).square().mean((1, 2, 3))
    sam_map = (predictions["sam"].spatial - targets["sam"].spatial).square().mean((1, 2, 3))
    torch.testing.assert_close(report.total, 0.5 * summary + 2 * clip_map + 3 * sam_map)
    expected = {
        "clip/summary": summary.mean(),
        "clip/features": clip_map.mean(),
        "sam/features": sam_map.mean(),
    }
    assert report.terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(report.terms[name], value)


@pytest.mark.parametrize("summary", SUMMARY)
@pytest.mark.parametrize("feature", FEATURE)
def test_distillation_loss__takes_the_losses_of_the_recipe(pair, summary, feature):
    predictions, targets = pair
    config = LossConfig(summary=summary, feature=feature)
    weights = {name: teacher() for name in targets}
    terms = loss_of(predictions, targets, config, weights).terms
    x, y = predictions["clip"].summary, targets["clip"].summary
    torch.testing.assert_close(terms["clip/summary"], summary_loss(summary)(x, y).mean())
    x, y = predictions["sam"].spatial, targets["sam"].spatial
    torch.testing.assert_close(terms["sam/features"], feature_loss(feature)(x, y).mean())


@pytest.mark.parametrize("rule", ["smaller", "larger", "student_down"])
def test_distillation_loss__takes_the_alignment_of_the_recipe(pair, rule):
    predictions, targets = pair
    weights = {name: teacher() for name in targets}
    report = loss_of(predictions, targets, LossConfig(alignment=rule), weights)
    grid = (4, 6) if rule == "larger" else (3, 4)
    x, y = (
        F.interpolate(item["clip"].spatial, grid, mode="bilinear", antialias=True)
        for item in (predictions, targets)
    )
    torch.testing.assert_close(report.terms["clip/features"], F.mse_loss(x, y))


def test_distillation_loss__error_where_alignment_does_not_suit(pair):
    weights = {name: teacher() for name in pair[1]}
    with pytest.raises(ConfigError, match=r"teacher_down.*4x6"):
        loss_of(*pair, LossConfig(alignment="teacher_down"), weights)


def test_distillation_loss__micro_batches_add_up(pair):
    predictions, targets = pair
    weights = {name: teacher() for name in targets}

    def part(items, rows):
        return {
            name: Features(None if f.summary is None else f.summary[rows], f.spatial[rows])
            for name, f in items.items()
        }

    totals = [
        loss_of(part(predictions, rows), part(targets, rows), LossConfig(), weights).total
        for rows in (slice(0, 1), slice(1, 3))
    ]
    whole = loss_of(predictions, targets, LossConfig(), weights).total
    torch.testing.assert_close(torch.cat(totals), whole)


def test_distillation_loss__term_of_weight_0_is_left_out(pair):
    predictions, targets = pair
    predictions["clip"] = predictions["clip"]._replace(summary=None)
    weights = {"clip": teacher(summary=0), "sam": teacher(feature=0)}
    report = loss_of(predictions, targets, LossConfig(), weights)
    assert list(report.terms) == ["clip/features"]


def test_distillation_loss__error_where_nothing_is_asked_for(pair):
    weights = {"clip": teacher(0, 0), "sam": teacher(1, 0)}
    with pytest.raises(ConfigError, match="clip, sam"):
        loss_of(*pair, LossConfig(), weights)


def test_distillation_loss__gradient_reaches_every_prediction_and_no_target(pair):
    predictions, targets = pair
    leaves = [value.requires_grad_() for f in predictions.values() for value in f]
    weights = {name: teacher() for name in targets}
    report = loss_of(predictions, targets, LossConfig(), weights)
    assert not any(term.requires_grad for term in report.terms.values())
    *reached, sam_summary, sam_spatial = torch.autograd.grad(
        report.total.sum(), leaves, allow_unused=True
    )
    assert all(gradient.abs().sum() > 0 for gradient in (*reached, sam_spatial))
    assert sam_summary is None


def test_distillation_loss__shifted_crops_are_compared_where_both_show_the_image(pair):
    """The student's crop lies one cell below and two to the left of the teacher's."""
    predictions, targets = ({"sam": item["sam"]} for item in pair)
    shifts = {"sam": torch.tensor([[1 / 4, -2 / 6]]).expand(3, 2)}
    report = loss_of(predictions, targets, LossConfig(), {"sam": teacher()}, shifts=shifts)
    x, y = predictions["sam"].spatial[..., :3, 2:], targets["sam"].spatial[..., 1:, :4]
    expected = (x - y).square().mean((1, 2, 3))
    torch.testing.assert_close(report.total, expected, rtol=1e-5, atol=1e-5)


def test_distillation_loss__learned_weights(pair):
    predictions, targets = pair
    variances = {
        name: torch.tensor(0.5, requires_grad=True)
        for name in ("clip/summary", "clip/features", "sam/features")
    }
    weights = {name: teacher() for name in targets}
    report = loss_of(predictions, targets, LossConfig(), weights, log_variances=variances)
    plain = loss_of(predictions, targets, LossConfig(), weights)
    expected = plain.total * math.exp(-0.5) + 3 * math.log1p(math.exp(0.5))
    torch.testing.assert_close(report.total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(report.terms, plain.terms)
    report.total.sum().backward()
    assert all(value.grad for value in variances.values())


def test_distillation_loss__float32_under_autocast(pair):
    predictions, targets = (
        {n: Features(*(v if v is None else v.bfloat16() for v in f)) for n, f in item.items()}
        for item in pair
    )
    weights = {name: teacher() for name in targets}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = loss_of(predictions, targets, LossConfig(), weights)
    assert report.total.dtype == torch.float32
    exact = loss_of(*pair, LossConfig(), weights)
    torch.testing.assert_close(report.total, exact.total, rtol=0.02, atol=0.02)


def test_distillation_loss__number_that_is_not_finite_shows_in_its_term(pair):
    targets = pair[1]
    targets["sam"].spatial[0, 0, 0, 0] = math.inf
    terms = loss_of(*pair, LossConfig(), {n: teacher() for n in targets}).terms
    finite = {name: bool(value.isfinite()) for name, value in terms.items()}
    assert finite == {"clip/summary": True, "clip/features": True, "sam/features": False}


DOUBLE = torch.float64


def vectors(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, *shape, dtype=DOUBLE, generator=generator) * 3
    return draw[0], draw[1]


def at_angles(angles: list[float], channels: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs ``[B, S]`` of vectors of different lengths, at known angles in random planes."""
    axes = torch.linalg.qr(vectors(len(angles), channels, 2)[0]).Q  # [B, S, 2]
    theta = torch.tensor(angles, dtype=DOUBLE)[:, None]
    first, second = axes.unbind(-1)
    return 0.3 * first, 7 * (theta.cos() * first + theta.sin() * second)


ANGLES = [0.0, 1e-7, 1e-3, 0.5, math.pi / 2, 2.5, math.pi - 1e-3, math.pi - 1e-7]


def test_angle__is_the_squared_angle():
    expected = torch.tensor(ANGLES, dtype=DOUBLE)
    torch.testing.assert_close(angle(*at_angles(ANGLES)).sqrt(), expected, rtol=1e-12, atol=1e-15)


def test_angle__by_hand():
    x = torch.tensor([[3.0, 0.0], [1.0, 1.0], [2.0, 1.0]])
    y = torch.tensor([[0.0, 5.0], [0.0, 0.1], [-2.0, -1.0]])
    expected = torch.tensor([math.pi / 2, math.pi / 4, math.pi]).square()
    torch.testing.assert_close(angle(x, y), expected)


def test_angle__equals_arccos_of_the_cosine():
    x, y = vectors(50, 8)
    torch.testing.assert_close(angle(x, y), torch.acos(F.cosine_similarity(x, y)).square())


def test_angle__is_symmetric_and_blind_to_length():
    x, y = vectors(9, 5)
    torch.testing.assert_close(angle(x, y), angle(y, x))
    torch.testing.assert_close(angle(x, y), angle(1e5 * x, 1e-5 * y))


def test_angle__of_maps_is_that_of_their_cells():
    x, y = vectors(2, 5, 3, 4)
    cells = angle(x.permute(0, 2, 3, 1).reshape(-1, 5), y.permute(0, 2, 3, 1).reshape(-1, 5))
    torch.testing.assert_close(angle(x, y).flatten(), cells)


def test_angle__float32_keeps_small_angles():
    """Where the arccos of a clamped cosine says 2e-6 whatever the angle."""
    small = [1e-5, 1e-4, 1e-3, 1e-2]
    x, y = (item.float() for item in at_angles(small, channels=1024))
    error = angle(x, y).sqrt().double() - torch.tensor(small, dtype=DOUBLE)
    assert error.abs().max() < 2e-7
    clamped = torch.acos(F.cosine_similarity(x, y).clamp(max=1 - 1e-6)).double()
    assert (clamped[:2] - torch.tensor(small[:2], dtype=DOUBLE)).abs().min() > 1e-3


# Closer to the opposite direction than 1e-3, a step of gradcheck's leaps over it.
@pytest.mark.parametrize("theta", [*ANGLES[:-1], math.pi])
def test_angle__gradients(theta):
    x, y = at_angles([theta])
    if theta == math.pi:
        x = -y
    x.requires_grad_()
    y.requires_grad_()
    assert torch.autograd.gradcheck(angle, (x, y), atol=1e-4)


@pytest.mark.parametrize("theta", ANGLES)
def test_angle__gradient_is_2_theta_over_the_length(theta):
    """Of unit slope in the angle, everywhere but at the opposite direction."""
    x, y = at_angles([theta])
    (gradient,) = torch.autograd.grad(angle(x.requires_grad_(), y).sum(), x)
    assert gradient.norm().item() == pytest.approx(2 * theta / 0.3, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        ([0.6, 0.8], [-0.6, -0.8], math.pi),
        ([0.0, 0.0], [0.6, 0.8], math.pi / 2),
        ([0.6, 0.8], [0.0, 0.0], math.pi / 2),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
    ],
)
def test_angle__gradient_is_finite_where_none_is_defined(prediction, target, expected):
    x = torch.tensor([prediction], requires_grad=True)
    value = angle(x, torch.tensor([target]))
    value.sum().backward()
    assert value.item() == pytest.approx(expected**2)
    assert x.grad.isfinite().all()


def test_angle__descent_turns_a_nearly_opposite_direction():
    x, y = at_angles([math.pi - 1e-3])
    x = x.requires_grad_()
    optimizer = torch.optim.SGD([x], lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        angle(x, y).sum().backward()
        optimizer.step()
    assert angle(x, y) < 1e-6


def test_summary_loss__angle_is_float32_under_autocast():
    x, y = (item.to(torch.bfloat16) for item in vectors(3, 256))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = summary_loss("angle")(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), angle(x.double(), y.double()))


def test_mesa__by_hand():
    student = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)  # normalised: -1 and 1
    average = torch.tensor([9.0, 5.0]).reshape(1, 2, 1, 1)  # normalised: 1 and -1
    assert mesa(student, average).item() == pytest.approx((4 + 4) / 2, rel=1e-4)


def test_mesa__equals_layer_norm_and_cdist():
    x, y = vectors(2, 16, 3, 5)
    norm = torch.nn.LayerNorm(16, elementwise_affine=False)
    tokens = (norm(item.permute(0, 2, 3, 1)).reshape(-1, 1, 16) for item in (x, y))
    expected = torch.cdist(*tokens).square().reshape(2, -1).mean(1)
    torch.testing.assert_close(mesa(x, y), expected / 16)


def test_mesa__is_blind_to_scale_and_offset_of_a_cell():
    x, y = vectors(2, 16, 3, 3)
    torch.testing.assert_close(mesa(x, y), mesa(100 * x + 5, y - 3), rtol=1e-5, atol=0)
    assert mesa(x, 10 * x + 1).max() < 1e-9


def test_mesa__unrelated_cells_are_2_apart():
    x, y = vectors(1, 512, 32, 32)
    assert mesa(x, y).item() == pytest.approx(2, rel=0.01)


def test_mesa__mask_equals_leaving_cells_out():
    x, y = vectors(3, 6, 3, 4)
    valid = torch.ones(3, 3, 4, dtype=torch.bool)
    valid[0, :, 3] = False
    valid[1] = False
    masked = mesa(x, y, valid)
    torch.testing.assert_close(masked[:1], mesa(x[:1, :, :, :3], y[:1, :, :, :3]))
    assert masked[1] == 0
    torch.testing.assert_close(masked[2:], mesa(x[2:], y[2:]))


def test_mesa__gradients():
    x, y = vectors(2, 4, 2, 3)
    valid = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(0)) > 0.3
    assert torch.autograd.gradcheck(lambda x: mesa(x, y, valid), x.requires_grad_())


def test_mesa__float32_under_autocast():
    x, y = (item.to(torch.bfloat16) for item in vectors(2, 256, 5, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mesa(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), mesa(x.double(), y.double()))
