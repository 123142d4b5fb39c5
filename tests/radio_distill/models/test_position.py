"""CPE: on a table that holds its own coordinates, the output says where it was sampled."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_distill.models.position import NUM_DRAWS, CroppedPositions, crop_axes

SIDE = 16
unit = st.floats(0, 1, exclude_max=True, width=32)
grids = st.tuples(st.integers(2, 9), st.integers(2, 9))


def coordinate_positions(dropout=0.0):
    """A table of two channels, (y, x) of each cell in [0, 1], which bilinear sampling keeps."""
    positions = CroppedPositions(2, SIDE, dropout)
    axis = torch.linspace(0, 1, SIDE)
    with torch.no_grad():
        positions.table.copy_(torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1))
    return positions


def sample(draws, grid):
    return coordinate_positions()(grid, torch.tensor([draws], dtype=torch.float32))[0].detach()


@settings(max_examples=60, deadline=None)
@given(st.lists(unit, min_size=NUM_DRAWS, max_size=NUM_DRAWS), grids)
def test_forward__crop_stays_inside_the_table_at_even_steps(draws, grid):
    points = sample(draws, grid)  # [h, w, 2]
    assert points.shape == (*grid, 2)
    assert points.min() >= -1e-5
    assert points.max() <= 1 + 1e-5
    rows, columns = points[:, 0, 0], points[0, :, 1]
    torch.testing.assert_close(points[..., 0], rows[:, None].expand(grid), atol=1e-5, rtol=0)
    torch.testing.assert_close(points[..., 1], columns[None].expand(grid), atol=1e-5, rtol=0)
    for line in (rows, columns):
        assert line.diff().min() > 0
        torch.testing.assert_close(
            line.diff(), line.diff()[:1].expand(len(line) - 1), atol=1e-5, rtol=0
        )


@settings(max_examples=60, deadline=None)
@given(st.lists(unit, min_size=NUM_DRAWS, max_size=NUM_DRAWS))
def test_forward__crop_extents_follow_scale_and_aspect(draws):
    points = sample(draws, (4, 4))
    height, width = (points[-1, -1] - points[0, 0]).tolist()
    scale = math.sqrt(0.1) + (1 - math.sqrt(0.1)) * draws[1]
    aspect = (3 / 4) ** (1 - draws[2]) * (4 / 3) ** draws[2]
    assert height == pytest.approx(min(scale / aspect, 1), abs=1e-5)
    assert width == pytest.approx(min(scale * aspect, 1), abs=1e-5)
    top, left = points[0, 0].tolist()
    assert top == pytest.approx(draws[3] * (1 - height), abs=1e-5)
    assert left == pytest.approx(draws[4] * (1 - width), abs=1e-5)


def test_forward__oblong_grid_keeps_the_aspect_of_its_crop():
    """With aspect 1, rows and columns of a 3x7 grid are equally far apart in the table."""
    points = sample([0.0, 0.5, 0.5, 0.2, 0.2], (3, 7))
    torch.testing.assert_close(points[1, 0, 0] - points[0, 0, 0], points[0, 1, 1] - points[0, 0, 1])


def test_forward__dropout_takes_whole_images_by_their_draw():
    positions = CroppedPositions(8, SIDE, dropout=0.3)
    draws = torch.rand(4, NUM_DRAWS)
    draws[:, 0] = torch.tensor([0.0, 0.29, 0.31, 0.99])
    dropped = (positions((3, 3), draws) == 0).flatten(1).all(dim=1)
    assert dropped.tolist() == [True, True, False, False]


def test_forward__drop_share_is_the_probability():
    positions = CroppedPositions(4, SIDE, dropout=0.1)
    encoded = positions((1, 1), torch.rand(4000, NUM_DRAWS))
    assert (encoded == 0).all(dim=-1).float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_forward__an_image_sees_the_same_crop_in_any_batch():
    positions, draws = CroppedPositions(8, SIDE, dropout=0.2), torch.rand(6, NUM_DRAWS)
    whole = positions((5, 4), draws)
    parts = torch.cat([positions((5, 4), part) for part in draws.split([1, 3, 2])])
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("grid", [(5, 4), (1, 1), (24, 24)])
def test_forward__equals_torchs_sampler(grid):
    positions, draws = CroppedPositions(6, SIDE, dropout=0.0).double(), torch.rand(3, NUM_DRAWS)
    rows, columns = crop_axes(grid, draws.double())
    points = torch.stack(torch.broadcast_tensors(columns[:, None], rows[:, :, None]), dim=-1)
    table = positions.table.permute(2, 0, 1).expand(3, -1, -1, -1)
    sampled = F.grid_sample(table, 2 * points - 1, mode="bilinear", align_corners=True)
    torch.testing.assert_close(positions(grid, draws.double()), sampled.permute(0, 2, 3, 1))


@pytest.mark.parametrize("side", [1, 2, 5])
def test_forward__gradient_of_the_table_is_that_of_its_values(side):
    positions, draws = CroppedPositions(3, side, dropout=0.0).double(), torch.rand(2, NUM_DRAWS)
    positions.table.requires_grad_(False)

    def crops(table):
        replaced = {"table": table}
        return torch.func.functional_call(positions, replaced, ((3, 4), draws.double()))

    assert torch.autograd.gradcheck(crops, positions.table.clone().requires_grad_())


def test_forward__batch_gradient_is_the_sum_over_images():
    positions, draws = CroppedPositions(8, SIDE, dropout=0.0), torch.rand(3, NUM_DRAWS)
    upstream = torch.randn(3, 4, 4, 8)
    (positions((4, 4), draws) * upstream).sum().backward()
    whole, positions.table.grad = positions.table.grad, None
    for i in range(3):
        (positions((4, 4), draws[i : i + 1]) * upstream[i]).sum().backward()
    torch.testing.assert_close(positions.table.grad, whole)


@pytest.mark.parametrize("grid", [(4, 4), (3, 8), (8, 3), (16, 16), (20, 5)])
def test_forward__without_draws_is_the_top_left_of_a_resized_square(grid):
    positions = CroppedPositions(8, SIDE, dropout=0.5)
    table = positions.table.permute(2, 0, 1)[None]
    square = F.interpolate(table, size=max(grid), mode="bilinear", align_corners=False)
    expected = square[0, :, : grid[0], : grid[1]].permute(1, 2, 0)
    torch.testing.assert_close(positions(grid)[0], expected)


def test_forward__without_draws_at_table_size_is_the_table():
    positions = CroppedPositions(8, SIDE, dropout=0.5)
    assert torch.equal(positions((SIDE, SIDE))[0], positions.table)


def test_init__spread_is_one_over_root_of_the_width():
    table = CroppedPositions(64, 64, dropout=0.0).table
    assert table.std().item() == pytest.approx(64**-0.5, rel=0.02)
