"""The two functions: against each other, against the published programs, and at their limits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.published_backward import published_gradient
from radio_distill.errors import ConfigError
from upsamplers.joint_bilateral import folded
from upsamplers.joint_bilateral.dispatch import apply_kernel, range_weights

WRITTEN_OUT = ["reference", "folded"]


def gradients(function, *tensors):
    """Return the output and all gradients under a fixed gradient of the output."""
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    out = function(*tensors)
    given = torch.linspace(0, 50, out.numel(), dtype=torch.float64).cos().view(out.shape)
    return out, *torch.autograd.grad(out, tensors, given.to(out.dtype))


def assert_same(function, *tensors):
    pairs = zip(
        gradients(lambda *t: function(*t, "folded"), *tensors),
        gradients(lambda *t: function(*t, "reference"), *tensors),
        strict=True,
    )
    for ours, reference in pairs:
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-10)


def normal(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype)


@st.composite
def shapes(draw):
    radius = draw(st.integers(1, 3))
    factors = [draw(st.sampled_from([1, 2, 3, 4, 5, 7])) for _ in range(2)]
    cells = [draw(st.integers(-(-(radius + 1) // factor), 11)) for factor in factors]
    return draw(st.integers(1, 3)), radius, cells, [cells[0] * factors[0], cells[1] * factors[1]]


@settings(max_examples=40, deadline=None)
@given(
    shape=shapes(),
    base=st.sampled_from(["bilinear", "bicubic"]),
    chunk=st.integers(1, 9),
)
def test_apply_kernel__folded_is_reference(shape, base, chunk):
    batch, radius, cells, pixels = shape
    low, kernel = normal(batch, 2, *cells), normal(batch, (2 * radius + 1) ** 2, *pixels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folded, "_CHUNK_ON_CPU", chunk * 200)
        assert_same(lambda low, kernel, how: apply_kernel(low, kernel, base, how), low, kernel)


@settings(max_examples=30, deadline=None)
@given(radius=st.integers(1, 3), height=st.integers(4, 9), width=st.integers(4, 75))
def test_range_weights__folded_is_reference(radius, height, width):
    projected = normal(2, 3, height, width)
    scalars = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.6, dtype=torch.float64)
    assert_same(lambda *t: range_weights(*t[:3], radius, t[3]), projected, *scalars)


def test_apply_kernel__trains_after_inference_at_the_same_size():
    low, kernel = normal(1, 2, 5, 5), normal(1, 9, 15, 10)
    with torch.inference_mode():
        seen = apply_kernel(low, kernel)
    out, grad_low, _ = gradients(apply_kernel, low, kernel)
    assert torch.equal(out, seen)
    assert grad_low.abs().sum() > 0


def test_apply_kernel__gradient_of_one_input_is_that_of_both():
    low, kernel = normal(1, 2, 5, 5), normal(1, 9, 15, 10)
    _, grad_low, grad_kernel = gradients(apply_kernel, low, kernel)
    assert torch.equal(gradients(lambda low: apply_kernel(low, kernel), low)[1], grad_low)
    assert torch.equal(gradients(lambda kernel: apply_kernel(low, kernel), kernel)[1], grad_kernel)


@pytest.mark.parametrize("how", WRITTEN_OUT)
@pytest.mark.parametrize("base", ["bilinear", "bicubic"])
def test_apply_kernel__gradcheck(how, base):
    low = normal(2, 2, 2, 3).requires_grad_()
    kernel = normal(2, 9, 4, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: apply_kernel(a, b, base, how), (low, kernel))


@pytest.mark.parametrize("how", WRITTEN_OUT)
def test_range_weights__gradcheck(how):
    projected = normal(1, 3, 4, 5).requires_grad_()
    scalars = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.8, 0.5)]
    function = lambda *tensors: range_weights(*tensors, 2, how)  # noqa: E731
    assert torch.autograd.gradcheck(function, (projected, *scalars))


@pytest.mark.parametrize("how", WRITTEN_OUT)
def test_apply_kernel__published_convolution(golden, close, how):
    # The published function takes a map that is padded already: its output is our middle.
    expected = golden("adaptive_conv_7x7")
    kernel = F.pad(expected["filters"].flatten(3).movedim(3, 1), (3,) * 4)
    given = F.pad(expected["grad_out"], (3,) * 4)
    low = expected["input"].requires_grad_()
    kernel.requires_grad_()
    out = apply_kernel(low, kernel, "bilinear", how)
    out.backward(given)
    close(out[..., 3:-3, 3:-3], expected["out"], 1e-5)
    close(low.grad, expected["grad_input"], 1e-4)
    right = kernel.grad[..., 3:-3, 3:-3].movedim(1, 3).unflatten(3, (7, 7))
    close(right, expected["grad_filters"], 1e-4)


def test_published_gradient__is_the_index_bug(golden, close):
    expected = golden("adaptive_conv_7x7")
    kernel = F.pad(expected["filters"].flatten(3).movedim(3, 1), (3,) * 4).requires_grad_()
    out = apply_kernel(expected["input"], published_gradient(kernel))
    out.backward(F.pad(expected["grad_out"], (3,) * 4))
    close(out[..., 3:-3, 3:-3], expected["out"], 1e-5)
    wrong = kernel.grad[..., 3:-3, 3:-3].movedim(1, 3).unflatten(3, (7, 7))
    close(wrong, expected["grad_filters_as_cuda_index_bug"], 1e-4)


@pytest.mark.parametrize("how", WRITTEN_OUT)
def test_apply_kernel__centre_tap_is_interpolation(how):
    low = normal(2, 3, 5, 4)
    kernel = torch.zeros(2, 25, 15, 8, dtype=torch.float64)
    kernel[:, 12] = 1
    fine = F.interpolate(low, (15, 8), mode="bicubic", align_corners=False)
    torch.testing.assert_close(apply_kernel(low, kernel, "bicubic", how), fine)


def test_apply_kernel__reference_takes_any_ratio():
    low, kernel = torch.ones(1, 2, 3, 4), torch.full((1, 9, 7, 5), 1 / 9)
    out = apply_kernel(low, kernel, implementation="reference")
    torch.testing.assert_close(out, torch.ones(1, 2, 7, 5))
    with pytest.raises(ConfigError, match=r"7x5.*3x4"):
        apply_kernel(low, kernel)


@pytest.mark.parametrize("how", WRITTEN_OUT)
def test_range_weights__sum_to_one_and_prefer_the_centre(how):
    weights = range_weights(torch.zeros(1, 4, 6, 7), 1.0, 0.3, 3, how)
    torch.testing.assert_close(weights.sum(1), torch.ones(1, 6, 7))
    assert (weights.argmax(1) == 24).all()


@pytest.mark.parametrize("how", WRITTEN_OUT)
def test_range_weights__sigma_zero_is_narrow_not_nan(how):
    projected = normal(1, 4, 5, 5, dtype=torch.float32).requires_grad_()
    sigma = torch.zeros((), requires_grad=True)
    weights = range_weights(projected, 1.0, sigma, 3, how)
    torch.testing.assert_close(weights[:, 24], torch.ones(1, 5, 5))
    weights.square().sum().backward()
    assert torch.isfinite(projected.grad).all()
    assert torch.isfinite(sigma.grad)


@pytest.mark.parametrize("how", WRITTEN_OUT)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_apply_kernel__not_finite_stays_local(how, bad):
    low = normal(1, 2, 12, 12, dtype=torch.float32)
    kernel = range_weights(normal(1, 4, 24, 24, dtype=torch.float32), 1.0, 1.0)
    clean = apply_kernel(low, kernel, implementation=how)
    low[0, 1, 6, 7] = bad
    out = apply_kernel(low, kernel, implementation=how)
    # At twice the size a cell is seen by target pixels of the two cells on each side, no further.
    reached = torch.zeros(1, 2, 24, 24, dtype=torch.bool)
    reached[0, 1, 8:18, 10:20] = True
    assert torch.isfinite(out[~reached]).all()
    torch.testing.assert_close(out[~reached], clean[~reached])
    assert not torch.isfinite(out[0, 1, 10:16, 12:18]).any()


def test_apply_kernel__not_finite_reaches_as_far_as_in_the_reference():
    low, kernel = normal(1, 1, 7, 9), normal(1, 49, 21, 18).abs() + 0.1
    low[0, 0, 0, 0], low[0, 0, 3, 5] = torch.nan, -torch.inf
    for base in ("bilinear", "bicubic"):
        finite = [torch.isfinite(apply_kernel(low, kernel, base, how)) for how in WRITTEN_OUT]
        assert finite[1].any()
        assert (finite[1] | ~finite[0]).all()  # F.interpolate also spreads it by weights of zero


@pytest.mark.parametrize("how", WRITTEN_OUT)
def test_apply_kernel__half_precision_does_not_overflow(how):
    kernel = range_weights(normal(1, 4, 12, 12, dtype=torch.float32), 1.0, 1.0)
    top = torch.finfo(torch.float16).max
    low = torch.full((1, 3, 4, 6), top, dtype=torch.float16).requires_grad_()
    for base, gain in (("bilinear", 1), ("bicubic", 1), ("bicubic", -1.5)):
        out = apply_kernel(low, (kernel * gain).half(), base, how)
        assert out.dtype == torch.float16
        assert torch.isfinite(out).all()
        torch.testing.assert_close(
            out, torch.full_like(out, max(gain, -1) * top), rtol=2e-3, atol=0
        )
    apply_kernel(low, kernel.half(), "bilinear", how).sum().backward()
    assert torch.isfinite(low.grad).all()


@pytest.mark.parametrize("how", WRITTEN_OUT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_functions__16_bit_agree_with_32(how, dtype):
    low, projected = normal(1, 8, 5, 4).to(dtype), normal(1, 4, 10, 12).to(dtype)
    weights = range_weights(projected, 2.0, 0.5, 3, how)
    exact = range_weights(projected.double(), 2.0, 0.5, 3, "reference")
    assert weights.dtype == dtype
    torch.testing.assert_close(weights.double(), exact, rtol=1e-2, atol=1e-5)
    out = gradients(lambda low, k: apply_kernel(low, k, "bicubic", how), low, weights)
    exact = gradients(
        lambda low, k: apply_kernel(low, k, "bicubic", "reference"), low.double(), weights.double()
    )
    for ours, reference in zip(out, exact, strict=True):
        assert ours.dtype == dtype
        scale = reference.abs().max()
        torch.testing.assert_close(ours.double() / scale, reference / scale, rtol=0, atol=2e-2)


def test_functions__autocast_leaves_them_exact():
    low, projected = normal(1, 3, 4, 4).float(), normal(1, 4, 8, 8).float()

    def both(low, projected):
        return apply_kernel(low, range_weights(projected, 1.0, 1.0))

    plain = gradients(both, low, projected)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(both, low, projected)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


def test_apply_kernel__batch_in_any_order_and_any_layout():
    low, kernel = normal(4, 3, 5, 6), normal(4, 49, 10, 18)
    order = torch.tensor([2, 0, 3, 1])
    out = apply_kernel(low, kernel)
    torch.testing.assert_close(apply_kernel(low[order], kernel[order]), out[order])
    assert out.is_contiguous(memory_format=torch.channels_last)
    channels_last = low.contiguous(memory_format=torch.channels_last)
    assert torch.equal(apply_kernel(channels_last, kernel), out)


@pytest.mark.parametrize("how", WRITTEN_OUT)
def test_functions__bad_input(how):
    low = torch.ones(1, 1, 2, 2)
    with pytest.raises(ConfigError, match=r"4x3.*radius 3 needs 4"):
        range_weights(torch.ones(1, 4, 4, 3), 1.0, 1.0, 3, how)
    with pytest.raises(ConfigError, match="2x4"):
        apply_kernel(low, torch.ones(1, 25, 2, 4), implementation=how)
    with pytest.raises(ConfigError, match="radius is 0"):
        range_weights(torch.ones(1, 4, 4, 3), 1.0, 1.0, 0, how)
    with pytest.raises(ConfigError, match="48"):
        apply_kernel(low, torch.ones(1, 48, 8, 8), implementation=how)
    with pytest.raises(ConfigError, match="'nearest'"):
        apply_kernel(low, torch.ones(1, 9, 4, 4), "nearest", how)
    with pytest.raises(ConfigError, match="'fast'"):
        apply_kernel(low, torch.ones(1, 9, 4, 4), implementation="fast")
