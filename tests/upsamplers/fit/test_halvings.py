"""The own training of UPLiFT and LiFT: which maps are compared, and how."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from radio_distill.config import FitConfig
from radio_distill.errors import ConfigError
from radio_distill.normalize import NORMALIZERS
from radio_distill.normalize.statistics import Moments
from upsamplers.fit.halvings import Halvings
from upsamplers.fitted import TeacherOutput, UpsamplerModel
from upsamplers.networks import Observation, build_network

CHANNELS = 4


class Doubled(nn.Module):
    """Each step repeats cells and doubles them, so that the number of steps shows."""

    tile_levels: tuple[int, ...] = ()

    def steps(self, observation, count):
        factors = [2**step for step in range(1, count + 1)]
        return [f * F.interpolate(observation.low, scale_factor=float(f)) for f in factors]


def model_of(network):
    normalizer = NORMALIZERS.get("phi_s")().fit(Moments.standard(CHANNELS))
    return UpsamplerModel(network, normalizer, CHANNELS, None)


def mse(prediction, target):
    return (prediction - target).square().mean((1, 2, 3))


def cosine(prediction, target):
    norms = prediction.norm(dim=1) * target.norm(dim=1)
    return 1 - ((prediction * target).sum(1) / norms).mean((1, 2))


@pytest.mark.parametrize("distance", [mse, cosine])
@pytest.mark.parametrize("chain", [True, False])
def test_halvings__every_map_becomes_that_of_the_larger_image(chain, distance):
    whole, half, quarter = (torch.randn(2, CHANNELS, side, 2 * side) for side in (8, 4, 2))
    config = FitConfig(halvings=2, chain=chain, distance=distance.__name__)
    observation = Observation(torch.rand(2, 3, 64, 128), whole)
    seen = TeacherOutput(None, observation, whole[:0], (half, quarter))
    loss, terms = Halvings(model_of(Doubled()), config)(
        seen, torch.zeros(2, 0, 3, 3), torch.Generator()
    )

    def grown(maps, factor):
        return factor * maps.repeat_interleave(factor, 2).repeat_interleave(factor, 3)

    expected = [distance(grown(half, 2), whole), distance(grown(quarter, 2), half)]
    if chain:
        expected.append(distance(grown(quarter, 4), whole))
    torch.testing.assert_close(loss, torch.stack(expected).mean(0))
    assert torch.equal(terms["halvings"], loss)


def test_halvings__a_network_without_steps_is_one_line():
    model = model_of(build_network("carafe", CHANNELS, 2, {}))
    with pytest.raises(ConfigError, match=r"fit.halvings: carafe .*uplift or lift"):
        Halvings(model, FitConfig(upsampler="carafe", halvings=1))


@pytest.mark.parametrize("name", ["uplift", "lift"])
def test_steps__end_where_the_network_does(name):
    network = build_network(name, 8, 4, {"cell_pixels": 2} if name == "uplift" else {})
    seen = Observation(torch.rand(2, 3, 48, 64), torch.randn(2, 8, 3, 4))
    first, second = network.steps(seen, 2)
    assert first.shape[2:] == (6, 8)
    torch.testing.assert_close(second, network(seen))
