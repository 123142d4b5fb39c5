"""The joint-bilateral layer's Triton kernels on a GPU, against the other implementations."""

import pytest
import torch

from upsamplers.joint_bilateral import triton_kernels
from upsamplers.joint_bilateral.dispatch import apply_kernel, range_weights

GPU = torch.device("cuda")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not triton_kernels.is_available(GPU),
    reason="needs an NVIDIA GPU from Ampere on",
)

LAYERS = [
    # batch, channels, cells, factors, radius, base
    (2, 768, (16, 16), (3, 3), 3, "bilinear"),
    (1, 1024, (27, 27), (2, 2), 3, "bilinear"),
    (2, 384, (14, 21), (2, 2), 3, "bicubic"),
    (1, 1280, (9, 8), (7, 7), 3, "bilinear"),
    (1, 100, (33, 5), (5, 5), 2, "bicubic"),
    (3, 37, (7, 11), (3, 2), 1, "bilinear"),
    (1, 17, (9, 11), (1, 1), 3, "bilinear"),
    (1, 5, (3, 2), (11, 11), 3, "bicubic"),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def normal(*shape, dtype=torch.float32):
    generator = torch.Generator(GPU).manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device=GPU).to(dtype)


def layer(batch, channels, cells, factors, radius, dtype):
    fine = [number * factor for number, factor in zip(cells, factors, strict=True)]
    low = normal(batch, channels, *cells, dtype=dtype)
    kernel = normal(batch, (2 * radius + 1) ** 2, *fine, dtype=dtype)
    return low, kernel, normal(batch, channels, *fine, dtype=dtype)


def run(function, given, *tensors):
    """Return the output and the gradients of all tensors."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*tensors)
    return out, *torch.autograd.grad(out, tensors, given.to(out.dtype))


def assert_close(actual, expected, tolerance):
    for ours, reference in zip(actual, expected, strict=True):
        error = (ours.double() - reference).abs().max() / reference.abs().max()
        assert error < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("batch", "channels", "cells", "factors", "radius", "base"), LAYERS)
def test_apply_kernel__is_folded_form(batch, channels, cells, factors, radius, base, dtype):
    low, kernel, given = layer(batch, channels, cells, factors, radius, dtype)
    ours = run(lambda *t: apply_kernel(*t, base, "triton"), given, low, kernel)
    wide = low.double(), kernel.double()
    expected = run(lambda *t: apply_kernel(*t, base, "folded"), given, *wide)
    assert_close(ours, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("batch", "keys", "height", "width", "radius"),
    [(2, 32, 81, 81, 3), (1, 5, 4, 6, 3), (2, 33, 50, 41, 2)],
)
def test_range_weights__is_reference(batch, keys, height, width, radius, dtype):
    projected = normal(batch, keys, height, width, dtype=dtype) * 0.5
    given = normal(batch, (2 * radius + 1) ** 2, height, width, dtype=dtype)
    tensors = projected, torch.tensor(0.7, device=GPU), torch.tensor(0.6, device=GPU)
    ours = run(lambda *t: range_weights(*t, radius, "triton"), given, *tensors)
    wide = [tensor.double() for tensor in tensors]
    expected = run(lambda *t: range_weights(*t, radius, "reference"), given, *wide)
    assert_close(ours[:2], expected[:2], TOLERANCE[dtype])
    assert_close(ours[2:], expected[2:], 10 * TOLERANCE[dtype])  # sums that nearly cancel


def test_both__same_bits_twice():
    low, _, given = layer(4, 768, (16, 16), (3, 3), 3, torch.bfloat16)
    projected = normal(4, 32, 48, 48, dtype=torch.bfloat16)
    scalars = torch.tensor(0.7, device=GPU), torch.tensor(0.6, device=GPU)

    def function(low, *tensors):
        kernel = range_weights(*tensors, 3, "triton")
        return apply_kernel(low, kernel, "bilinear", "triton")

    first, second = (run(function, given, low, projected, *scalars) for _ in range(2))
    for once, again in zip(first, second, strict=True):
        assert torch.equal(once, again)


def test_both__under_autocast_and_on_another_stream():
    low, kernel, given = layer(2, 96, (8, 9), (2, 2), 3, torch.bfloat16)
    plain = run(lambda *t: apply_kernel(*t, "bilinear", "triton"), given, low, kernel)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.autocast("cuda", torch.bfloat16):
        other = run(lambda *t: apply_kernel(*t, "bilinear", "triton"), given, low, kernel)
    stream.synchronize()
    for once, again in zip(plain, other, strict=True):
        assert torch.equal(once, again)


def test_both__never_synchronise():
    low, kernel, given = layer(2, 96, (8, 9), (2, 2), 3, torch.bfloat16)
    projected = normal(2, 32, 16, 18).requires_grad_()
    scalar = torch.ones((), device=GPU, requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(lambda *t: apply_kernel(*t, "bilinear", "triton"), given, low, kernel)
        triton_kernels.range_weights(projected, scalar, scalar).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_apply_kernel__more_than_32_bits_of_output():
    low = normal(1, 1280, 432, 432, dtype=torch.bfloat16)
    low = low.contiguous(memory_format=torch.channels_last)
    kernel = normal(1, 9, 1296, 1296, dtype=torch.bfloat16)
    with torch.no_grad():
        out = apply_kernel(low, kernel, "bilinear", "triton")
        assert out.numel() > 2**31
        corner = apply_kernel(low[:, -16:, -9:], kernel[:, :, -27:], "bilinear", "triton")
    torch.testing.assert_close(out[:, -16:, -20:], corner[:, :, -20:], rtol=2e-2, atol=2e-2)


def test_apply_kernel__keeps_no_windows():
    low, kernel, _ = layer(4, 768, (27, 27), (3, 3), 3, torch.bfloat16)
    low = low.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        apply_kernel(low, kernel, "bilinear", "triton")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = apply_kernel(low, kernel, "bilinear", "triton")
        peak = torch.cuda.max_memory_allocated() - before
    assert peak < 1.1 * out.numel() * out.itemsize
