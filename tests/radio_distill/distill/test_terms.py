import math

import pytest
import torch
import torch.nn.functional as F

from radio_distill.distill.losses import angle, mesa, summary_loss

DOUBLE = torch.float64


def pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, *shape, dtype=DOUBLE, generator=generator) * 3
    return draw[0], draw[1]


def at_angles(angles: list[float], channels: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs ``[B, S]`` of vectors of different lengths, at known angles in random planes."""
    axes = torch.linalg.qr(pair(len(angles), channels, 2)[0]).Q  # [B, S, 2]
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
    x, y = (item.to(torch.bfloat16) for item in pair(3, 256))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = summary_loss("angle")(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), angle(x.double(), y.double()))


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


def test_mesa__gradients():
    x, y = pair(2, 4, 2, 3)
    valid = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(0)) > 0.3
    assert torch.autograd.gradcheck(lambda x: mesa(x, y, valid), x.requires_grad_())


def test_mesa__float32_under_autocast():
    x, y = (item.to(torch.bfloat16) for item in pair(2, 256, 5, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mesa(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), mesa(x.double(), y.double()))
