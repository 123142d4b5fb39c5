import math

import pytest
import torch
from torch.nn import functional as F

from radio_distill.evals.fidelity import fidelity
from radio_distill.types import Features


def _target(pixels):
    spatial = F.avg_pool2d(pixels, 8)
    return {"dino": Features(spatial.mean(dim=(2, 3)), spatial), "sam": Features(None, 2 * spatial)}


@pytest.fixture
def pictures(gradient):
    return [gradient.rotate(90 * turn) for turn in range(3)]


def _values(predict, pictures, **options):
    scores = fidelity(predict, _target, pictures, (64, 64), **options)
    return {score.metric: score.value for score in scores}


def test_fidelity__perfect_prediction(pictures):
    values = _values(_target, pictures)
    assert values["fidelity/dino"] == math.inf
    assert values["mse/dino"] == 0
    assert values["cosine/dino"] == pytest.approx(1)
    assert values["summary_cosine/dino"] == pytest.approx(1)


def test_fidelity__predicting_the_mean_gives_one(pictures):
    every = torch.cat(
        [
            _target(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))[
                "dino"
            ].spatial
        ]
    )
    mean = every.mean(dim=(0, 2, 3), keepdim=True)

    def constant(pixels):
        return {"dino": Features(None, mean.expand(len(pixels), -1, 8, 8))}

    def targets(pixels):
        return {"dino": Features(None, every.expand(len(pixels), -1, -1, -1))}

    scores = fidelity(constant, targets, pictures, (64, 64), batch_size=2)
    assert {score.metric: score.value for score in scores}["fidelity/dino"] == pytest.approx(1)


def test_fidelity__known_error_and_batches_do_not_matter(pictures):
    def off_by_a_tenth(pixels):
        return {name: Features(s, x + 0.1) for name, (s, x) in _target(pixels).items()}

    values = _values(off_by_a_tenth, pictures, batch_size=3)
    assert values["mse/dino"] == pytest.approx(0.01, rel=1e-5)
    assert values["mse/sam"] == pytest.approx(0.01, rel=1e-5)
    # twice the feature is four times the variance over the same error
    assert values["fidelity/sam"] == pytest.approx(4 * values["fidelity/dino"], rel=1e-5)
    assert _values(off_by_a_tenth, pictures, batch_size=1) == pytest.approx(values)


def test_fidelity__is_a_ratio_of_sums(pictures):
    """Against the formula on everything at once: MSE(Y, mean of Y) / MSE(X, Y)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 3, 8, 8, generator=generator)
    kept, position = [], 0

    def noisy(pixels):
        nonlocal position
        target = _target(pixels)["dino"].spatial
        kept.append(target)
        position += len(pixels)
        return {
            name: Features(None, scale * target + noise[position - len(pixels) : position])
            for name, scale in (("dino", 1), ("sam", 2))
        }

    found = _values(noisy, pictures, batch_size=2)
    target = torch.cat(kept).double()
    spread = (target - target.mean(dim=(0, 2, 3), keepdim=True)).square().mean()
    expected = spread / noise.double().square().mean()
    assert found["fidelity/dino"] == pytest.approx(expected.item(), rel=1e-6)


def test_fidelity__grids_are_aligned_to_the_smaller(pictures):
    def fine(pixels):
        spatial = F.avg_pool2d(pixels, 8).repeat_interleave(2, 2).repeat_interleave(2, 3)
        return {"dino": Features(None, spatial), "sam": Features(None, 2 * spatial)}

    assert _values(fine, pictures)["fidelity/dino"] > 500


def test_fidelity__scores_say_what_they_are(pictures):
    scores = {score.metric: score for score in fidelity(_target, _target, pictures, (64, 64))}
    assert "summary_cosine/sam" not in scores
    assert not scores["mse/sam"].higher_is_better
    assert scores["cosine/sam"].higher_is_better
    assert {(score.group, score.num_samples) for score in scores.values()} == {("Fidelity", 3)}
