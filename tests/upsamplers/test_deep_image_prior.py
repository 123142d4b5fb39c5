"""Deep image priors, against a fine map that is known."""

import math

import pytest
import torch
import torch.nn.functional as F

from radio_distill.errors import ConfigError, DataError
from upsamplers import build_per_image
from upsamplers.deep_image_prior import DeepImagePrior, Hourglass

from .colours import MeanColours

FACTOR = 4


@pytest.fixture(scope="module")
def truth():
    """A square, a disc and what is beside them, not aligned with the cells."""
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(12.0), indexing="ij")
    square = (rows > 2.5) & (rows < 9.5) & (columns > 1.5) & (columns < 7)
    disc = (rows - 10).square() + (columns - 7.5).square() < 11
    return torch.stack([square, disc, ~square & ~disc]).float()


@pytest.fixture(scope="module")
def fitted(truth):
    low = F.avg_pool2d(truth, FACTOR)
    return [DeepImagePrior(FACTOR, steps=steps).fit(low) for steps in (1, 40)]


def test_fit__comes_to_what_the_teacher_says(truth, fitted):
    low = F.avg_pool2d(truth, FACTOR)
    before, after = ((F.avg_pool2d(fine, FACTOR) - low).square().mean() for fine in fitted)
    assert after < before / 20


def test_fit__is_nearer_to_the_true_map_than_bilinear(truth, fitted):
    low = F.avg_pool2d(truth, FACTOR)
    bilinear = F.interpolate(low[None], truth.shape[1:], mode="bilinear")[0]
    assert fitted[1].shape == truth.shape
    error = (fitted[1] - truth).square().mean()
    assert error < 0.8 * (bilinear - truth).square().mean()


@pytest.mark.parametrize("downsampler", ["attention", "simple"])
def test_fit__seed_decides_and_the_callers_randomness_stays(truth, downsampler):
    low = F.avg_pool2d(truth, FACTOR)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    options = {"steps": 2, "downsampler": downsampler}
    first = DeepImagePrior(FACTOR, **options).fit(low)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(DeepImagePrior(FACTOR, **options).fit(low), first)
    assert not torch.equal(DeepImagePrior(FACTOR, seed=1, **options).fit(low), first)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (7, 33)])
def test_hourglass__any_size_down_to_one_cell(size):
    network = Hourglass(5, size)
    network(torch.rand(1, 32, *size)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    assert len(network.downs) == {1: 0, 2: 0, 4: 1, 7: 1}[size[0]]


def test_call__fits_each_map_of_a_batch_by_itself():
    upsampler = build_per_image("deep_image_prior", 2, {"steps": 2})
    pixels = torch.rand(2, 3, 64, 48)
    found = upsampler(MeanColours(8), pixels, (8, 6)).spatial
    small = F.interpolate(pixels[1:], (32, 24), mode="bicubic", antialias=True).clamp(0, 1)
    expected = DeepImagePrior(2, steps=2).fit(F.avg_pool2d(small, 8)[0])
    torch.testing.assert_close(found[1], expected, rtol=0.05, atol=0.05)
    assert upsampler.cost((8, 6)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"jitter": -1}, "jitter"),
        ({"downsampler": "averages"}, "not one of average"),
        ({"views": 3}, "'views'"),
    ],
)
def test_options__bad_ones_in_one_line(options, message):
    with pytest.raises(ConfigError, match=message):
        build_per_image("deep_image_prior", 2, options)


def test_fit__features_that_are_not_finite():
    with pytest.raises(DataError, match="not finite"):
        DeepImagePrior(2).fit(torch.full((3, 4, 4), math.nan))
