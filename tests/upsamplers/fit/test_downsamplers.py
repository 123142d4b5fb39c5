"""Downsamplers: against a plain loop over windows, and the published programs' own numbers."""

import pytest
import torch
import torch.nn.functional as F

from radio_distill.errors import ConfigError, UnknownNameError
from upsamplers.fit import downsamplers
from upsamplers.fit.downsamplers import (
    DOWNSAMPLERS,
    AttentionDownsampler,
    FeatSharpAttentionDownsampler,
    SimpleDownsampler,
    build_downsampler,
    centred_windows,
    featsharp_windows,
    pool,
)

OURS = ["attention", "featup", "simple"]


@pytest.fixture
def tiles_of_two(monkeypatch):
    monkeypatch.setattr(downsamplers, "TILE", 2)
    downsamplers._plan.cache_clear()
    yield
    downsamplers._plan.cache_clear()


@pytest.fixture
def published(golden):
    """A golden case, and the state of its module."""

    def load(name):
        case = golden(name)
        return case, {key[3:]: value for key, value in case.items() if key.startswith("sd.")}

    return load


def build(name, channels=3, factor=2, kernel_size=3):
    """A downsampler none of whose parameters is degenerate."""
    module = build_downsampler(name, channels, factor, kernel_size).double().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.3 * noise
    return module


def loop(maps, weights, windows):
    """What :func:`pool` is defined to be."""
    h, w = (side // windows.factor for side in maps.shape[2:])
    pooled = maps.new_zeros(*maps.shape[:2], h, w)
    for i in range(h):
        for j in range(w):
            for tap in range(windows.kernel_size**2):
                y, x = divmod(tap, windows.kernel_size)
                y += i * windows.factor - windows.margin
                x += j * windows.factor - windows.margin
                near = (min(max(y, 0), maps.shape[2] - 1), min(max(x, 0), maps.shape[3] - 1))
                if windows.border == "replicate" or near == (y, x):
                    value = maps[:, :, near[0], near[1]]
                    pooled[:, :, i, j] += weights[:, tap, i, j, None] * value
    return pooled


def random_case(windows, grid, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    size = [side * windows.factor for side in grid]
    maps = torch.randn(2, 3, *size, generator=generator, dtype=dtype)
    weights = torch.rand(2, windows.kernel_size**2, *grid, generator=generator, dtype=dtype)
    return maps, weights


CASES = [
    (centred_windows(1, 3), (4, 5)),
    (centred_windows(2, 7), (5, 4)),
    (centred_windows(3, 7), (3, 5)),
    (centred_windows(4, 7), (7, 2)),
    (centred_windows(5, 3), (2, 3)),
    (featsharp_windows(2, 5), (5, 3)),
    (featsharp_windows(3, 7), (4, 4)),
]


@pytest.mark.parametrize(("windows", "grid"), CASES)
def test_pool__is_the_sum_over_windows(windows, grid):
    maps, weights = random_case(windows, grid)
    torch.testing.assert_close(pool(maps, weights, windows), loop(maps, weights, windows))


@pytest.mark.parametrize(("windows", "grid"), CASES)
def test_pool__is_the_same_in_several_tiles(windows, grid, tiles_of_two):
    maps, weights = random_case(windows, grid)
    torch.testing.assert_close(pool(maps, weights, windows), loop(maps, weights, windows))


def test_pool__has_more_than_one_tile_on_large_grids():
    maps, weights = random_case(centred_windows(2, 4), (17, 9))
    expected = loop(maps, weights, centred_windows(2, 4))
    torch.testing.assert_close(pool(maps, weights, centred_windows(2, 4)), expected)


@pytest.mark.parametrize("windows", [centred_windows(2, 4), featsharp_windows(2, 3)])
def test_pool__has_the_right_gradients(windows, tiles_of_two):
    maps, weights = (part.requires_grad_() for part in random_case(windows, (3, 2)))
    assert torch.autograd.gradcheck(lambda *parts: pool(*parts, windows), (maps, weights))


def test_pool__gives_gradients_after_a_call_in_inference_mode():
    downsamplers._plan.cache_clear()
    windows = centred_windows(2, 4)
    maps, weights = random_case(windows, (3, 2))
    with torch.inference_mode():
        pool(maps, weights, windows)
    pool(maps, weights.requires_grad_(), windows).sum().backward()
    assert weights.grad.abs().sum() > 0


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("kernel_size", [1, 6, 7])
def test_centred_windows__have_their_middle_in_the_middle_of_the_cell(factor, kernel_size):
    windows = centred_windows(factor, kernel_size)
    assert windows.kernel_size - factor == 2 * windows.margin >= 0
    assert kernel_size <= windows.kernel_size <= max(kernel_size + 1, factor)
    ramp = torch.arange(8.0 * factor).expand(1, 1, 8 * factor, -1)
    pooled = build_downsampler("simple", 1, factor, kernel_size)(ramp)[0, 0]
    centres = F.avg_pool2d(ramp, factor)[0, 0]
    torch.testing.assert_close(pooled[:, 4], centres[:, 4])


@pytest.mark.parametrize("name", sorted(DOWNSAMPLERS))
@pytest.mark.parametrize(("factor", "grid"), [(2, (4, 5)), (3, (3, 7)), (4, (5, 2))])
def test_downsampler__keeps_constants(name, factor, grid):
    module = build(name, factor=factor, kernel_size=7)
    size = [side * factor for side in grid]
    constant = torch.tensor([-2.0, 1.0, 3.0], dtype=torch.float64).view(1, 3, 1, 1)
    pooled = module(constant.expand(2, 3, *size))
    assert pooled.shape == (2, 3, *grid)
    expected = constant.expand(2, 3, *grid)
    if name in OURS:
        torch.testing.assert_close(pooled, expected)
    else:  # FeatSharp's zeros come in at the border
        assert (pooled / expected).amin() < 0.95


@pytest.mark.parametrize("name", sorted(DOWNSAMPLERS))
def test_downsampler__keeps_constants_far_from_the_border(name):
    module = build(name, factor=2, kernel_size=3)
    pooled = module(torch.full((1, 3, 16, 16), 2.0, dtype=torch.float64))[..., 2:-2, 2:-2]
    torch.testing.assert_close(pooled, torch.full_like(pooled, 2.0))


@pytest.mark.parametrize("name", sorted(DOWNSAMPLERS))
def test_downsampler__has_the_right_gradients(name):
    module = build(name)
    maps = torch.randn(1, 3, 6, 8, dtype=torch.float64, requires_grad=True)
    names = [key for key, _ in module.named_parameters()]
    parameters = tuple(module.parameters())

    def call(maps, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), maps)

    assert torch.autograd.gradcheck(call, (maps, *parameters))


@pytest.mark.parametrize("name", sorted(DOWNSAMPLERS))
def test_downsampler__works_in_half_precision_under_autocast(name):
    module = build(name, kernel_size=7).float()
    maps = torch.randn(2, 3, 20, 28).contiguous(memory_format=torch.channels_last)
    expected = module(maps)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = module(maps.requires_grad_())
    pooled.float().sum().backward()
    torch.testing.assert_close(pooled.float(), expected, rtol=0, atol=0.05)
    assert maps.grad.isfinite().all()


@pytest.mark.parametrize("name", ["attention", "featsharp_attention"])
def test_attention__drops_in_training_only(name):
    module = build(name)
    maps = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    state = torch.get_rng_state()
    still = module(maps)
    assert torch.equal(module(maps), still)
    assert torch.equal(torch.get_rng_state(), state)
    module.train()
    assert not torch.equal(module(maps), still)
    module.dropout = 0.0
    torch.testing.assert_close(module(maps), still)


def test_attention__heeds_what_is_salient():
    module = AttentionDownsampler(2, 2, 2).eval()
    module.attention_net[1].weight.data = torch.tensor([[0.0, 50.0]])
    maps = torch.rand(1, 2, 4, 4)
    maps[:, 1] = 0
    maps[:, 1, 1::2, 0::2] = 1  # lower left of each cell
    torch.testing.assert_close(module(maps)[:, 0], maps[:, 0, 1::2, 0::2])


@pytest.mark.parametrize("blur", [True, False])
def test_attention__is_featups_in_windows_of_one_cell(published, blur):
    case, weights = published(f"featup_attention_down_{'blur' if blur else 'noblur'}")
    module = AttentionDownsampler(6, factor=4, kernel_size=4, blur=blur).eval()
    module.load_state_dict(weights)
    torch.testing.assert_close(module(case["hr_feats"]), case["out_nodrop"])
    keep = case["keep_mask"].permute(0, 3, 1, 2)
    torch.testing.assert_close(module(case["hr_feats"], keep), case["out"])


def test_featup__starts_as_the_published_program_does():
    """A flat mean over windows of the blurred map, where saliency does not count."""
    module = build_downsampler("featup", 3, 4, 4).eval()
    maps = torch.rand(1, 3, 16, 16)
    line = torch.softmax(-((torch.arange(5) - 2.0) ** 2) / 2, dim=0)
    kernel = (line[:, None] * line).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(maps, 4 * (2,), mode="reflect"), kernel, groups=3)
    found = module(maps, keep=torch.zeros(1, 1, 4, 4))
    torch.testing.assert_close(found, F.avg_pool2d(blurred, 4))
    assert not torch.allclose(found, build_downsampler("attention", 3, 4, 4).eval()(maps))


def test_simple__is_featups_in_windows_of_one_cell(published):
    case, weights = published("featup_simple_down")
    module = SimpleDownsampler(3, factor=4, kernel_size=4)
    module.load_state_dict(weights)
    torch.testing.assert_close(module(case["hr_feats"]), case["out"])


def test_featsharp_attention__is_the_released_one(published):
    case, weights = published("featsharp_attention_down")
    module = FeatSharpAttentionDownsampler(6, factor=2, kernel_size=3).eval()
    torch.testing.assert_close(module.blur_kernel, weights["blur_kernel"])
    module.load_state_dict(weights)
    torch.testing.assert_close(module(case["hr_feats"]), case["out_nodrop"])
    torch.testing.assert_close(module(case["hr_feats"], case["keep_mask"]), case["out"])


def test_featsharp_simple__is_the_released_one(published):
    case, weights = published("featsharp_simple_down")
    module = SimpleDownsampler(3, factor=2, kernel_size=3, featsharp=True)
    module.load_state_dict(weights)
    torch.testing.assert_close(module(case["hr_feats"]), case["out"])


@pytest.mark.parametrize("name", sorted(DOWNSAMPLERS))
@pytest.mark.parametrize(
    ("size", "message"),
    [((8, 9), "8x9 .*factor 2"), ((8, 4), "larger than the")],
)
def test_downsampler__refuses_maps_that_do_not_fit(name, size, message):
    with pytest.raises(ConfigError, match=message):
        build_downsampler(name, 3, factor=2, kernel_size=5)(torch.rand(1, 3, *size))


@pytest.mark.parametrize("name", sorted(DOWNSAMPLERS))
@pytest.mark.parametrize(("factor", "kernel_size"), [(0, 7), (2, 0), (-1, 7)])
def test_build_downsampler__refuses_sizes_below_one(name, factor, kernel_size):
    with pytest.raises(ConfigError, match="at least 1"):
        build_downsampler(name, 3, factor, kernel_size)


def test_build_downsampler__refuses_unknown_names_and_even_featsharp_kernels():
    with pytest.raises(UnknownNameError, match="'attention'"):
        build_downsampler("atention", 3, 2)
    with pytest.raises(ConfigError, match="kernel_size is 4"):
        build_downsampler("featsharp_attention", 3, 2, 4)


def test_attention__refuses_to_blur_two_pixels():
    with pytest.raises(ConfigError, match="2x2"):
        AttentionDownsampler(3, 2, 2, blur=True)(torch.rand(1, 3, 2, 2))
