"""The Triton kernels in Triton's interpreter, on a CPU; test_triton_kernels.py runs this file.

It needs a process of its own: ``TRITON_INTERPRET`` counts when Triton is first imported.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.joint_bilateral_gpu import Case, sweep
from radio_distill.errors import ConfigError
from upsamplers.joint_bilateral import triton_kernels, triton_tiles
from upsamplers.joint_bilateral.dispatch import apply_kernel, joint_bilateral, range_weights

# Sizes that leave a rest: against tiles of cells, blocks of channels, strips and rows of strips.
LAYERS = [
    # batch, channels, cells, factors, radius, base
    (1, 3, (5, 6), (2, 2), 3, "bilinear"),
    (1, 70, (7, 5), (2, 2), 1, "bicubic"),
    (1, 17, (4, 7), (3, 3), 1, "bilinear"),
    (1, 2, (3, 5), (3, 3), 1, "bicubic"),
    (1, 300, (2, 3), (5, 5), 1, "bilinear"),
    (1, 2, (1, 2), (7, 7), 2, "bicubic"),
    (1, 2, (2, 1), (11, 11), 1, "bilinear"),
    (2, 2, (6, 7), (3, 2), 1, "bilinear"),
]


def normal(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def layer(batch, channels, cells, factors, radius, dtype=torch.float32):
    fine = [number * factor for number, factor in zip(cells, factors, strict=True)]
    low, given = normal(batch, channels, *cells), normal(batch, channels, *fine)
    kernel = normal(batch, (2 * radius + 1) ** 2, *fine)
    return low.to(dtype), kernel.to(dtype), given.to(dtype)


def run(function, given, *tensors):
    """Return the output and the gradients of all tensors."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*tensors)
    return out, *torch.autograd.grad(out, tensors, given.to(out.dtype))


def assert_close(actual, expected, tolerance):
    for ours, reference in zip(actual, expected, strict=True):
        error = (ours.double() - reference).abs().max() / reference.abs().max()
        assert error < tolerance


@pytest.mark.parametrize(("batch", "channels", "cells", "factors", "radius", "base"), LAYERS)
def test_apply_kernel__is_reference(batch, channels, cells, factors, radius, base):
    low, kernel, given = layer(batch, channels, cells, factors, radius)
    ours = run(lambda *t: apply_kernel(*t, base, "triton"), given, low, kernel)
    reference = run(
        lambda *t: apply_kernel(*t, base, "reference"), given, low.double(), kernel.double()
    )
    assert_close(ours, reference, 2e-6)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("batch", "channels", "cells", "factors", "radius", "base"),
    [  # both bases, and unequal factors
        (1, 3, (2, 5), (2, 2), 3, "bilinear"),
        (1, 2, (2, 3), (3, 3), 1, "bicubic"),
        (2, 2, (2, 3), (3, 2), 1, "bilinear"),
    ],
)
def test_joint_bilateral__is_reference(batch, channels, cells, factors, radius, base):
    low, _, given = layer(batch, channels, cells, factors, radius)
    projected = normal(batch, 6, *given.shape[2:]) * 0.7
    tensors = low, projected, torch.tensor(0.7), torch.tensor(0.6)
    ours = run(lambda *t: joint_bilateral(*t, radius, base, "triton"), given, *tensors)
    wide = [tensor.double() for tensor in tensors]
    reference = run(lambda *t: joint_bilateral(*t, radius, base, "reference"), given, *wide)
    assert_close(ours[:2], reference[:2], 2e-6)

    def apart(low, *guidance):
        return apply_kernel(low, range_weights(*guidance, radius, "triton"), base, "triton")

    separate = run(apart, given, *tensors)
    assert_close(ours[2:], [tensor.double() for tensor in separate[2:]], 1e-6)


def test_joint_bilateral__16_bit_is_reference():
    low, _, given = layer(1, 5, (3, 4), (2, 2), 3, torch.bfloat16)
    projected = normal(1, 6, 6, 8, dtype=torch.bfloat16) * 0.7
    tensors = low, projected, torch.tensor(0.7), torch.tensor(0.6)
    ours = run(lambda *t: joint_bilateral(*t, 3, "bilinear", "triton"), given, *tensors)
    wide = [tensor.double() for tensor in tensors]
    reference = run(lambda *t: joint_bilateral(*t, 3, "bilinear", "reference"), given, *wide)
    assert_close(ours[:3], reference[:3], 2e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_apply_kernel__16_bit_is_reference(dtype, tolerance):
    low, kernel, given = layer(1, 5, (5, 6), (2, 2), 1, dtype)
    ours = run(lambda *t: apply_kernel(*t, "bilinear", "triton"), given, low, kernel)
    reference = run(
        lambda *t: apply_kernel(*t, "bilinear", "reference"), given, low.double(), kernel.double()
    )
    assert [tensor.dtype for tensor in ours] == [dtype] * 3
    assert_close(ours, reference, tolerance)


def test_apply_kernel__types_may_differ_and_autocast_changes_nothing():
    low, kernel, given = layer(1, 3, (4, 4), (2, 2), 1)
    low = low.bfloat16()
    plain = run(lambda *t: apply_kernel(*t, "bilinear", "triton"), given, low, kernel)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(lambda *t: apply_kernel(*t, "bilinear", "triton"), given, low, kernel)
    for before, after in zip(plain, cast, strict=True):
        assert torch.equal(before, after)
    assert [tensor.dtype for tensor in plain] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_apply_kernel__half_precision_saturates():
    top = torch.finfo(torch.float16).max
    low = torch.full((1, 2, 3, 3), top, dtype=torch.float16)
    kernel = torch.full((1, 9, 6, 6), 1.5, dtype=torch.float16)
    out = apply_kernel(low, kernel, "bilinear", "triton")
    assert torch.equal(out, torch.full_like(out, top))


def test_apply_kernel__published_convolution(golden, close):
    # The published function takes a map that is padded already: its output is our middle.
    expected = golden("adaptive_conv_7x7")
    kernel = F.pad(expected["filters"].flatten(3).movedim(3, 1), (3,) * 4)
    given = F.pad(expected["grad_out"], (3,) * 4)
    out, low_grad, kernel_grad = run(
        lambda *t: apply_kernel(*t, "bilinear", "triton"), given, expected["input"], kernel
    )
    close(out[..., 3:-3, 3:-3], expected["out"], 1e-5)
    close(low_grad, expected["grad_input"], 1e-4)
    right = kernel_grad[..., 3:-3, 3:-3].movedim(1, 3).unflatten(3, (7, 7))
    close(right, expected["grad_filters"], 1e-4)


@pytest.mark.parametrize(
    ("batch", "keys", "height", "width", "radius"),
    [(2, 5, 7, 9, 1), (1, 33, 4, 6, 3), (1, 3, 5, 13, 2)],
)
def test_range_weights__is_reference(batch, keys, height, width, radius):
    projected = normal(batch, keys, height, width) * 0.5
    given = normal(batch, (2 * radius + 1) ** 2, height, width)
    tensors = projected, torch.tensor(0.7), torch.tensor([-0.6])
    ours = run(lambda *t: range_weights(*t, radius, "triton"), given, *tensors)
    wide = [tensor.double() for tensor in tensors]
    reference = run(lambda *t: range_weights(*t, radius, "reference"), given.double(), *wide)
    assert_close(ours, reference, 1e-5)


def test_range_weights__16_bit_is_reference():
    projected, given = normal(1, 8, 6, 5, dtype=torch.bfloat16), normal(1, 9, 6, 5)
    tensors = torch.tensor(0.7), torch.tensor(0.6)
    ours = run(lambda *t: range_weights(*t, 1, "triton"), given.bfloat16(), projected, *tensors)
    wide = [tensor.double() for tensor in (projected, *tensors)]
    reference = run(lambda *t: range_weights(*t, 1, "reference"), given.bfloat16().double(), *wide)
    assert ours[0].dtype == torch.bfloat16
    assert_close(ours, reference, 3e-2)


def test_both__gradcheck():
    low = normal(1, 1, 2, 2, dtype=torch.float64).requires_grad_()
    projected = normal(1, 2, 4, 4, dtype=torch.float64).requires_grad_()
    scalars = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.8, 0.5)]

    def function(low, *tensors):
        return apply_kernel(low, range_weights(*tensors, 1, "triton"), "bilinear", "triton")

    inputs = (low, projected, *scalars)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_both__same_bits_twice():
    projected, (low, _, given) = normal(1, 4, 4, 8), layer(1, 5, (2, 4), (2, 2), 1)
    scalars = torch.tensor(0.7), torch.tensor(0.6)

    def function(low, *tensors):
        return apply_kernel(low, range_weights(*tensors, 1, "triton"), "bilinear", "triton")

    first, second = (run(function, given, low, projected, *scalars) for _ in range(2))
    for once, again in zip(first, second, strict=True):
        assert torch.equal(once, again)


def test_apply_kernel__any_memory_layout():
    low, kernel, given = layer(2, 3, (3, 4), (2, 2), 1)
    plain = run(lambda *t: apply_kernel(*t, "bilinear", "triton"), given, low, kernel)
    other = run(
        lambda low, kernel: apply_kernel(low.mT, kernel.mT, "bilinear", "triton").mT,
        given.contiguous(memory_format=torch.channels_last),
        low.mT.contiguous().mT.to(memory_format=torch.channels_last),
        kernel.unflatten(1, (3, 3)).transpose(1, 2).flatten(1, 2),
    )
    torch.testing.assert_close(other[0], plain[0])
    torch.testing.assert_close(other[1], plain[1])


def test_apply_kernel__gradient_of_one_input_is_that_of_both():
    low, kernel, given = layer(1, 2, (3, 3), (2, 2), 1)
    _, grad_low, grad_kernel = run(
        lambda *t: apply_kernel(*t, "bilinear", "triton"), given, low, kernel
    )
    alone = run(lambda low: apply_kernel(low, kernel, "bilinear", "triton"), given, low)
    assert torch.equal(alone[1], grad_low)
    alone = run(lambda kernel: apply_kernel(low, kernel, "bilinear", "triton"), given, kernel)
    assert torch.equal(alone[1], grad_kernel)


def test_apply_kernel__without_gradient_keeps_nothing():
    low, kernel, _ = layer(1, 2, (3, 3), (2, 2), 1)
    with torch.no_grad():
        out = apply_kernel(low.requires_grad_(), kernel, "bilinear", "triton")
    assert out.grad_fn is None


def test_apply_kernel__too_large_for_32_bits():
    low, kernel = torch.empty(1, 1, 4096, 4096, device="meta"), torch.empty(1, device="meta")
    with pytest.raises(ConfigError, match=r"8192x8192.*'triton'"):
        triton_kernels.apply_kernel(low, kernel.expand(1, 49, 8192, 8192))


def test_sweep__kernels_are_launched_with_what_it_wrote(tmp_path, monkeypatch):
    low, kernel, given = layer(1, 40, (4, 5), (3, 3), 3)
    before = run(lambda *t: apply_kernel(*t, "bilinear", "triton"), given, low, kernel)
    monkeypatch.setattr(triton_tiles, "TABLE", tmp_path / "launches.json")
    choices = [{"BLOCK": block, "num_warps": 2, "num_stages": 1} for block in (16, 32, 64)]
    took = iter([3.0, 1.0, 2.0] * 3)  # the second is fastest

    def time(call):
        call()
        return next(took)

    sweep(Case(1, 40, 4, (3,), torch.float32), "cpu", choices, time, triton_tiles.TABLE)
    for name in triton_tiles.DEFAULT:
        assert triton_tiles.launch_settings(name, low) == choices[1]
        assert triton_tiles.launch_settings(name, low.bfloat16()) == triton_tiles.DEFAULT[name]
    after = run(lambda *t: apply_kernel(*t, "bilinear", "triton"), given, low, kernel)
    assert_close(after, [tensor.double() for tensor in before], 2e-6)
