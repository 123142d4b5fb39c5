import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from radio_distill.errors import ConfigError, DataError
from radio_distill.evals.encoder import Encoder, Heads, Target
from radio_distill.evals.fidelity import Fidelity
from radio_distill.normalize.normalizers import (
    GlobalStandardise,
    Identity,
    LayerNorm,
    PerChannelStandardise,
)
from radio_distill.normalize.phi_s import PhiS
from radio_distill.normalize.statistics import Moments
from radio_distill.types import Features


@dataclass
class Fake:
    """A teacher that is one function of the pixels."""

    encode: Callable[[Tensor], Features]


def _target(pixels):
    spatial = F.avg_pool2d(pixels, 8)
    return {"dino": Features(spatial.mean(dim=(2, 3)), spatial), "sam": Features(None, 2 * spatial)}


TEACHERS = {name: lambda pixels, name=name: _target(pixels)[name] for name in ("dino", "sam")}


@pytest.fixture
def images(gradient, tmp_path):
    for turn in range(3):
        gradient.rotate(90 * turn).save(tmp_path / f"{turn}.png")
    return str(tmp_path)


def _scores(predict, images, teachers=TEACHERS, normalizer=None, **options):
    targets = {
        name: Target(Fake(encode), (64, 64), normalizer, f"digest of {name}")
        for name, encode in teachers.items()
    }
    encoder = Encoder("student", lambda pixels: None, 8, heads=Heads(predict, targets))
    return Fidelity(images, 64, **options).run(encoder)


def _values(*arguments, **options):
    return {score.metric: score.value for score in _scores(*arguments, **options)}


def test_fidelity__perfect_prediction(images):
    values = _values(_target, images)
    assert values["fidelity/dino"] == math.inf
    assert values["mse/dino"] == 0
    assert values["cosine/dino"] == pytest.approx(1)
    assert values["summary_cosine/dino"] == pytest.approx(1)


def test_fidelity__predicting_the_mean_gives_one(images):
    every = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean = every.mean(dim=(0, 2, 3), keepdim=True)

    def constant(pixels):
        return {"dino": Features(None, mean.expand(len(pixels), -1, 8, 8))}

    teachers = {"dino": lambda pixels: Features(None, every.expand(len(pixels), -1, -1, -1))}
    values = _values(constant, images, teachers, batch_size=2)
    assert values["fidelity/dino"] == pytest.approx(1)


def test_fidelity__known_error_and_batches_do_not_matter(images):
    def off_by_a_tenth(pixels):
        return {name: Features(s, x + 0.1) for name, (s, x) in _target(pixels).items()}

    values = _values(off_by_a_tenth, images, batch_size=3)
    assert values["mse/dino"] == pytest.approx(0.01, rel=1e-5)
    assert values["mse/sam"] == pytest.approx(0.01, rel=1e-5)
    # twice the feature is four times the variance over the same error
    assert values["fidelity/sam"] == pytest.approx(4 * values["fidelity/dino"], rel=1e-5)
    assert _values(off_by_a_tenth, images, batch_size=1) == pytest.approx(values)


def test_fidelity__is_a_ratio_of_sums(images):
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

    found = _values(noisy, images, batch_size=2)
    target = torch.cat(kept).double()
    spread = (target - target.mean(dim=(0, 2, 3), keepdim=True)).square().mean()
    expected = spread / noise.double().square().mean()
    assert found["fidelity/dino"] == pytest.approx(expected.item(), rel=1e-6)


def test_fidelity__grids_are_aligned_to_the_smaller(images):
    def fine(pixels):
        spatial = F.avg_pool2d(pixels, 8).repeat_interleave(2, 2).repeat_interleave(2, 3)
        return {"dino": Features(None, spatial), "sam": Features(None, 2 * spatial)}

    assert _values(fine, images)["fidelity/dino"] > 500


def test_fidelity__scores_say_what_they_are(images):
    scores = {score.metric: score for score in _scores(_target, images)}
    assert "summary_cosine/sam" not in scores
    assert not scores["mse/sam"].higher_is_better
    assert scores["cosine/sam"].higher_is_better
    assert {(score.group, score.num_samples) for score in scores.values()} == {("Fidelity", 3)}
    assert scores["mse/sam"].against == "digest of sam"


def test_fidelity__an_encoder_without_heads_has_none(colours, images):
    assert Fidelity(images, 64).run(colours(8)) == []


def test_fidelity__a_head_that_overflowed_is_named(images):
    def overflowed(pixels):
        return {name: Features(None, x / 0) for name, (_, x) in _target(pixels).items()}

    with pytest.raises(DataError, match="of the prediction"):
        _scores(overflowed, images)


def _four_channels(pixels):
    spatial = F.avg_pool2d(pixels, 8)
    spatial = torch.cat((spatial, spatial.mean(dim=1, keepdim=True)), dim=1)
    return Features(spatial.mean(dim=(2, 3)), spatial)


def _fitted(kind):
    """A normalizer of features whose channels vary differently."""
    moments = Moments(4)
    generator = torch.Generator().manual_seed(0)
    deviations = torch.tensor([1.0, 2.0, 4.0, 5.0])[:, None, None]
    moments.update(torch.randn(8, 4, 16, 16, generator=generator) * deviations + 5)
    return kind().fit(moments)


def _in_teacher_space(normalizer, images, error=0.0):
    """Values of a head that is off by ``error`` in the normalised space, compared outside it."""

    def predict(pixels):
        summary, spatial = _four_channels(pixels)
        return {"dino": Features(summary, normalizer.invert(normalizer.apply(spatial) + error))}

    return _values(predict, images, {"dino": _four_channels})


@pytest.mark.parametrize("kind", [Identity, GlobalStandardise, PerChannelStandardise, PhiS])
def test_targets__are_in_the_space_of_the_head(kind, images):
    normalizer = _fitted(kind)

    def predict(pixels):
        summary, spatial = _four_channels(pixels)
        return {"dino": Features(summary, normalizer.apply(spatial))}

    values = _values(predict, images, {"dino": _four_channels}, normalizer)
    assert values["mse/dino"] == 0
    outside = _in_teacher_space(normalizer, images)
    assert outside["mse/dino"] < 1e-9
    assert outside["summary_cosine/dino"] == pytest.approx(1)


@pytest.mark.parametrize("kind", [GlobalStandardise, PhiS, PerChannelStandardise])
def test_teacher_space__a_scale_multiplies_the_error_by_the_variance(kind, images):
    """An error of 0.1 in the normalised space is 0.1 standard deviations of the teacher."""
    normalizer = _fitted(kind)
    variance = (normalizer.state()["scale"] ** -2).mean().item()
    if kind is not PerChannelStandardise:
        assert variance == pytest.approx((1 + 4 + 16 + 25) / 4, rel=0.1)
    values = _in_teacher_space(normalizer, images, error=0.1)
    assert values["mse/dino"] == pytest.approx(0.01 * variance, rel=1e-4)


def test_teacher_space__a_normalizer_without_inverse(images):
    with pytest.raises(ConfigError, match="layer_norm"):
        _in_teacher_space(_fitted(LayerNorm), images)
