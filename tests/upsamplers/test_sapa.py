"""SAPA: kernels that follow the guidance, against a cell-by-cell computation."""

import pytest
import torch
import torch.nn.functional as F

from radio_distill.errors import ConfigError
from upsamplers.networks import Observation, build_network
from upsamplers.networks.sapa import SapaNetwork


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


@pytest.mark.parametrize("size", [(5, 7), (1, 3), (8, 2)])
@pytest.mark.parametrize("factor", [1, 2, 3, 7])
def test_sapa__starts_near_bilinear(observation, factor, size):
    seen = observation(32, factor, size)
    fine = SapaNetwork(32, factor)(seen)
    expected = F.interpolate(seen.low, scale_factor=factor, mode="bilinear", align_corners=False)
    assert fine.shape == (2, 32, size[0] * factor, size[1] * factor)
    assert (fine - expected).square().mean().sqrt() < 0.05


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


def test_sapa__a_constant_map_stays_constant_and_large_values_stay_finite():
    network = SapaNetwork(4, 3)
    torch.nn.init.normal_(network.position)
    guidance = torch.rand(1, 3, 60, 48)
    fine = network(Observation(guidance, torch.full((1, 4, 5, 4), 0.7)))
    torch.testing.assert_close(fine, torch.full((1, 4, 15, 12), 0.7))
    assert network(Observation(guidance, 1e6 * torch.randn(1, 4, 5, 4))).isfinite().all()


def test_sapa__bad_options():
    with pytest.raises(ConfigError, match="kernel_size: 0 is not an odd number, such as 5"):
        build_network("sapa", 8, 2, {"kernel_size": 0})
    with pytest.raises(ConfigError, match="factor is 0; it must be at least 1"):
        build_network("sapa", 8, 0, {})
