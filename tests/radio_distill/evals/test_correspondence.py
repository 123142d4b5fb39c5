import math

import numpy as np
import pytest
import torch

from radio_distill.evals.correspondence import (
    Correspondence,
    Stereo,
    grid_points,
    nearest_neighbours,
    random_homography,
    recalls,
    stereo_pair,
    visible_in_right,
    warped,
)
from radio_distill.evals.encoder import Encoder, to_pixels
from radio_distill.geometry import homography, inside, sample, transform
from radio_distill.types import Features

SIZE = (96, 128)


def _random(seed, size=SIZE):
    return random_homography(size, 30, 1.4, 0.15, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_homography__takes_the_four_points_where_they_belong(seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]]).double()
    source, target = (corners + 0.3 * torch.rand(4, 2, generator=generator) for _ in range(2))
    torch.testing.assert_close(transform(source, homography(source, target)), target.float())


@pytest.mark.parametrize("seed", range(5))
def test_transform__inverse_undoes(seed):
    points = grid_points(SIZE, 16)
    there = transform(points, _random(seed))
    torch.testing.assert_close(transform(there, _random(seed).inverse()), points, atol=1e-2, rtol=0)


def test_random_homography__without_perspective_is_rotation_and_zoom():
    matrix = random_homography(SIZE, 30, 1.4, 0.0, torch.Generator().manual_seed(0))
    linear = matrix[:2, :2]
    scale = linear.det().sqrt()
    torch.testing.assert_close(linear @ linear.T, scale**2 * torch.eye(2).double())
    assert 1 / 1.4 <= scale <= 1.4
    torch.testing.assert_close(
        transform(torch.tensor([[64.0, 48.0]]), matrix), torch.tensor([[64.0, 48.0]])
    )


def test_sample__at_cell_centres_gives_the_cells():
    maps = torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(0))
    points = grid_points(SIZE, 16)
    torch.testing.assert_close(sample(maps, points, SIZE), maps.flatten(1).T)


def test_warp__by_whole_pixels_is_a_shift():
    pixels = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([[1.0, 0, 5], [0, 1, 3], [0, 0, 1]]).double()
    shown = warped(pixels, shift)
    torch.testing.assert_close(shown[:, 3:, 5:], pixels[:, :-3, :-5], atol=1e-4, rtol=0)
    assert (shown[:, :3] == 0.5).all()


@pytest.mark.parametrize("seed", range(3))
def test_warp__agrees_with_scikit_image(gradient, seed):
    skimage = pytest.importorskip("skimage.transform")
    pixels, matrix = to_pixels(gradient, SIZE), _random(seed)
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # its pixel centres are whole numbers
    inverse = np.linalg.inv(half) @ np.linalg.inv(matrix.numpy()) @ half
    oracle = skimage.warp(pixels.permute(1, 2, 0).numpy(), inverse, order=1, mode="edge")
    shown = inside(transform(grid_points(SIZE, 1), matrix.inverse()), SIZE).view(SIZE)
    found = warped(pixels, matrix)[:, shown]
    torch.testing.assert_close(
        found, torch.from_numpy(oracle).permute(2, 0, 1).float()[:, shown], atol=1e-3, rtol=0
    )


def test_warp__moves_each_point_where_transform_says(gradient):
    """The colour of a point and that of its place in the other view are the same."""
    pixels, matrix = to_pixels(gradient, SIZE), _random(0)
    points = grid_points(SIZE, 8)
    moved = transform(points, matrix)
    seen = inside(moved, SIZE) & inside(moved + 2, SIZE) & inside(moved - 2, SIZE)
    seen &= inside(points + 2, SIZE) & inside(points - 2, SIZE)
    assert seen.sum() > 50
    before, after = (
        sample(pixels, points[seen], SIZE),
        sample(warped(pixels, matrix), moved[seen], SIZE),
    )
    torch.testing.assert_close(before, after, atol=0.01, rtol=0)


def test_nearest_neighbours__is_by_angle():
    targets = torch.tensor([[10.0, 10.0], [0.1, 0.0], [0.0, -5.0]])
    queries = torch.tensor([[3.0, 0.1], [1.0, 0.9], [0.1, -0.2]])
    assert nearest_neighbours(queries, targets).tolist() == [1, 0, 2]


def test_recalls__by_hand():
    errors = torch.tensor([0.0, 3.0, 6.0, 100.0])
    scores = {s.metric: s.value for s in recalls("x", errors, (30, 40), [5, 10], [10], 1)}
    assert scores == {"recall@5px": 50.0, "recall@10px": 75.0, "recall@10%": 50.0}  # diagonal 50


@pytest.fixture
def gradients(tmp_path, gradient):
    for turn in range(2):
        gradient.rotate(90 * turn).save(tmp_path / f"{turn}.png")
    return str(tmp_path)


def test_correspondence__colour_that_names_the_position_is_found(colours, gradients):
    scores = {s.metric: s.value for s in Correspondence(gradients, 128).run(colours(4))}
    assert scores["recall@10px"] > 99
    assert scores["recall@5px"] > 90


def test_correspondence__wrong_truth_is_not_found(colours, gradients):
    """An encoder that mirrors what it sees must fail: the truth is not a matter of colour alone."""

    def mirrored(pixels):
        summary, spatial = colours(4).encode(pixels)
        return Features(summary, torch.cat([spatial[:1], spatial[1:].flip(3)]))

    scores = {
        s.metric: s.value for s in Correspondence(gradients, 128).run(Encoder("m", mirrored, 4))
    }
    assert scores["recall@10px"] < 30


def test_correspondence__noise_is_at_chance(noise, gradients):
    benchmark = Correspondence(gradients, 128, query_stride=4)
    scores = {s.metric: s.value for s in benchmark.run(noise(4))}
    # a disc of 20 px on a 128 px square, some of it cut off at the edge
    assert 2 < scores["recall@20px"] < 1.3 * 100 * math.pi * 20**2 / 128**2


def test_correspondence__same_pairs_for_every_encoder_and_run(colours, gradients):
    benchmark = Correspondence(gradients, 64)
    assert benchmark.run(colours(8)) == benchmark.run(colours(8))
    assert benchmark.run(colours(8)) != Correspondence(gradients, 64, seed=1).run(colours(8))


def test_visible_in_right__nearer_pixels_hide_farther_ones():
    disparity = torch.tensor([[1.0, 1, 1, 3, math.inf, 2.5]])
    # columns land on -1, 0, 1, 0, unknown, 2.5 -> 2: column 3 hides column 1
    assert visible_in_right(disparity)[0].tolist() == [False, False, True, True, False, True]


def test_stereo_pair__disparity_joins_equal_colours():
    pytest.importorskip("skimage")
    left, right, disparity = stereo_pair()
    assert left.shape == right.shape == (3, *disparity.shape)
    visible = visible_in_right(disparity)
    y, x = visible.nonzero().unbind(1)
    there = (x - disparity[y, x]).round().long()
    matched = (left[:, y, x] - right[:, y, there]).abs().mean()
    unmatched = (left[:, y, x] - right[:, y, x]).abs().mean()
    assert matched < 0.5 * unmatched


def test_stereo__knowing_the_disparity_scores_all_and_noise_none(noise):
    pytest.importorskip("skimage")
    disparity = stereo_pair()[2]
    height, width = disparity.shape
    known = disparity.where(disparity.isfinite(), torch.zeros(()))
    column = torch.arange(width).expand(height, width)
    angles = torch.stack([column - known, column]) / width * math.pi  # where it lands, where it is

    def encode(pixels):
        return Features(None, torch.stack([angles.cos(), angles.sin()], dim=1))

    truth = {s.metric: s.value for s in Stereo().run(Encoder("truth", encode, 1))}
    assert truth["recall@5px"] > 99
    chance = {s.metric: s.value for s in Stereo().run(noise(16))}
    assert chance["recall@5px"] < 5
