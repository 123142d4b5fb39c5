"""Shift and interleave: is each fine cell taken from where it lies?"""

import pytest
import torch
import torch.nn.functional as F

from radio_distill.config import TeacherConfig
from radio_distill.errors import ConfigError
from radio_distill.types import Features, TeacherSpec
from teachers import build_teacher
from upsamplers.methods.strided import Strided, offsets, shift


class Average:
    """Says each patch's mean colour, which for a ramp is the colour at the patch's centre."""

    def __init__(self, patch):
        none, one = (0.0,) * 3, (1.0,) * 3
        self.patch, self.spec = patch, TeacherSpec("toy", 3, 3, patch, (32, 32), None, none, one)
        self.num_images = 0

    def encode(self, pixels):
        self.num_images += len(pixels)
        return Features(pixels.mean((2, 3)), F.avg_pool2d(pixels, self.patch))

    def to(self, device):
        return self


@pytest.mark.parametrize("patch", [8, 14, 16])
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 7])
def test_strided__a_ramp_is_the_ramp_at_the_centres_of_fine_cells(factor, patch):
    rows, columns = 5, 6
    down = (torch.arange(rows * patch) + 0.5) / (rows * patch)  # colour at pixel centres
    right = (torch.arange(columns * patch) + 0.5) / (columns * patch)
    ramp = torch.stack(
        [
            down[:, None].expand(-1, len(right)),
            right.expand(len(down), -1),
            (down[:, None] + right) / 2,
        ]
    )
    grid = (rows * factor, columns * factor)
    fine = Strided(factor)(Average(patch), ramp[None], grid).spatial[0]
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
    fine = Strided(factor)(Average(patch), pixels, (4 * factor, 7 * factor)).spatial
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
def test_strided__real_encoders(name):
    teacher = build_teacher(name, TeacherConfig(preset=name))
    height, width = teacher.spec.grid(teacher.spec.native_size)
    pixels = torch.rand(2, 3, 50, 70)
    summary, spatial = Strided(3)(teacher, pixels, (3 * height, 3 * width))
    low = torch.nn.functional.interpolate(
        pixels, teacher.spec.native_size, mode="bicubic", antialias=True
    ).clamp(0, 1)
    expected = teacher.encode(low)
    # The copy in the middle is the image as it is.
    torch.testing.assert_close(spatial[:, :, 1::3, 1::3], expected.spatial, rtol=1e-4, atol=1e-4)
    if expected.summary is None:
        assert summary is None
    else:
        torch.testing.assert_close(summary, expected.summary, rtol=1e-4, atol=1e-4)


def test_strided__an_object_changes_the_cells_around_it_alone():
    """One patch of a ViT: its 2x2 fine cells, and those half a patch away on each side."""
    teacher = build_teacher("tiny_vit", TeacherConfig(preset="tiny_vit"))
    grey = torch.full((1, 3, 32, 48), 0.5)
    image = grey.clone()
    image[:, :, 16:24, 8:16] = (torch.arange(8) // 2 % 2).float()[:, None]
    difference = Strided(2)(teacher, torch.cat([image, grey]), (8, 12)).spatial
    change = (difference[0] - difference[1]).norm(dim=0)  # [8, 12]
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[3:7, 1:5] = True
    assert torch.equal(change > change.max() / 4, expected)


def test_strided__cost_is_the_images_it_encodes():
    for factor in (1, 2, 3):
        teacher = Average(8)
        Strided(factor)(teacher, torch.rand(2, 3, 16, 24), (2 * factor, 3 * factor))
        assert teacher.num_images == 2 * Strided(factor).cost((2 * factor, 3 * factor))


def test_strided__a_bad_image_does_not_touch_its_neighbours():
    pixels = torch.rand(2, 3, 16, 16)
    pixels[0, 0, 3, 3] = torch.nan
    fine = Strided(2)(Average(8), pixels, (4, 4)).spatial
    assert fine[0].isnan().any()
    assert fine[1].isfinite().all()


def test_strided__a_grid_that_does_not_divide():
    with pytest.raises(ConfigError, match="7x9"):
        Strided(2)(Average(8), torch.rand(1, 3, 16, 16), (7, 9))
