"""Networks of the field, and plain interpolation: what holds for all, and for each."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_distill.errors import ConfigError
from upsamplers.networks import Observation, build_network
from upsamplers.networks.carafe import bilinear_logits, neighbourhoods, reassemble
from upsamplers.networks.sapa import SapaNetwork

SIZES = [(5, 7), (1, 3), (8, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("name", ["carafe", "sapa", "resize_conv", "uplift", "lift"])
def test_network__trains_every_parameter(observation, name, factor, dtype):
    network, seen = build_network(name, 16, factor, {}), observation(16, factor)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        fine = network(seen)
    (fine.float() ** 2).mean().backward()
    for label, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), label
        assert parameter.grad.abs().max() > 0, label


@pytest.mark.parametrize("name", ["carafe", "sapa", "uplift", "lift"])
def test_network__bf16_is_close_to_float32(observation, name):
    network, seen = build_network(name, 16, 3, {}), observation(16, 3)
    expected = network(seen)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(seen)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["carafe", "sapa"])
def test_network__a_bad_cell_reaches_no_further_than_the_kernels(observation, name):
    seen = observation(8, 2, size=(12, 12))
    seen.low[0, 0, 1, 1] = torch.nan
    fine = build_network(name, 8, 2, {})(seen)
    assert fine[1].isfinite().all()
    assert fine[0, 0, :2].isnan().any()
    assert fine[0, :, 8:].isfinite().all()
    assert fine[0, :, :, 8:].isfinite().all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factor", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["carafe", "sapa"])
def test_network__starts_near_bilinear(observation, name, factor, size):
    seen = observation(32, factor, size)
    fine = build_network(name, 32, factor, {})(seen)
    expected = F.interpolate(seen.low, scale_factor=factor, mode="bilinear", align_corners=False)
    assert fine.shape == (2, 32, size[0] * factor, size[1] * factor)
    assert (fine - expected).square().mean().sqrt() < 0.05


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("carafe", "encode.weight"),
        ("sapa", "position"),
        ("resize_conv", "convolution.weight"),
        ("uplift", "attend.weight"),
    ],
)
def test_network__a_constant_map_stays_constant_to_its_border(name, part):
    network = build_network(name, 4, 3, {})
    torch.nn.init.normal_(network.get_parameter(part))
    fine = network(Observation(torch.rand(1, 3, 60, 48), torch.full((1, 4, 5, 4), 0.7)))
    torch.testing.assert_close(fine, fine[:, :, :1, :1].expand_as(fine))
    if name != "resize_conv":
        torch.testing.assert_close(fine, torch.full((1, 4, 15, 12), 0.7))


@pytest.mark.parametrize(
    ("name", "factor", "options", "message"),
    [
        ("carafe", 2, {"kernel_size": 4}, "kernel_size: 4"),
        ("carafe", 2, {"encoder_size": "3"}, "encoder_size: '3'"),
        ("carafe", 2, {"kernel_sise": 5}, "'kernel_size'"),
        ("carafe", 0, {}, "factor is 0"),
        ("sapa", 2, {"kernel_size": 0}, "kernel_size: 0"),
        ("sapa", 0, {}, "factor is 0"),
        ("bilinear", 2, {"mode": "bicubic"}, "'mode'"),
        ("resize_conv", 0, {}, "factor is 0"),
        ("uplift", 2, {"width": 16}, "width: 16"),
        ("uplift", 2, {"cell_pixels": 0}, "cell_pixels: 0"),
    ],
)
def test_network__bad_options(name, factor, options, message):
    with pytest.raises(ConfigError, match=message):
        build_network(name, 8, factor, options)


def test_bilinear__learns_nothing():
    assert list(build_network("bilinear", 8, 2, {}).parameters()) == []


def test_sapa__large_values_stay_finite():
    guidance = torch.rand(1, 3, 60, 48)
    fine = SapaNetwork(4, 3)(Observation(guidance, 1e6 * torch.randn(1, 4, 5, 4)))
    assert fine.isfinite().all()


@pytest.mark.parametrize("name", ["resize_conv", "bilinear"])
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (8, 2)])
@pytest.mark.parametrize("factor", [1, 2, 7])
def test_resize_conv__starts_at_bilinear(observation, name, factor, size):
    seen = observation(6, factor, size)
    network = build_network(name, 6, factor, {})
    expected = F.interpolate(seen.low, scale_factor=factor, mode="bilinear", align_corners=False)
    found = network(seen)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert network.tile_levels == ()


def test_resize_conv__learns_to_undo_some_of_the_blur():
    torch.manual_seed(0)
    low = torch.randn(4, 3, 12, 8)
    target = F.interpolate(low, scale_factor=2, mode="nearest")
    network = build_network("resize_conv", 3, 2, {})
    seen = Observation(torch.rand(4, 3, 48, 32), low)
    start = F.mse_loss(network(seen), target).item()
    optimizer = torch.optim.NAdam(network.parameters(), 0.02)
    for _ in range(60):
        loss = F.mse_loss(network(seen), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < start / 2


def test_sapa__is_the_softmax_of_similarities():
    """One fine cell of each kind, computed from the definition."""
    factor, network = 3, SapaNetwork(8, 3, kernel_size=3, embedding_channels=6).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    seen = Observation(
        torch.rand(1, 3, 4 * 9, 5 * 9).double(), torch.randn(1, 8, 4, 5).double()
    )  # three pixels a fine cell
    fine = network(seen)[0]
    for row, column in ((0, 0), (5, 7), (11, 14), (4, 2)):
        pixels = seen.guidance[0, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        query = network.query(pixels.mean((1, 2)).view(1, 3, 1, 1)).flatten()
        logits, values = [], []
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                y = min(max(row // factor + down, 0), 3)
                x = min(max(column // factor + right, 0), 4)
                value = seen.low[0, :, y, x]
                logits.append(network.key(network.norm(value)) @ query / 6**0.5)
                values.append(value)
        bias = network.position[row % factor * factor + column % factor]
        weights = (torch.stack(logits) + bias).softmax(0)
        expected = (weights[:, None] * torch.stack(values)).sum(0)
        torch.testing.assert_close(fine[:, row, column], expected)


def test_sapa__learns_an_edge_of_the_image_that_the_low_map_lacks():
    """Two colours meet inside a cell: fitted, the map changes there, not at the cell's border."""
    torch.manual_seed(0)
    factor, low = 4, torch.zeros(1, 2, 4, 8)
    low[:, 0, :, :4], low[:, 1, :, 4:] = 1, 1
    low[..., 4] = 0.5  # the cell that both colours share
    guidance = torch.zeros(1, 3, 16, 32)
    guidance[..., 18:] = 1
    target = torch.stack([1 - guidance[0, 0], guidance[0, 0]])[None]
    network = SapaNetwork(2, factor)
    seen = Observation(guidance, low)
    bilinear = F.mse_loss(network(seen), target).item()
    optimizer = torch.optim.NAdam(network.parameters(), 0.02)
    for _ in range(100):
        loss = F.mse_loss(network(seen), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < bilinear / 5


def reassemble_by_unfolding(low, weights, factor):
    """Every fine cell's neighbourhood written out at the size of the result."""
    side = int(weights.shape[-1] ** 0.5)
    padded = F.pad(low, (side // 2,) * 4, mode="replicate")
    cells = F.unfold(padded, side).view(len(low), low.shape[1], side**2, *low.shape[2:])
    cells = cells.repeat_interleave(factor, 3).repeat_interleave(factor, 4)
    kernel = rearrange(weights, "b h w (i j) t -> b 1 t (h i) (w j)", i=factor)
    return (cells * kernel).sum(2)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.sampled_from([1, 2, 3, 7]), st.sampled_from([3, 5]))
def test_reassemble__is_the_unfolded_form(height, width, factor, side):
    low = torch.randn(2, 3, height, width)
    weights = torch.randn(2, height, width, factor**2, side**2)
    fine = reassemble(low, weights, factor)
    torch.testing.assert_close(fine, reassemble_by_unfolding(low, weights, factor))
    assert fine.is_contiguous(memory_format=torch.channels_last)


def test_reassemble__gradients():
    low = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(1, 4, 3, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: reassemble(a, b, 2), (low, weights))


def test_reassemble__keeps_no_neighbourhoods_for_the_backward_pass():
    low = torch.randn(1, 64, 16, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(1, 16, 16, 4, 25, dtype=torch.float64, requires_grad=True)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fine = reassemble(low, weights, 2)
    assert sum(kept.values()) < 2 * fine.nbytes
    fine.sum().backward()
    torch.testing.assert_close(weights.grad.sum(), neighbourhoods(low, 5).sum() * 4)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 7])
def test_bilinear_logits__are_those_of_interpolation(factor):
    weights = bilinear_logits(factor, 5).exp() - 1e-3
    torch.testing.assert_close(weights.sum(-1), torch.ones(factor**2))
    low = torch.randn(1, 4, 5, 6)
    fine = reassemble(low, weights.expand(1, 5, 6, -1, -1), factor)
    expected = F.interpolate(low, scale_factor=factor, mode="bilinear", align_corners=False)
    torch.testing.assert_close(fine, expected)
