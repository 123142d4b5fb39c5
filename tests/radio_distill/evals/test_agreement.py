import logging

import pytest
import torch
from PIL import Image

from radio_distill.config import EvaluationConfig
from radio_distill.evals.agreement import Agreement, across_sizes
from radio_distill.evals.encoder import Encoder
from radio_distill.evals.run import evaluate
from radio_distill.types import Features


@pytest.fixture
def images(photographs):
    return [Image.open(path) for path in sorted(photographs.iterdir())]


def _switching(colours, shift):
    """An encoder that adds a constant to every feature from 96 px on."""

    def encode(pixels):
        summary, spatial = colours(8).encode(pixels)
        constant = torch.tensor([shift, 0, 0, 0])[:, None, None]
        return Features(summary, spatial + constant * (pixels.shape[2] >= 96))

    return Encoder("switching", encode, 8)


def test_across_sizes__features_that_ignore_resolution_agree(colours, images):
    rows = across_sizes(colours(8), images, [64, 96, 128])
    assert [row.size for row in rows] == [(64, 64), (96, 96), (128, 128)]
    assert min(row.cosine for row in rows) > 0.99
    assert max(row.shift for row in rows) < 1e-3


def test_across_sizes__unrelated_features_do_not_agree(noise, images):
    _, other = across_sizes(noise(8), images, [64, 128])
    assert abs(other.cosine) < 0.1


def test_across_sizes__a_common_constant_does_not_count_as_agreement(noise, images):
    """Without taking off the mean this encoder would agree with itself almost fully."""

    def encode(pixels):
        return Features(None, random.encode(pixels).spatial + 10)

    random = noise(8)
    _, other = across_sizes(Encoder("offset", encode, 8), images, [64, 128])
    assert abs(other.cosine) < 0.1


def test_across_sizes__mode_switch_is_measured(colours, images):
    rows = across_sizes(_switching(colours, 0.5), images, [64, 96])
    assert rows[1].cosine < 0.7
    plain = across_sizes(_switching(colours, 0.25), images, [64, 96])
    assert rows[1].shift == pytest.approx(4 * plain[1].shift, rel=0.05)


def test_across_sizes__batches_do_not_change_it(colours, images):
    encoder = _switching(colours, 0.3)
    one, many = (across_sizes(encoder, images, [64, 96], batch_size=size) for size in (1, 3))
    assert one[1].cosine == pytest.approx(many[1].cosine, abs=1e-5)
    assert one[1].shift == pytest.approx(many[1].shift, abs=1e-5)


def test_across_sizes__equal_sizes_count_once(colours, images):
    encoder = Encoder("capped", colours(8).encode, 8, max_size=100)
    assert [row.size[0] for row in across_sizes(encoder, images, [64, 128, 256])] == [64, 96]


def test_agreement__scores(colours, photographs):
    scores = {s.metric: s for s in Agreement(str(photographs), 32).run(colours(8))}
    assert scores["cosine"].value > 95
    assert scores["cosine"].higher_is_better
    assert scores["mode_switch"].value < 1
    assert not scores["mode_switch"].higher_is_better


def test_agreement__an_encoder_of_one_size_is_left_out_aloud(colours, photographs, caplog):
    encoder = Encoder("sam", colours(8).encode, 8, fixed_size=(32, 32))
    config = EvaluationConfig(benchmarks=("agreement",), images=str(photographs))
    with caplog.at_level(logging.WARNING):
        assert evaluate(encoder, config) == []
    assert "sam" in caplog.text
