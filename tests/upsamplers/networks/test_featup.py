"""FeatUp as a network of the fitting loop."""

import pytest
import torch

from radio_distill.errors import ConfigError
from upsamplers.networks import NETWORKS, Observation, build_network
from upsamplers.networks.featup import FeatUpNetwork


def test_network__is_in_the_table_and_needs_no_tiles():
    network = build_network("featup", 8, 3, {"variant": "featsharp", "radius": 2})
    assert isinstance(network, NETWORKS.get("featup"))
    assert network.tile_levels == ()
    out = network(Observation(torch.rand(2, 3, 36, 45), torch.rand(2, 8, 4, 5)))
    assert out.shape == (2, 8, 12, 15)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_network__sees_the_image_scaled():
    network = FeatUpNetwork(4, 2).eval()
    image, low = torch.rand(1, 3, 24, 24), torch.randn(1, 4, 4, 4)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = network.stack(low, (image - mean) / std)
    torch.testing.assert_close(network(Observation(image, low)), expected)
    assert set(network.state_dict()) == {f"stack.{name}" for name in network.stack.state_dict()}


def test_network__every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    network = FeatUpNetwork(4, 4)
    low = torch.randn(2, 4, 3, 4, requires_grad=True)
    network(Observation(torch.rand(2, 3, 48, 64), low)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (low, *network.parameters()))


def test_network__bad_options():
    with pytest.raises(ConfigError, match="'variants'"):
        build_network("featup", 4, 2, {"variants": "featup"})
    with pytest.raises(ConfigError, match="'paper'"):
        build_network("featup", 4, 2, {"variant": "paper"})
