"""Fits of which one thing differs: each has a folder of its own, and all else stays."""

from dataclasses import asdict, replace

import pytest

from benchmarks import upsampler_fits
from stages.fits import fit_folder
from stages.recipes import load_recipe


@pytest.fixture
def recipe():
    recipe = load_recipe("demo")
    return replace(recipe, fit=replace(recipe.fit, teacher="dino", steps=600))


def test_run_of__no_two_fits_share_a_folder(recipe):
    """Else the second would be taken for the first, resumed, and not fitted at all."""
    changes = upsampler_fits.variants(100, 600, 1800)
    runs = [upsampler_fits.run_of(recipe, seed, changed) for seed in (0, 1) for changed in changes]
    assert len({fit_folder(run, run.fit) for run in runs}) == 2 * len(changes) == len(runs)


def test_run_of__keeps_what_is_not_named(recipe):
    for changed in upsampler_fits.variants(100, 600, 0):
        fit = upsampler_fits.run_of(recipe, 1, changed).fit
        assert asdict(fit) == asdict(recipe.fit) | changed


def test_variants__the_first_fills_the_pool():
    """A later fit of more images, or of tiles that the pool's images lack, could not use it."""
    changes = upsampler_fits.variants(100, 600, 0)
    assert changes[0] == {"upsampler": "featsharp", "de_bias": True, "steps": 600}
    assert max(changed["steps"] for changed in changes) == 600
