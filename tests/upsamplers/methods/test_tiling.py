"""Interpolation, tiles and S2, on encoders whose answer is known."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from radio_distill.config import UpsamplerConfig
from radio_distill.errors import ConfigError, UnknownNameError
from radio_distill.types import Features, TeacherSpec
from upsamplers import build_upsampler
from upsamplers.methods.tiling import cut, resize, stitch

PATCH = 4


class LocalEncoder:
    """Convolves each patch by itself: equivariant to shifts by whole patches; counts images."""

    def __init__(self, summary=True):
        generator = torch.Generator().manual_seed(0)
        self.kernel = torch.randn(5, 3, PATCH, PATCH, generator=generator)
        width = 3 if summary else None
        zero, one = (0.0,) * 3, (1.0,) * 3
        self.spec = TeacherSpec("local", 5, width, PATCH, (16, 16), None, zero, one)
        self.calls = []

    def encode(self, pixels):
        self.calls.append(len(pixels))
        summary = pixels.mean((2, 3)) if self.spec.summary_channels else None
        return Features(summary, F.conv2d(pixels, self.kernel, stride=PATCH))

    def to(self, device):
        return self


def build(name, factor, **values):
    return build_upsampler(UpsamplerConfig(name=name, factor=factor, **values), {})


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_stitch__is_the_way_back_of_cut(factor, batch, rows, columns):
    pixels = torch.rand(batch, 3, factor * rows, factor * columns)
    tiles = cut(pixels, factor)
    assert tiles.shape == (batch * factor**2, 3, rows, columns)
    assert torch.equal(stitch(tiles, factor), pixels)


def test_cut__goes_row_by_row_within_each_image():
    pixels = torch.arange(32.0).view(2, 1, 4, 4)
    tiles = cut(pixels, 2)
    assert torch.equal(tiles[1, 0], pixels[0, 0, :2, 2:])
    assert torch.equal(tiles[4 + 2, 0], pixels[1, 0, 2:, :2])


def test_resize__leaves_its_own_size_alone_and_keeps_the_mean():
    pixels = torch.rand(1, 3, 32, 48)
    assert resize(pixels, (32, 48)) is pixels
    torch.testing.assert_close(resize(pixels, (16, 24)).mean(), pixels.mean(), rtol=0.02, atol=0)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_tile__of_an_equivariant_encoder_equals_it_on_the_big_image(factor):
    encoder, grid = LocalEncoder(), (2 * factor, 5 * factor)
    pixels = torch.rand(2, 3, grid[0] * PATCH, grid[1] * PATCH)
    found = build("tile", factor)(encoder, pixels, grid)
    torch.testing.assert_close(found.spatial, encoder.encode(pixels).spatial)


def test_bilinear__is_torch_s_own_interpolation_of_the_small_image():
    encoder, pixels = LocalEncoder(), torch.rand(2, 3, 32, 48)
    small = F.interpolate(pixels, (16, 24), mode="bicubic", antialias=True).clamp(0, 1)
    for mode in ("bilinear", "bicubic"):
        expected = F.interpolate(encoder.encode(small).spatial, (8, 12), mode=mode)
        torch.testing.assert_close(build(mode, 2)(encoder, pixels, (8, 12)).spatial, expected)


def test_s2__is_bilinear_at_one_end_tile_at_the_other_and_linear_between():
    encoder, pixels, grid = LocalEncoder(), torch.rand(2, 3, 36, 48), (9, 12)
    ends = [build(name, 3)(encoder, pixels, grid).spatial for name in ("tile", "bilinear")]

    def s2(**options):
        return build("s2", 3, options=options)(encoder, pixels, grid).spatial

    torch.testing.assert_close(s2(beta=0), ends[0])
    torch.testing.assert_close(s2(beta=1.0), ends[1])
    torch.testing.assert_close(s2(), (ends[0] + ends[1]) / 2)
    torch.testing.assert_close(s2(beta=0.3), 0.7 * ends[0] + 0.3 * ends[1])


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "tile", "s2"])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_cost__is_the_number_of_encoded_images(name, factor):
    encoder, grid, batch = LocalEncoder(), (6, 12), 3
    upsampler = build(name, factor)
    upsampler(encoder, torch.rand(batch, 3, 24, 48), grid)
    assert encoder.calls == [batch * upsampler.cost(grid)]


@pytest.mark.parametrize("name", ["tile", "s2"])
def test_micro_batch__fills_as_few_calls_as_it_allows(name):
    encoder = LocalEncoder()
    build(name, 2, micro_batch=4)(encoder, torch.rand(2, 3, 16, 16), (4, 4))
    assert encoder.calls == [4, 4, 2]


@pytest.mark.parametrize("name", ["tile", "s2"])
def test_summary__of_a_teacher_without_one_is_none(name):
    assert (
        build(name, 2)(LocalEncoder(summary=False), torch.rand(1, 3, 16, 16), (4, 4)).summary
        is None
    )


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("s2", {"options": {"bta": 0.5}}, "'beta'"),
        ("s2", {"options": {"beta": 1.5}}, "1.5"),
        ("s2", {"options": {"beta": "half"}}, "not a number"),
        ("tile", {"options": {"overlap": 2}}, "'overlap'"),
        ("tile", {"options": {"factor": 2}}, "'factor'"),
        ("tile", {"weights": {"clip": "x.safetensors"}}, "upsampler.weights"),
        ("featup", {"options": {"any_siz": True}}, "'any_siz'.*'any_size'"),
        ("featsharp", {"options": {"weights": {}}}, "'weights'"),
    ],
)
def test_build_upsampler__wrong_settings_are_one_line(name, values, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(name, 2, **values)
    assert "\n" not in str(error.value)


def test_build_upsampler__a_misspelt_name_gets_the_nearest():
    with pytest.raises(UnknownNameError, match="'bilinear'"):
        build("bilinaer", 2)
