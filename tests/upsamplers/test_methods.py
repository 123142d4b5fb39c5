"""Upsamplers without parameters, on encoders whose answer is known."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from radio_distill.config import UpsamplerConfig
from radio_distill.errors import ConfigError, UnknownNameError
from upsamplers import build_upsampler
from upsamplers.methods.native import Native
from upsamplers.methods.strided import Strided, offsets, shift
from upsamplers.methods.tiling import cut, resize, stitch

from .colours import MeanColours


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
    encoder, grid = MeanColours(4), (2 * factor, 5 * factor)
    pixels = torch.rand(2, 3, grid[0] * 4, grid[1] * 4)
    found = build("tile", factor)(encoder, pixels, grid)
    torch.testing.assert_close(found.spatial, encoder.encode(pixels).spatial)


def test_bilinear__is_torch_s_own_interpolation_of_the_small_image():
    encoder, pixels = MeanColours(4), torch.rand(2, 3, 32, 48)
    small = F.interpolate(pixels, (16, 24), mode="bicubic", antialias=True).clamp(0, 1)
    for mode in ("bilinear", "bicubic"):
        expected = F.interpolate(encoder.encode(small).spatial, (8, 12), mode=mode)
        torch.testing.assert_close(build(mode, 2)(encoder, pixels, (8, 12)).spatial, expected)


def test_s2__is_bilinear_at_one_end_tile_at_the_other_and_linear_between():
    encoder, pixels, grid = MeanColours(4), torch.rand(2, 3, 36, 48), (9, 12)
    ends = [build(name, 3)(encoder, pixels, grid).spatial for name in ("tile", "bilinear")]
    for options, share in (({"beta": 0}, 0), ({"beta": 1.0}, 1), ({}, 0.5), ({"beta": 0.3}, 0.3)):
        found = build("s2", 3, options=options)(encoder, pixels, grid).spatial
        torch.testing.assert_close(found, (1 - share) * ends[0] + share * ends[1])


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "tile", "s2", "strided"])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_cost__is_the_number_of_encoded_images(name, factor):
    encoder, upsampler = MeanColours(4), build(name, factor)
    upsampler(encoder, torch.rand(3, 3, 24, 48), (6, 12))
    assert encoder.calls == [(3 * upsampler.cost((6, 12)), 24 // factor)]


@pytest.mark.parametrize("name", ["tile", "s2"])
def test_micro_batch__fills_as_few_calls_as_it_allows(name):
    encoder = MeanColours(4, summary_channels=None)
    found = build(name, 2, micro_batch=4)(encoder, torch.rand(2, 3, 16, 16), (4, 4))
    assert [images for images, _ in encoder.calls] == [4, 4, 2]
    assert found.summary is None


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("s2", {"options": {"bta": 0.5}}, "'beta'"),
        ("s2", {"options": {"beta": 1.5}}, "beta: 1.5"),
        ("s2", {"options": {"beta": "half"}}, "not a number"),
        ("tile", {"options": {"overlap": 2}}, "'overlap'"),
        ("tile", {"options": {"factor": 2}}, "'factor'"),
        ("tile", {"weights": {"clip": "x.safetensors"}}, "upsampler.weights"),
        ("tile", {"sha256": {"clip": "0" * 64}}, "'tile' has no file"),
        ("featup", {"options": {"any_siz": True}}, "'any_siz'.*'any_size'"),
        ("featup", {"options": {"precision": "half"}}, "precision: 'half'"),
        ("featsharp", {"options": {"weights": {}}}, "'weights'"),
        ("naf", {"options": {"repository": ["a"]}}, "repository: .*not a text"),
    ],
)
def test_build_upsampler__wrong_settings_are_one_line(name, values, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(name, 2, **values)
    assert "\n" not in str(error.value)


def test_build_upsampler__a_misspelt_name_gets_the_nearest():
    with pytest.raises(UnknownNameError, match="'bilinear'"):
        build("bilinaer", 2)


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_cnn"])
def test_native__is_the_teacher_at_factor_times_the_pixels(tiny, name):
    teacher = tiny(name)
    patch = teacher.spec.patch_size
    pixels = torch.rand(2, 3, 4 * patch, 6 * patch)
    spatial = Native(2)(teacher, pixels, (4, 6)).spatial
    torch.testing.assert_close(spatial, teacher.encode(pixels).spatial)


@pytest.mark.parametrize(
    ("factor", "micro_batch", "calls"),
    [
        (2, 8, [(5, 16), (2, 32), (2, 32), (1, 32)]),
        (2, 3, [(3, 16), (2, 16), *5 * [(1, 32)]]),  # less than one large image
    ],
)
def test_native__counts_a_large_image_as_so_many_small_ones(factor, micro_batch, calls):
    teacher, upsampler = MeanColours(4), Native(factor, micro_batch)
    upsampler(teacher, torch.rand(5, 3, 32, 32), (8, 8))
    assert teacher.calls == calls
    assert upsampler.cost((8, 8)) == 5
    assert Native(1).cost((8, 8)) == 1


def test_native__says_why_a_teacher_cannot_before_it_encodes():
    teacher = MeanColours(4, fixed_size=True)
    message = "show teacher 'colours' 32x48 pixels, which takes 16x16 only; use 'tile'"
    with pytest.raises(ConfigError, match=message):
        Native(2)(teacher, torch.rand(1, 3, 16, 24), (8, 12))
    teacher = MeanColours(4, max_size=40)
    with pytest.raises(ConfigError, match=r"32x48.* 40.*'tile'"):
        Native(2)(teacher, torch.rand(1, 3, 16, 24), (8, 12))
    assert teacher.calls == []


@pytest.mark.parametrize("patch", [8, 14, 16])
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 7])
def test_strided__a_ramp_is_the_ramp_at_the_centres_of_fine_cells(factor, patch):
    """For a ramp, a patch's mean colour is the colour at its centre."""
    rows, columns = 5, 6
    down = (torch.arange(rows * patch) + 0.5) / (rows * patch)  # colour at pixel centres
    right = (torch.arange(columns * patch) + 0.5) / (columns * patch)
    down, right = down[:, None].expand(-1, len(right)), right.expand(len(down), -1)
    ramp = torch.stack([down, right, (down + right) / 2])
    grid = (rows * factor, columns * factor)
    fine = Strided(factor)(MeanColours(patch), ramp[None], grid).spatial[0]
    y, x = ((torch.arange(cells) + 0.5) / cells for cells in grid)
    expected = torch.stack([y[:, None].expand(grid), x.expand(grid), (y[:, None] + x) / 2])
    # Half a patch from the border a copy shows the repeated edge, and the spline sees it first.
    inside = slice(factor // 2 + 1, -(factor // 2) - 1)
    torch.testing.assert_close(
        fine[:, inside, inside], expected[:, inside, inside], rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("factor", [2, 4])
def test_strided__whole_pixels_give_the_dense_average(factor):
    """A local teacher at a smaller stride is what interleaved copies are, borders aside."""
    patch = 8
    pixels = torch.rand(2, 3, 4 * patch, 7 * patch)
    fine = Strided(factor)(MeanColours(patch), pixels, (4 * factor, 7 * factor)).spatial
    margin = patch // 2 - patch // factor // 2
    padded = F.pad(pixels, (margin,) * 4, mode="replicate")
    dense = F.avg_pool2d(padded, patch, stride=patch // factor)
    torch.testing.assert_close(fine, dense)


def test_offsets__are_symmetric_and_a_fine_cell_apart():
    assert offsets(14, 2) == [-3.5, 3.5]
    assert offsets(16, 4) == [-6, -2, 2, 6]
    assert offsets(15, 3) == [-5, 0, 5]
    assert offsets(16, 1) == [0]


@pytest.mark.parametrize("offset", [-3.0, 0.0, 2.0])
def test_shift__whole_pixels_are_copied_and_the_edge_repeated(offset):
    pixels = torch.rand(1, 3, 6, 9)
    index = (torch.arange(9) + int(offset)).clamp(0, 8)
    assert torch.equal(shift(pixels, offset, dim=3), pixels[..., index])


def test_shift__by_parts_is_undone_by_the_way_back():
    """A smooth image survives there and back, away from the border."""
    x = torch.linspace(0, 6.28, 64, dtype=torch.float64)
    pixels = (x.sin()[:, None] * x.cos()).expand(1, 1, -1, -1)
    moved = shift(shift(pixels, 1.3, dim=2), -1.3, dim=2)
    torch.testing.assert_close(moved[:, :, 6:-6], pixels[:, :, 6:-6], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_cnn", "tiny_samvit"])
def test_strided__the_copy_in_the_middle_is_the_image_as_it_is(tiny, name):
    teacher = tiny(name)
    height, width = teacher.spec.grid(teacher.spec.native_size)
    pixels = torch.rand(2, 3, 50, 70)
    spatial = Strided(3)(teacher, pixels, (3 * height, 3 * width)).spatial
    expected = teacher.encode(resize(pixels, teacher.spec.native_size)).spatial
    torch.testing.assert_close(spatial[:, :, 1::3, 1::3], expected, rtol=1e-4, atol=1e-4)


def test_strided__an_object_changes_the_cells_around_it_alone(tiny):
    """One patch of a ViT: its 2x2 fine cells, and those half a patch away on each side."""
    grey = torch.full((1, 3, 32, 48), 0.5)
    image = grey.clone()
    image[:, :, 16:24, 8:16] = (torch.arange(8) // 2 % 2).float()[:, None]
    difference = Strided(2)(tiny("tiny_vit"), torch.cat([image, grey]), (8, 12)).spatial
    change = (difference[0] - difference[1]).norm(dim=0)  # [8, 12]
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[3:7, 1:5] = True
    assert torch.equal(change > change.max() / 4, expected)
