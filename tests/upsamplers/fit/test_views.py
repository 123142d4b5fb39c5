"""Random views: registration above all, on maps whose values are their own coordinates."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_distill.errors import ConfigError
from radio_distill.geometry import valid_mask, warp
from upsamplers.fit.views import VIEWS, ViewRange, draw_homographies, render

sides = st.integers(3, 23)


def draw(num, ranges, seed=0, aspect=1.0):
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    return draw_homographies(num, ranges, generator, aspect)


def matrix(*rows):
    return torch.tensor([rows], dtype=torch.float32)


def coordinates(height, width):
    """``[1, 2, H, W]``: x and y of the cells' centres, edges at -1 and 1."""
    y, x = ((torch.arange(n) + 0.5) * 2 / n - 1 for n in (height, width))
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])[None]


def project(homographies, points):
    """Apply ``[N, 3, 3]`` to points ``[1, 2, H, W]``, one way that it is not done in the module."""
    whole = torch.cat([points, torch.ones_like(points[:, :1])], dim=1)
    images = torch.einsum("nij,bjhw->nihw", homographies, whole)
    return images[:, :2] / images[:, 2:]


@settings(max_examples=60, deadline=None)
@given(sides, sides, sides, sides, st.integers(0, 1000), st.sampled_from(sorted(VIEWS)))
def test_warp__is_registered_whatever_the_sizes_of_map_and_view(h, w, rows, columns, seed, name):
    homographies = draw(3, VIEWS[name], seed, aspect=w / h)
    expected = project(homographies, coordinates(rows, columns))
    # Bilinear interpolation of coordinates is exact, between the outermost centres.
    limit = torch.tensor([1 - 1 / w, 1 - 1 / h]).view(1, 2, 1, 1)
    inside = (expected.abs() <= limit).all(dim=1, keepdim=True).expand_as(expected)
    views = warp(coordinates(h, w), homographies, (rows, columns))
    torch.testing.assert_close(views[inside], expected[inside], rtol=0, atol=1e-5)


def test_render__is_registered_with_the_features_of_the_same_view():
    """A patch's mean of a smooth image, and the same view of the map of such means."""
    x, y = coordinates(224, 336)[0]
    image = torch.stack([torch.sin(2 * x + y), torch.cos(3 * y - x), x * y])[None]
    features = F.avg_pool2d(image, 7)  # [1, 3, 32, 48]
    homographies = draw(8, VIEWS["featsharp"], aspect=1.5)
    from_image = F.avg_pool2d(render(image, homographies, (112, 168)), 14)
    from_features = F.avg_pool2d(warp(features, homographies, (32, 48)), 4)
    valid = valid_mask(homographies, (8, 12))[:, None].expand_as(from_image)
    assert valid.float().mean() > 0.5
    difference = (from_image - from_features)[valid].abs().max()
    assert difference < 5e-3  # a misregistration of 1 / 32 of a cell would be 0.01
    shrunk = torch.diag(torch.tensor([47 / 48, 31 / 32, 1.0]))
    worse = F.avg_pool2d(warp(features, shrunk @ homographies, (32, 48)), 4)
    assert (from_image - worse)[valid].abs().max() > 5 * difference


@pytest.mark.parametrize("size", [(5, 9), (7, 4), (1, 3)])
def test_warp__of_the_whole_map_or_its_mirror_image_is_exact(size):
    maps = torch.rand(2, 3, *size)
    torch.testing.assert_close(warp(maps, torch.eye(3).expand(2, 3, 3), size), maps)
    mirror = torch.diag(torch.tensor([-1.0, 1, 1])).expand(2, 3, 3)
    torch.testing.assert_close(warp(maps, mirror, size), maps.flip(-1))


def test_warp__moves_features_by_one_cell_when_images_move_by_one_patch():
    images = torch.rand(1, 3, 24, 40)
    shift = matrix([1, 0, 2 / 5], [0, 1, 0], [0, 0, 1])
    moved = render(images, shift, (24, 40))
    torch.testing.assert_close(moved[..., :32], images[..., 8:])
    features = F.avg_pool2d(images, 8)
    torch.testing.assert_close(
        warp(features, shift, (3, 5))[..., :4], F.avg_pool2d(moved, 8)[..., :4]
    )
    # Beyond the border is the mirror image, for both alike.
    torch.testing.assert_close(warp(features, shift, (3, 5))[..., 4], features[..., 4])


def test_warp__shows_the_views_of_a_map_one_after_the_other():
    maps = torch.rand(2, 3, 6, 5)
    homographies = draw(6, VIEWS["featsharp"])
    apart = warp(maps.repeat_interleave(3, dim=0), homographies, (4, 7))
    torch.testing.assert_close(warp(maps, homographies, (4, 7)), apart)


def test_warp__has_the_right_gradient():
    maps = torch.rand(1, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    homographies = draw(2, VIEWS["featsharp"], seed=1)
    assert torch.autograd.gradcheck(lambda x: warp(x, homographies, (4, 3)), maps)


def test_warp__stays_in_single_precision_under_autocast():
    maps, homographies = torch.rand(1, 2, 28, 28), draw(4, VIEWS["featsharp"])
    expected = warp(maps, homographies, (28, 28))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(warp(maps, homographies, (28, 28)), expected)
        assert warp(maps.bfloat16(), homographies, (28, 28)).dtype == torch.float32


def test_warp__refuses_views_that_do_not_divide_among_the_maps():
    with pytest.raises(ConfigError, match="3 homographies for 2 maps"):
        warp(torch.rand(2, 1, 4, 4), torch.eye(3).expand(3, 3, 3), (4, 4))


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
def test_render__of_the_whole_image_is_its_average_pooling(ratio):
    images = torch.rand(2, 3, 6 * ratio, 5 * ratio)
    views = render(images, torch.eye(3).expand(2, 3, 3), (6, 5))
    torch.testing.assert_close(views, F.avg_pool2d(images, ratio))


def test_render__suppresses_what_the_view_is_too_coarse_to_show():
    stripes = torch.sin(torch.arange(96) * (2 * math.pi / 3)).expand(1, 1, 96, 96)
    homographies = draw(16, ViewRange(scale=(1.0, 1.2), rotation=20), seed=3)
    sampled, rendered = (view(stripes, homographies, (24, 24)).std() for view in (warp, render))
    assert sampled > 0.4
    assert rendered < sampled / 3


def test_valid_mask__whole_image_and_shift_by_one_cell():
    assert valid_mask(torch.eye(3)[None], (3, 5)).all()
    mask = valid_mask(matrix([1, 0, 2 / 5], [0, 1, 0], [0, 0, 1]), (3, 5))
    assert mask[..., :4].all()
    assert not mask[..., 4].any()


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_valid_mask__has_the_cells_none_of_whose_area_is_beyond_the_image(name):
    homographies = draw(20, VIEWS[name], seed=5)
    inside = (project(homographies, coordinates(6 * 40, 4 * 40)).abs() < 1).all(dim=1).float()
    whole = F.avg_pool2d(inside[:, None], 40)[:, 0] == 1
    mask = valid_mask(homographies, (6, 4))
    assert not (mask & ~whole).any()
    assert (whole & ~mask).float().mean() < 0.01  # less than a 40th of a cell is outside


def test_draw_homographies__depends_on_seed_and_place_alone():
    long, short = draw(7, VIEWS["featsharp"], seed=2), draw(3, VIEWS["featsharp"], seed=2)
    assert torch.equal(long[:3], short)
    assert not torch.equal(short, draw(3, VIEWS["featsharp"], seed=3))
    assert torch.equal(draw(4, ViewRange()), torch.eye(3).expand(4, 3, 3))


def test_draw_homographies__featup_views_are_upright_and_reach_20_of_224_pixels_beyond():
    views = draw(4000, VIEWS["featup"])
    scale = views[:, 1, 1]
    assert scale.min() >= 0.5
    assert 0.45 < (scale == 1).float().mean() < 0.55
    assert 0.45 < (views[:, 0, 0] < 0).float().mean() < 0.55
    reach = views[:, :2, 2].abs().amax(0) + 0.5  # of the smallest views, at most
    extreme = (views[:, :2, 2].abs() + scale[:, None]).amax(0)
    torch.testing.assert_close(extreme, torch.full((2,), 264 / 224), rtol=0, atol=2e-3)
    assert reach.min() > 1
    torch.testing.assert_close(
        views[:, [0, 1, 2, 2], [1, 0, 0, 1]], torch.zeros(4000, 4), rtol=0, atol=1e-9
    )


def test_draw_homographies__rotations_keep_angles_on_oblong_images():
    views = draw(50, ViewRange(rotation=30), aspect=1.5)
    pixels = torch.diag(torch.tensor([1.5, 1.0]))
    turns = pixels @ views[:, :2, :2] @ pixels.inverse()
    torch.testing.assert_close(turns @ turns.mT, torch.eye(2).expand(50, 2, 2))
    angles = torch.rad2deg(torch.atan2(turns[:, 1, 0], turns[:, 0, 0]))
    assert angles.abs().max() <= 30
    assert angles.min() < -20
    assert angles.max() > 20


def test_draw_homographies__perspective_moves_corners_by_about_its_share_of_a_side():
    corners = torch.tensor([[-1.0, 1, -1, 1], [-1, -1, 1, 1]]).view(1, 2, 2, 2)
    moved = project(draw(2000, ViewRange(perspective=0.05)), corners)
    largest = ((moved - corners) / 2).abs().amax()
    assert 0.045 < largest < 0.056


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale", (2.0, 1.0)),
        ("scale", (0.0, 1.0)),
        ("scale_chance", 1.5),
        ("shift", -0.1),
        ("flip", 2.0),
        ("rotation", -5.0),
        ("perspective", 0.5),
    ],
)
def test_view_range__refuses_what_cannot_be(field, value):
    with pytest.raises(ConfigError, match=f"views.{field} is"):
        ViewRange(**{field: value})


def test_warp__is_featsharps_after_conversion_from_centres_to_edges(golden):
    case = golden("featsharp_homography_warp")
    cells = case["feats"].shape[-1]
    to_edges = torch.diag(torch.tensor([1 - 1 / cells, 1 - 1 / cells, 1.0]))
    homographies = to_edges @ case["homography"] @ to_edges.inverse()
    views = warp(case["feats"], homographies, (cells, cells))
    inside = (case["grid"].abs() <= 1).all(-1)[:, None].expand_as(views)  # its mirror is another
    assert inside.float().mean() > 0.5
    torch.testing.assert_close(views[inside], case["warped"][inside], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", [0, 1])
def test_warp__is_featups_jitter_inside_the_image(golden, case):
    case = golden(f"featup_jitter_{case}")
    height, width = case["img"].shape[-2:]
    zoom, flip = case["zoom"], 1 - 2 * case["flip"]

    def axis(first, pixels, mirror):  # pixels of the padded, zoomed image -> edges
        centre = (first + pixels / 2) / zoom - 4
        return mirror / zoom, centre * 2 / pixels - 1

    (scale_x, shift_x), (scale_y, shift_y) = (
        axis(case["y"], width, flip),
        axis(case["x"], height, 1),
    )
    view = matrix([scale_x, 0, shift_x], [0, scale_y, shift_y], [0, 0, 1])
    views = warp(case["img"], view, (height, width))
    centres = project(view, coordinates(height, width))
    limit = torch.tensor([1 - 1 / width, 1 - 1 / height]).view(1, 2, 1, 1) + 1e-6
    inside = (centres.abs() <= limit).all(dim=1, keepdim=True).expand_as(views)
    assert inside.float().mean() > 0.7
    torch.testing.assert_close(views[inside], case["out"][inside], rtol=0, atol=1e-4)
