import math

import pytest
import torch
import torch.nn.functional as F

from radio_distill.config import LossConfig
from radio_distill.distill import distances
from radio_distill.distill.distances import am_radio, angle, mesa
from radio_distill.errors import UnknownNameError


def summary_loss(name, **options):
    return distances.summary_loss(LossConfig(summary=name, **options))


def feature_loss(name, **options):
    return distances.feature_loss(LossConfig(feature=name, **options))


SUMMARY = ["cosine", "mse", "smooth_l1", "dampened_mse"]
FEATURE = [
    *("mse", "cosine", "am_radio", "smooth_l1", "dampened_mse", "map_cosine", "gram", "channel_kl"),
]


def pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, *shape, dtype=torch.float64, generator=generator) * 3
    return draw[0], draw[1]


@pytest.mark.parametrize("shape", [(3, 8, 4, 6), (1, 5, 1, 1)])
def test_feature_loss__equals_torch(shape):
    x, y = pair(*shape)
    mse, cosine, both = (feature_loss(name)(x, y) for name in FEATURE[:3])
    torch.testing.assert_close(mse, F.mse_loss(x, y, reduction="none").mean((1, 2, 3)))
    similarity = F.cosine_similarity(x, y).mean((1, 2))
    torch.testing.assert_close(cosine, 1 - similarity)
    smooth = F.smooth_l1_loss(x, y, reduction="none", beta=2.0).mean((1, 2, 3))
    torch.testing.assert_close(both, 0.9 * (1 - similarity) + 0.1 * smooth)


def test_summary_loss__equals_torch():
    x, y = pair(7, 12)
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


@pytest.mark.parametrize("name", FEATURE)
def test_feature_loss__zero_for_equal_and_two_for_opposite_directions(name):
    x, _ = pair(2, 6, 3, 3)
    assert feature_loss(name)(x, x).abs().max() < 1e-15
    if name == "cosine":
        torch.testing.assert_close(feature_loss(name)(x, -5 * x), torch.full((2,), 2.0).double())


@pytest.mark.parametrize("name", FEATURE)
def test_feature_loss__mask_equals_leaving_cells_out(name):
    x, y = pair(2, 6, 3, 4)
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
    x, y = pair(2, 6, 3, 3)
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
    x, y = pair(4, 6, 3, 3)
    loss = feature_loss(name)
    apart = torch.cat([loss(x[:1], y[:1]), loss(x[1:], y[1:])])
    torch.testing.assert_close(loss(x, y), apart)


OF_MAPS = {name: feature_loss(name) for name in FEATURE} | {"mesa": mesa}
OF_SUMMARIES = {name: summary_loss(name) for name in (*SUMMARY, "angle")}


@pytest.mark.parametrize("name", OF_MAPS)
def test_loss_of_maps__gradients(name):
    x, y = pair(2, 4, 2, 3)
    valid = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(0)) > 0.3
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: OF_MAPS[name](x, y, valid), x)


@pytest.mark.parametrize("name", SUMMARY)
def test_loss_of_summaries__gradients(name):
    x, y = pair(3, 5)
    assert torch.autograd.gradcheck(lambda x: OF_SUMMARIES[name](x, y), x.requires_grad_())


@pytest.mark.parametrize(
    ("loss_of", "shape"),
    [
        *((loss_of, (2, 256, 5, 5)) for loss_of in OF_MAPS.values()),
        *((loss_of, (3, 256)) for loss_of in OF_SUMMARIES.values()),
    ],
    ids=[*OF_MAPS, *(f"summary {name}" for name in OF_SUMMARIES)],
)
def test_losses__float32_under_autocast(loss_of, shape):
    x, y = (item.to(torch.bfloat16) for item in pair(*shape))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), loss_of(x.double(), y.double()))


def test_loss_lookups__unknown_names():
    with pytest.raises(UnknownNameError, match="'am_radio'"):
        feature_loss("amradio")
    with pytest.raises(UnknownNameError, match="summary loss 'kl'"):
        summary_loss("kl")


def at_angles(angles: list[float], channels: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs ``[B, S]`` of vectors of different lengths, at known angles in random planes."""
    axes = torch.linalg.qr(pair(len(angles), channels, 2)[0]).Q  # [B, S, 2]
    theta = torch.tensor(angles, dtype=torch.float64)[:, None]
    first, second = axes.unbind(-1)
    return 0.3 * first, 7 * (theta.cos() * first + theta.sin() * second)


ANGLES = [0.0, 1e-7, 1e-3, 0.5, math.pi / 2, 2.5, math.pi - 1e-3, math.pi - 1e-7]


def test_angle__is_the_squared_angle():
    expected = torch.tensor(ANGLES, dtype=torch.float64)
    torch.testing.assert_close(angle(*at_angles(ANGLES)).sqrt(), expected, rtol=1e-12, atol=1e-15)


def test_angle__by_hand():
    x = torch.tensor([[3.0, 0.0], [1.0, 1.0], [2.0, 1.0]])
    y = torch.tensor([[0.0, 5.0], [0.0, 0.1], [-2.0, -1.0]])
    expected = torch.tensor([math.pi / 2, math.pi / 4, math.pi]).square()
    torch.testing.assert_close(angle(x, y), expected)


def test_angle__equals_arccos_of_the_cosine():
    x, y = pair(50, 8)
    torch.testing.assert_close(angle(x, y), torch.acos(F.cosine_similarity(x, y)).square())


def test_angle__is_symmetric_and_blind_to_length():
    x, y = pair(9, 5)
    torch.testing.assert_close(angle(x, y), angle(y, x))
    torch.testing.assert_close(angle(x, y), angle(1e5 * x, 1e-5 * y))


def test_angle__of_maps_is_that_of_their_cells():
    x, y = pair(2, 5, 3, 4)
    cells = angle(x.permute(0, 2, 3, 1).reshape(-1, 5), y.permute(0, 2, 3, 1).reshape(-1, 5))
    torch.testing.assert_close(angle(x, y).flatten(), cells)


def test_angle__float32_keeps_small_angles():
    """Where the arccos of a clamped cosine says 2e-6 whatever the angle."""
    small = [1e-5, 1e-4, 1e-3, 1e-2]
    x, y = (item.float() for item in at_angles(small, channels=1024))
    error = angle(x, y).sqrt().double() - torch.tensor(small, dtype=torch.float64)
    assert error.abs().max() < 2e-7
    clamped = torch.acos(F.cosine_similarity(x, y).clamp(max=1 - 1e-6)).double()
    assert (clamped[:2] - torch.tensor(small[:2], dtype=torch.float64)).abs().min() > 1e-3


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


def test_mesa__by_hand():
    student = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)  # normalised: -1 and 1
    average = torch.tensor([9.0, 5.0]).reshape(1, 2, 1, 1)  # normalised: 1 and -1
    assert mesa(student, average).item() == pytest.approx((4 + 4) / 2, rel=1e-4)


def test_mesa__equals_layer_norm_and_cdist():
    x, y = pair(2, 16, 3, 5)
    norm = torch.nn.LayerNorm(16, elementwise_affine=False)
    tokens = (norm(item.permute(0, 2, 3, 1)).reshape(-1, 1, 16) for item in (x, y))
    expected = torch.cdist(*tokens).square().reshape(2, -1).mean(1)
    torch.testing.assert_close(mesa(x, y), expected / 16)


def test_mesa__is_blind_to_scale_and_offset_of_a_cell():
    x, y = pair(2, 16, 3, 3)
    torch.testing.assert_close(mesa(x, y), mesa(100 * x + 5, y - 3), rtol=1e-5, atol=0)
    assert mesa(x, 10 * x + 1).max() < 1e-9


def test_mesa__unrelated_cells_are_2_apart():
    x, y = pair(1, 512, 32, 32)
    assert mesa(x, y).item() == pytest.approx(2, rel=0.01)


def test_mesa__mask_equals_leaving_cells_out():
    x, y = pair(3, 6, 3, 4)
    valid = torch.ones(3, 3, 4, dtype=torch.bool)
    valid[0, :, 3] = False
    valid[1] = False
    masked = mesa(x, y, valid)
    torch.testing.assert_close(masked[:1], mesa(x[:1, :, :, :3], y[:1, :, :, :3]))
    assert masked[1] == 0
    torch.testing.assert_close(masked[2:], mesa(x[2:], y[2:]))


def test_smooth_l1__by_hand_on_either_side_of_beta():
    errors = torch.tensor([[0.0, 1.0, 3.0, -5.0]])
    zero = torch.zeros_like(errors)
    for beta, expected in ((1.0, 0 + 0.5 + 2.5 + 4.5), (3.0, 0 + 1 / 6 + 1.5 + 3.5)):
        loss = summary_loss("smooth_l1", smooth_l1_beta=beta)
        assert loss(errors, zero).item() == pytest.approx(expected / 4)


def test_dampened_mse__by_hand_without_a_jump_at_1():
    errors = torch.tensor(
        [[0.0], [0.5], [1.0], [-4.0], [100.0]], dtype=torch.float64, requires_grad=True
    )
    loss = distances.dampened_mse(errors, torch.zeros_like(errors))
    expected = torch.tensor([0, 0.125, 0.5, 2.5, 18.5], dtype=torch.float64)
    torch.testing.assert_close(loss, expected)
    (slope,) = torch.autograd.grad(loss.sum(), errors)
    expected = torch.tensor([0, 0.5, 1, -0.5, 0.1], dtype=torch.float64)
    torch.testing.assert_close(slope[:, 0], expected)


def test_map_cosine__is_one_angle_of_the_whole_map():
    x, y = pair(3, 4, 2, 5)
    expected = torch.stack(
        [1 - (a * b).sum() / (a.norm() * b.norm()) for a, b in zip(x, y, strict=True)]
    )
    torch.testing.assert_close(distances.map_cosine(x, y), expected)


@pytest.mark.parametrize("shape", [(2, 9, 2, 3), (2, 3, 4, 5)], ids=["few cells", "many cells"])
def test_gram__equals_the_matrices_of_cosines_between_cells(shape):
    """With fewer cells than channels and with more, and with other channels of the teacher."""
    x, y = pair(*shape)[0], pair(2, 5, *shape[2:], seed=1)[0]
    expected = []
    for student, teacher in zip(x, y, strict=True):
        matrices = [
            F.cosine_similarity(item.flatten(1)[:, :, None], item.flatten(1)[:, None], dim=0)
            for item in (student, teacher)
        ]
        expected.append((matrices[0] - matrices[1]).square().mean())
    torch.testing.assert_close(distances.gram(x, y), torch.stack(expected))


def test_gram__is_blind_to_a_rotation_of_channels():
    x, _ = pair(2, 6, 3, 3)
    rotation = torch.linalg.qr(pair(6, 6)[0]).Q
    turned = torch.einsum("bchw,cd->bdhw", x, rotation)
    assert distances.gram(x, turned).max() < 1e-12


def test_channel_kl__equals_the_sum_over_places():
    x, y = pair(2, 3, 2, 2)
    student, teacher = (
        (item / 4).exp() / (item / 4).exp().sum((2, 3), keepdim=True) for item in (x, y)
    )
    expected = (teacher * (teacher / student).log()).sum((2, 3)).mean(1) * 16
    torch.testing.assert_close(distances.channel_kl(x, y), expected)


def test_channel_kl__is_blind_to_a_channels_offset():
    x, _ = pair(2, 3, 4, 4)
    assert distances.channel_kl(x, x + pair(2, 3, 1, 1, seed=1)[0]).abs().max() < 1e-12


def test_losses__a_sum_has_the_weights_of_its_parts():
    """EUPE's features, UNIC's summaries, and AM-RADIO's own loss written as a sum."""
    x, y = pair(3, 6, 2, 2)
    eupe = feature_loss({"cosine": 0.9, "smooth_l1": 0.1})(x, y)
    parts = 0.9 * feature_loss("cosine")(x, y) + 0.1 * feature_loss("smooth_l1")(x, y)
    torch.testing.assert_close(eupe, parts)
    unic = summary_loss({"cosine": 0.5, "smooth_l1": 0.5})(x[:, :, 0, 0], y[:, :, 0, 0])
    smooth = F.smooth_l1_loss(x[:, :, 0, 0], y[:, :, 0, 0], reduction="none").mean(1)
    similarity = F.cosine_similarity(x[:, :, 0, 0], y[:, :, 0, 0])
    torch.testing.assert_close(unic, 0.5 * (1 - similarity) + 0.5 * smooth)
    written = feature_loss({"cosine": 0.9, "smooth_l1": 0.1}, smooth_l1_beta=2.0)(x, y)
    torch.testing.assert_close(written, feature_loss("am_radio")(x, y))
