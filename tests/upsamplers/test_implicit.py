"""Implicit maps, against a teacher whose fine features are known: the mean colour of each cell."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from radio_distill.errors import ConfigError, DataError
from radio_distill.evals.metrics.fidelity import Fidelity
from radio_distill.geometry import valid_mask
from upsamplers import implicit
from upsamplers.fit.views import draw_homographies, render
from upsamplers.implicit import (
    Compression,
    Implicit,
    ImplicitFeatures,
    Parts,
    fit_implicit,
    fourier_features,
)

from .colours import MeanColours

PATCH, CHANNELS = 8, 6
TEACHER = MeanColours(PATCH, CHANNELS)
colours = TEACHER.map_of


def squares(height, width):
    """An image of flat rectangles, not aligned with the cells."""
    draw = np.random.default_rng(3)
    image = torch.full((3, height, width), 0.5)
    for _ in range(12):
        top, left = draw.integers(0, height - 9), draw.integers(0, width - 9)
        colour = torch.from_numpy(draw.random((3, 1, 1))).float()
        image[:, top : top + draw.integers(5, 17), left : left + draw.integers(5, 17)] = colour
    return image


def fit(image, size=(48, 32), teacher=None, **changes):
    settings = {"factor": 4, "steps": 120, "views": 80, "progress": False, **changes}
    return fit_implicit(teacher or TEACHER, image, size, **settings)


@pytest.fixture(scope="module")
def image():
    return squares(48, 32)


@pytest.fixture(scope="module")
def fitted(image):
    return fit(image)


def test_render__is_nearer_to_the_true_fine_features_than_bilinear_is(image, fitted):
    true = colours(image[None], PATCH // 4)[0]  # [C, 24, 16]
    low = colours(image[None], PATCH)
    bilinear = F.interpolate(low, (24, 16), mode="bilinear")[0]
    error = (fitted.render((24, 16)) - true).square().mean()
    assert error < 0.75 * (bilinear - true).square().mean()


def test_see__predicts_views_that_were_not_fitted_better_than_pooled_bilinear(image, fitted):
    draw = np.random.Generator(np.random.Philox(key=[99, 1]))
    views = draw_homographies(16, implicit.VIEW_RANGE, draw, 32 / 48)
    target = TEACHER.encode(render(image[None], views, (48, 32))).spatial
    valid = valid_mask(views, (6, 4))
    smooth = F.interpolate(colours(image[None], PATCH), (48, 32), mode="bilinear")
    scores = []
    for prediction in (fitted.predict(views), F.avg_pool2d(render(smooth, views, (48, 32)), PATCH)):
        fidelity = Fidelity(CHANNELS)
        fidelity.update(prediction, target, valid)
        scores.append(fidelity.compute())
    assert scores[0] > 1.5 * scores[1]


@pytest.mark.parametrize("grid", [(6, 4), (31, 17), (1, 1), (1, 9)])
def test_render__has_any_resolution(fitted, grid):
    assert fitted.render(grid).shape == (CHANNELS, *grid)
    assert fitted.render(grid).isfinite().all()


def test_render__in_parts_is_the_same(fitted, monkeypatch):
    whole = fitted.render((9, 10))
    monkeypatch.setattr(implicit, "_POINTS_PER_CALL", 7)
    torch.testing.assert_close(fitted.render((9, 10)), whole)


def test_fit_implicit__seed_decides_and_the_callers_randomness_stays(image):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = fit(image, steps=3, views=12).render((12, 8))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(fit(image[None], steps=3, views=12).render((12, 8)), first)
    assert not torch.equal(fit(image, steps=3, views=12, seed=1).render((12, 8)), first)


def test_fit_implicit__one_point_a_pixel_without_a_factor(image):
    assert fit(image, factor=None, steps=1, views=2).fitted == (48, 32)


def test_fourier_features__coinciding_points_agree_between_grids():
    black = torch.zeros(1, 3, 10, 14)  # whose colours do not depend on the grid
    coarse = fourier_features(black, (5, 7), (20, 28)).unflatten(0, (5, 7))
    fine = fourier_features(black, (15, 21), (20, 28)).unflatten(0, (15, 21))
    torch.testing.assert_close(fine[1::3, 1::3], coarse, atol=2e-5, rtol=0)


def test_fourier_features__the_fastest_wave_of_position_turns_over_between_fitted_points():
    image = torch.rand(1, 3, 8, 12)
    features = fourier_features(image, (8, 12), (8, 12)).unflatten(0, (8, 12))
    for axis, column in ((0, 29), (1, 59)):
        wave = torch.stack([features[..., column], features[..., 150 + column]]).movedim(
            axis + 1, 1
        )
        torch.testing.assert_close(wave[:, 1:], -wave[:, :-1], atol=1e-4, rtol=0)


def test_fourier_features__colours_count_by_the_range_of_the_image():
    image = torch.rand(1, 3, 8, 8)
    same = fourier_features(0.2 + 0.5 * image, (8, 8), (8, 8))
    torch.testing.assert_close(same, fourier_features(image, (8, 8), (8, 8)), atol=1e-3, rtol=0)


def test_compression__of_few_channels_loses_nothing_and_has_unit_variance():
    maps = 7 + 30 * torch.randn(4, 5, 6, 3)
    compression = Compression.fit(maps)
    small = compression.compress(maps)
    assert math.isclose(small.var(dim=(0, 2, 3), unbiased=False).mean(), 1, rel_tol=1e-4)
    back = compression.expand(small.permute(0, 2, 3, 1).flatten(0, 2))
    torch.testing.assert_close(back, maps.permute(0, 2, 3, 1).flatten(0, 2), atol=1e-3, rtol=1e-4)


def test_compression__keeps_the_largest_of_many_components():
    maps = torch.randn(8, 160, 8, 8) * torch.linspace(0.01, 1, 160)[:, None, None]
    compression = Compression.fit(maps)
    assert compression.compress(maps).shape[1] == 128
    # Of the 32 quietest channels all but nothing is kept, of the 100 loudest all but nothing lost.
    share = compression.axes.square().sum(dim=1)
    assert share[:10].max() < 0.3
    assert share[60:].min() > 0.9


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"image": torch.rand(2, 3, 16, 16)}, ConfigError, r"\[2, 3, 16,"),
        ({"image": torch.rand(1, 16, 16)}, ConfigError, "one image"),
        ({"image": torch.full((3, 16, 16), math.nan)}, DataError, "image"),
        ({"steps": 0}, ConfigError, "steps"),
        ({"views": 0}, ConfigError, "views"),
        ({"factor": 0}, ConfigError, "factor"),
        ({"size": (20, 16)}, ConfigError, "20x16"),
        ({"teacher": MeanColours(PATCH, CHANNELS, math.inf)}, DataError, "features"),
        ({"teacher": MeanColours(PATCH, CHANNELS, math.nan)}, DataError, "features"),
    ],
)  # fmt: skip
def test_fit_implicit__bad_input_in_one_line(change, kind, message):
    arguments = {"image": torch.rand(3, 16, 16), "size": (16, 16), "steps": 1, "views": 2}
    with pytest.raises(kind, match=message) as error:
        fit(**{**arguments, **change})
    assert "\n" not in str(error.value)


PARTS = [
    {"buffer": True}, {"colours": False}, {"uncertainty": False}, {"downsampler": "simple"},
    {"total_variation": 0.0},
]  # fmt: skip


@pytest.mark.parametrize("change", PARTS, ids=lambda change: next(iter(change)))
def test_parts__each_can_be_left_out_and_counts(image, change):
    numbers = {"steps": 3, "views": 12}
    without, whole = fit(image, **numbers, parts=Parts(**change)), fit(image, **numbers)
    found = without.render((12, 8))
    assert found.shape == (CHANNELS, 12, 8)
    assert not torch.equal(found, whole.render((12, 8)))
    assert without.predict(torch.eye(3)[None]).shape == (1, CHANNELS, 6, 4)


def test_parts__the_loss_is_the_terms_that_are_left():
    """Eq. 1 with a deviation of 1, and the sum of squared steps of the magnitude (eq. 8)."""
    torch.manual_seed(0)
    target, identity = torch.randn(1, 3, 4, 2), torch.eye(3)[None]
    plain = implicit._Fit((3, 4, 2), 2, Parts(uncertainty=False, total_variation=0.0)).eval()
    points = torch.randn(32, 300)
    valid = torch.ones(1, 4, 2, dtype=torch.bool)
    found = plain(points, target, identity, valid)
    tokens = plain.network(points)
    seen = implicit.pooled_views(tokens, plain.downsampler, identity, (8, 4))
    torch.testing.assert_close(found, (seen - target).square().mean() / 2)
    plain.total_variation = 0.3
    size = tokens.norm(dim=1).unflatten(0, (8, 4))
    steps = size.diff(dim=0).square().sum() + size.diff(dim=1).square().sum()
    torch.testing.assert_close(plain(points, target, identity, valid), found + 0.3 * steps / 32)


def test_parts__a_buffer_is_a_map_that_is_interpolated(image):
    fitted = fit(image, steps=1, views=2, parts=Parts(buffer=True))
    expected = fitted.compression.expand(fitted.network.map.detach()[0].flatten(1).T)
    expected = expected.T.unflatten(1, fitted.fitted)
    torch.testing.assert_close(fitted.render(fitted.fitted), expected, rtol=1e-4, atol=1e-4)
    finer = F.interpolate(expected[None], (48, 32), mode="bilinear")[0]
    torch.testing.assert_close(fitted.render((48, 32)), finer, rtol=1e-4, atol=1e-4)


def test_parts__without_colours_a_point_is_its_place(image):
    fitted = fit(image, steps=2, views=4, parts=Parts(colours=False))
    other = ImplicitFeatures(
        1 - fitted.image, fitted.network, fitted.downsampler, fitted.compression, fitted.fitted
    )
    assert torch.equal(other.render((9, 9)), fitted.render((9, 9)))


def test_implicit__images_of_a_batch_are_fitted_each_by_itself(image):
    upsampler = Implicit(factor=4, steps=3, views=12)
    batch = torch.stack([image, 1 - image])
    found = upsampler(TEACHER, batch, (24, 16)).spatial
    expected = fit(1 - image, steps=3, views=12).render((24, 16))
    torch.testing.assert_close(found[1], expected)
    assert not torch.equal(found[0], found[1])
