"""The de-bias, what a network is shown, and the way back to the teacher's space."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from radio_distill.config import UpsamplerConfig
from radio_distill.normalize.normalizers import Identity
from upsamplers import build_upsampler
from upsamplers.fitted import UpsamplerModel
from upsamplers.methods.tiling import cut, stitch
from upsamplers.networks import Observation
from upsamplers.networks.resize_conv import BilinearNetwork

CHANNELS, GRID = 8, (3, 5)


class Recorder(nn.Module):
    """Keeps what it was shown and answers with the tiles of its finest level, or the low map."""

    def __init__(self, *levels: int):
        super().__init__()
        self.tile_levels = levels

    def forward(self, observation: Observation) -> torch.Tensor:
        self.shown = observation
        return observation.tiles[max(self.tile_levels)] if self.tile_levels else observation.low


def model_of(network=None, normalizer=None, channels=CHANNELS, grid=GRID) -> UpsamplerModel:
    """Make a model with a bias that is not zero."""
    model = UpsamplerModel(network or Recorder(), normalizer or Identity(), channels, grid)
    if model.bias is not None:
        nn.init.normal_(model.bias, generator=torch.Generator().manual_seed(0))
    return model


def test_bias__starts_as_nothing(phi_s):
    model = UpsamplerModel(Recorder(), phi_s(CHANNELS), CHANNELS, GRID)
    maps = torch.randn(2, CHANNELS, 6, 10)
    assert torch.equal(model.de_biased(maps, level=2), maps)
    assert torch.equal(model.correct(maps), maps)


def test_bias__none_is_no_parameter_and_changes_nothing(phi_s):
    model = model_of(normalizer=phi_s(CHANNELS), grid=None)
    maps = torch.randn(1, CHANNELS, *GRID)
    assert list(model.parameters()) == []
    assert model.de_biased(maps) is maps
    assert model.correct(maps) is maps


@pytest.mark.parametrize("level", [1, 2, 3])
def test_de_biased__stitched_tiles_equal_each_tile_de_biased_alone(level):
    model = model_of()
    tiles = torch.randn(2 * level**2, CHANNELS, *GRID)
    expected = stitch(tiles + model.bias, level)
    torch.testing.assert_close(model.de_biased(stitch(tiles, level), level), expected)


@pytest.mark.parametrize("level", [1, 2])
def test_de_biased__is_resized_to_tiles_of_another_grid(level):
    model, grid = model_of(), (4, 9)
    maps = torch.randn(2, CHANNELS, grid[0] * level, grid[1] * level)
    bias = F.interpolate(model.bias, grid, mode="bilinear", align_corners=False)
    expected = stitch(cut(maps, level) + bias, level)
    torch.testing.assert_close(model.de_biased(maps, level), expected)


@pytest.mark.parametrize("grid", [GRID, (6, 4)])
@pytest.mark.parametrize("name", ["phi_s", "none"])
def test_correct__is_normalise_add_invert(phi_s, name, grid):
    normalizer = phi_s(CHANNELS) if name == "phi_s" else Identity()
    model = model_of(normalizer=normalizer)
    spatial = 3 * torch.randn(2, CHANNELS, *grid)
    expected = normalizer.invert(model.de_biased(normalizer.apply(spatial)))
    found = model.correct(spatial)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, spatial, atol=0.01)
    assert not found.requires_grad


def test_correct__keeps_the_type_of_the_features(phi_s):
    model = model_of(normalizer=phi_s(CHANNELS))
    assert model.correct(torch.randn(1, CHANNELS, *GRID).bfloat16()).dtype == torch.bfloat16


def test_forward__shows_the_network_de_biased_maps_and_the_bias_learns():
    model = model_of(Recorder(1, 2))
    low, tiles = torch.randn(2, CHANNELS, *GRID), torch.randn(2, CHANNELS, 6, 10)
    guidance = torch.rand(2, 3, 96, 160)
    model(Observation(guidance, low, {1: low, 2: tiles})).sum().backward()
    shown = model.network.shown
    assert shown.guidance is guidance
    torch.testing.assert_close(shown.low, low + model.bias)
    torch.testing.assert_close(shown.tiles[1], low + model.bias)
    torch.testing.assert_close(shown.tiles[2], tiles + model.bias.repeat(1, 1, 2, 2))
    torch.testing.assert_close(model.bias.grad, torch.full_like(model.bias, 2 * 4.0))


@pytest.mark.parametrize(("levels", "images"), [((), 1), ((2,), 5), ((2, 4), 21), ((1, 2), 5)])
@pytest.mark.parametrize("views", [0, 3])
def test_see__encodes_each_image_once_and_all_together(spy, phi_s, levels, images, views):
    teacher, batch = spy("tiny_vit"), 2
    model = model_of(Recorder(*levels), phi_s(32), 32)
    further = torch.rand(batch * views, 3, 24, 16) if views else None
    seen = model.encode(teacher, torch.rand(batch, 3, 50, 70), (12, 8), 4, further=further)
    assert teacher.calls == [batch * (images + views)]
    assert seen.observation.low.shape == (batch, 32, 3, 2)
    assert seen.observation.guidance.shape == (batch, 3, 96, 64)
    assert set(seen.observation.tiles) == set(levels)
    assert len(seen.further) == batch * views
    assert seen.summary.shape == (batch, 32)


def test_see__is_the_normalised_teacher_of_image_tiles_and_views(tiny, phi_s):
    teacher, scale = tiny("tiny_vit"), phi_s(32)
    model = model_of(Recorder(2), scale, 32)
    pixels, views = torch.rand(2, 3, 48, 32), torch.rand(4, 3, 24, 16)
    seen = model.encode(teacher, pixels, (6, 4), 2, further=views)
    tiles = stitch(teacher.encode(cut(pixels, 2)).spatial, 2)
    torch.testing.assert_close(seen.observation.tiles[2], scale.apply(tiles), rtol=1e-4, atol=1e-4)
    expected = scale.apply(teacher.encode(views).spatial)
    torch.testing.assert_close(seen.further, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(seen.observation.guidance, pixels)
    maps = (seen.observation.low, *seen.observation.tiles.values(), seen.further)
    assert not any(item.requires_grad for item in maps)


def test_see__fills_as_few_calls_as_the_micro_batch_allows(spy, phi_s):
    teacher, model = spy("tiny_vit"), model_of(Recorder(2), phi_s(32), 32)
    pixels, views = torch.rand(2, 3, 48, 32), torch.rand(2, 3, 24, 16)
    parts = model.encode(teacher, pixels, (6, 4), 2, micro_batch=5, further=views)
    assert teacher.calls == [5, 5, 2]
    whole = model.encode(teacher, pixels, (6, 4), 2, further=views)
    torch.testing.assert_close(parts.further, whole.further, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", ["tiny_vit", "tiny_dinov2", "tiny_samvit"])
def test_upsample__gives_the_exact_grid_in_the_teacher_s_own_space(tiny, phi_s, preset):
    """Interpolation commutes with an affine scale, so without bias it is `bilinear` itself."""
    teacher, factor = tiny(preset), 3
    rows, columns = teacher.spec.grid(teacher.spec.native_size)
    grid = (rows * factor, columns * factor)
    if not teacher.spec.fixed_size:
        grid = (3 * factor, 5 * factor)
    model = UpsamplerModel(BilinearNetwork(32, factor), phi_s(32), 32, (4, 4))
    pixels = torch.rand(1, 3, 50, 90)
    found = model.upsample(teacher, pixels, grid, factor)
    plain = build_upsampler(UpsamplerConfig(name="bilinear", factor=factor), {})
    expected = plain(teacher, pixels, grid)
    torch.testing.assert_close(found.spatial, expected.spatial, rtol=1e-4, atol=1e-4)
    assert found.spatial.shape == (1, 32, *grid)
    assert found.spatial.is_contiguous(memory_format=torch.channels_last)
    assert not found.spatial.requires_grad
    if teacher.spec.summary_channels is None:
        assert found.summary is None
    else:
        torch.testing.assert_close(found.summary, expected.summary)
