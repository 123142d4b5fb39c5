"""A probe is the same for any passes of the encoder and any processes, and however often killed."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import layouts
from radio_distill.errors import ConfigError, DataError
from radio_distill.evals.cache import SummaryCache
from radio_distill.evals.encoder import Encoder
from radio_distill.evals.probe_heads import ConvProbe
from radio_distill.evals.probe_training import train
from radio_distill.evals.semantic import Voc

from .probe_sets import perfect_encoder


class ConvVoc(Voc):
    """Statistics of what is trained, and a loss of all images of a step."""

    pools_step = True

    def heads(self, channels):
        return {"segmentation": ConvProbe(sum(channels), self.num_classes)}

    def losses(self, outputs, labels):
        (loss,) = super().losses(outputs, labels).values()
        return {"root": loss.sqrt()}


KINDS = {"linear": Voc, "conv": ConvVoc}


def benchmark(kind: str, folder: Path, **values) -> Voc:
    defaults = {"steps": 30, "warmup_steps": 3, "images_per_step": 5, "learning_rate": 0.02}
    size = {"crop": (24, 24), "fit": (48, 40)}
    return KINDS[kind](data=str(folder), **{**defaults, **size, **values})


@pytest.fixture(scope="module")
def voc(tmp_path_factory) -> Path:
    return layouts.voc(tmp_path_factory.mktemp("voc"), train=6, aug=0)


def kept_in(folder: Path) -> Encoder:
    return replace(perfect_encoder(), cache=SummaryCache(folder, "perfect"))


def weights(
    probe: Voc, progress=lambda done: None, encoder: Encoder | None = None
) -> dict[str, torch.Tensor]:
    heads = train(probe, encoder or perfect_encoder(), probe.images()[0], progress)
    return heads.state_dict()


class KilledError(Exception):
    pass


@pytest.mark.parametrize("quick", [False, True])
def test_train__killed_goes_on_to_the_same_bits(voc, tmp_path, quick):
    probe = benchmark("linear", voc, quick=quick)
    expected = weights(probe)
    encoder, steps = kept_in(tmp_path), []

    def kill(done: int) -> None:
        if done == 25:
            raise KilledError

    with pytest.raises(KilledError):
        weights(probe, kill, encoder)
    found = weights(probe, steps.append, encoder)
    assert steps == list(range(21, 31)), "it went on from the checkpoint after 20 steps"
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert weights(probe, steps.append, encoder).keys() == expected.keys()
    assert len(steps) == 10, "what is done is not done again"


def test_train__another_encoder_or_seed_begins_anew(voc, tmp_path):
    probe, encoder = benchmark("linear", voc, steps=2), kept_in(tmp_path)
    other = replace(encoder, cache=SummaryCache(tmp_path, "other"))
    weights(probe, encoder=encoder)
    for asked, of, expected in (
        (replace(probe, seed=1), encoder, [1, 2]),
        (replace(probe, learning_rate=0.01), encoder, [1, 2]),
        (probe, other, [1, 2]),
        (replace(probe, batch_size=2), encoder, []),
    ):
        steps = []
        weights(asked, steps.append, of)
        assert steps == expected


@pytest.mark.parametrize("kind", KINDS)
def test_train__passes_of_the_encoder_do_not_matter(voc, kind):
    one, all_at_once = (weights(benchmark(kind, voc, steps=5, batch_size=n)) for n in (1, 16))
    for name, value in all_at_once.items():
        torch.testing.assert_close(one[name], value, rtol=1e-5, atol=1e-6)


def train_on_rank(rank: int, voc: Path, folder: Path):
    """Return weights and score of each kind."""
    answers = {}
    for kind in KINDS:
        probe, encoder = benchmark(kind, voc, steps=5), kept_in(folder)
        found = weights(probe, encoder=encoder)
        answers[kind] = found, probe.run(encoder)[0].value  # with the heads that were saved
    with pytest.raises(ConfigError, match="2 processes cannot share the 1 images"):
        weights(benchmark("linear", voc, images_per_step=1))
    with pytest.raises(DataError, match="2007_000007"):  # which the second reads alone
        benchmark("linear", folder / "damaged", steps=1).run(perfect_encoder())
    return answers


@pytest.mark.distributed
def test_train__two_processes_equal_one(voc, tmp_path, two_processes):
    """Five images a step: three on one process, two on the other."""
    damaged = layouts.voc(tmp_path / "damaged", train=6, aug=0)
    (damaged / "JPEGImages" / "2007_000007.jpg").write_bytes(b"no image")
    answers = two_processes(train_on_rank, voc, tmp_path)
    for kind in KINDS:
        probe = benchmark(kind, voc, steps=5)
        expected, score = weights(probe), probe.run(perfect_encoder())[0].value
        for found, other in (answer[kind] for answer in answers):
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
            assert math.isclose(other, score, rel_tol=1e-6), kind


def test_train__leaves_the_global_generators_alone(voc):
    before = torch.get_rng_state()
    weights(benchmark("linear", voc, steps=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_train__a_damaged_picture_ends_it_with_its_name(voc, tmp_path):
    layouts.voc(tmp_path, train=3, aug=0)
    (tmp_path / "JPEGImages" / "2007_000002.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="2007_000002"):
        weights(benchmark("linear", tmp_path, steps=3))


def test_learning_rates__rise_and_fall():
    probe = benchmark("linear", Path(), steps=100, warmup_steps=10, learning_rate=2.0)
    for decay, end in {"linear": 0.0, "poly": 0.0, "cosine": 0.0, "quarter": 0.02}.items():
        rates = replace(probe, decay=decay).learning_rates()
        assert len(rates) == 100
        assert rates[9] == rates[10] == 2.0
        assert (rates[1:10] > rates[:9]).all()
        assert (rates[11:] < rates[10:-1]).all()
        assert abs(rates[-1] - end) < 0.05
