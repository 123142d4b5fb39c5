"""Resize-convolution and plain interpolation, the two simplest networks."""

import pytest
import torch
import torch.nn.functional as F

from radio_distill.errors import ConfigError
from upsamplers.networks import Observation, build_network


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


def test_resize_conv__a_constant_map_gives_a_constant_map():
    network = build_network("resize_conv", 4, 2, {})
    torch.nn.init.normal_(network.convolution.weight)
    fine = network(Observation(torch.rand(1, 3, 24, 40), torch.ones(1, 4, 3, 5)))
    torch.testing.assert_close(fine, fine[:, :, :1, :1].expand_as(fine))


def test_interpolation__learns_nothing_and_has_no_options():
    network = build_network("bilinear", 8, 2, {})
    assert list(network.parameters()) == []
    with pytest.raises(ConfigError, match="no option 'mode' \\(it has none\\)"):
        build_network("bilinear", 8, 2, {"mode": "bicubic"})
    with pytest.raises(ConfigError, match="factor is 0"):
        build_network("resize_conv", 8, 0, {})
