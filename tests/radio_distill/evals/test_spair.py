import numpy as np
import pytest
import torch
from PIL import Image

import layouts
from radio_distill.errors import DataError
from radio_distill.evals.encoder import Encoder
from radio_distill.evals.spair import KeypointTransfer, squared
from radio_distill.types import Features


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """Two classes, six pairs each, of views of a pattern in which every place has its colour."""
    return str(layouts.spair(tmp_path_factory.mktemp("spair")))


def _values(scores):
    return {score.metric: score.value for score in scores}


def test_spair__colours_of_a_pattern_find_every_keypoint(hues, pairs):
    scores = KeypointTransfer(pairs, size=48).run(hues(1))
    assert _values(scores) == dict.fromkeys(
        ("recall@0.10", *(f"recall@0.10/viewpoint{number}" for number in (0, 1, 2)),
         "pck@0.10/keypoint", "pck@0.10/image"), 100.0,
    )  # fmt: skip
    assert [score.metric for score in scores if score.headline] == ["recall@0.10"]
    assert {score.num_samples for score in scores} == {12, 4}
    assert scores[0].details == {"classes": 2}


def test_spair__noise_and_blindness_find_next_to_nothing(noise, pairs):
    """A keypoint is found in a disc of 2.6 px radius out of 48 x 48: by chance 1 in 100."""
    for score in KeypointTransfer(pairs, size=48).run(noise(1)):
        assert score.value <= 15
    blind = Encoder("blind", lambda pixels: Features(None, torch.ones(len(pixels), 2, 24, 24)), 2)
    assert set(_values(KeypointTransfer(pairs, size=48).run(blind)).values()) == {0.0}


def test_spair__cells_stand_for_their_corner_in_recall_and_for_their_centre_in_pck(hues, pairs):
    """Of 6 px cells a corner is up to 8.5 px off, a centre up to 4.2, which is 0.16 of 26."""
    found = _values(KeypointTransfer(pairs, size=48, threshold=0.17).run(hues(6)))
    assert found["pck@0.17/keypoint"] > found["recall@0.17"] + 10


def test_spair__recall_is_of_some_pairs_of_a_class_and_pck_of_all(noise, pairs):
    few = KeypointTransfer(pairs, size=48, pairs_per_class=2).run(noise(1))
    assert {score.metric: score.num_samples for score in few if "view" not in score.metric} == {
        "recall@0.10": 4, "pck@0.10/keypoint": 12, "pck@0.10/image": 12
    }  # fmt: skip


def test_spair__batches_change_nothing(colours, pairs):
    benchmarks = (KeypointTransfer(pairs, size=48, batch_size=size) for size in (1, 4))
    assert len({str(benchmark.run(colours(4))) for benchmark in benchmarks}) == 1


def test_squared__white_to_the_right_or_below():
    wide = Image.fromarray(np.full((2, 4, 3), 7, dtype=np.uint8))
    padded = np.array(squared(wide))
    assert padded.shape == (4, 4, 3)
    assert (padded[:2] == 7).all()
    assert (padded[2:] == 255).all()


def test_spair__another_folder_is_one_line(colours, tmp_path):
    with pytest.raises(DataError, match="PairAnnotation"):
        KeypointTransfer(str(tmp_path)).run(colours(8))


def test_spair__reads_real_pictures(colours, real):
    folder = real("evaluation/spair_like")
    scores = KeypointTransfer(str(folder), size=64).run(colours(8))
    assert {score.num_samples for score in scores} == {90}
    assert _values(scores)["recall@0.10"] < 30
