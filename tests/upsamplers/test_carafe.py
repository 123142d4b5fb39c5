"""CARAFE: reassembly against an unfolded reference, and where the network starts."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_distill.errors import ConfigError
from upsamplers.networks import Observation, build_network
from upsamplers.networks.carafe import CarafeNetwork, bilinear_logits, neighbourhoods, reassemble

SIZES = [(5, 7), (1, 3), (8, 2)]


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


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factor", [1, 2, 3, 7])
def test_carafe__starts_near_bilinear(observation, factor, size):
    seen = observation(32, factor, size)
    fine = CarafeNetwork(32, factor)(seen)
    expected = F.interpolate(seen.low, scale_factor=factor, mode="bilinear", align_corners=False)
    assert fine.shape == (2, 32, size[0] * factor, size[1] * factor)
    assert (fine - expected).square().mean().sqrt() < 0.05


def test_carafe__a_constant_map_stays_constant_to_its_border():
    network = CarafeNetwork(4, 3)
    torch.nn.init.normal_(network.encode.weight)
    fine = network(Observation(torch.rand(1, 3, 60, 48), torch.full((1, 4, 5, 4), 0.7)))
    torch.testing.assert_close(fine, torch.full((1, 4, 15, 12), 0.7))


def test_carafe__bad_options():
    with pytest.raises(ConfigError, match="kernel_size: 4 is not an odd number, such as 5"):
        build_network("carafe", 8, 2, {"kernel_size": 4})
    with pytest.raises(ConfigError, match="encoder_size: '3' is not an odd number"):
        build_network("carafe", 8, 2, {"encoder_size": "3"})
    with pytest.raises(ConfigError, match="did you mean 'kernel_size'"):
        build_network("carafe", 8, 2, {"kernel_sise": 5})
    with pytest.raises(ConfigError, match="factor is 0; it must be at least 1"):
        build_network("carafe", 8, 0, {})
