import math

import pytest
import torch
from PIL import Image

from radio_distill.errors import ConfigError
from radio_distill.evals.harness import Encoder
from radio_distill.evals.knn import Knn, knn_votes
from radio_distill.types import Features


def test_knn_votes__by_hand():
    bank = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [3.0, 4.0]])
    votes = knn_votes(bank, torch.tensor([0, 1, 0, 1]), torch.tensor([[5.0, 0.0]]), 3, k=3)
    # similarities 1, 0, -1, 0.6: the three nearest are rows 0, 3 and 1
    expected = [math.exp(1 / 0.07), math.exp(0.6 / 0.07) + 1, 0.0]
    torch.testing.assert_close(votes[0], torch.tensor(expected))


def test_knn_votes__several_far_neighbours_can_outvote_a_near_one():
    bank = torch.tensor([[1.0, 0.0], [0.999, 0.0447], [0.999, -0.0447]])
    votes = knn_votes(bank, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]]), 2, k=3)
    assert votes.argmax() == 1
    assert knn_votes(bank, torch.tensor([0, 1, 1]), bank[:1], 2, k=1).argmax() == 0


def test_knn_votes__agrees_with_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(300, 8, generator=generator, dtype=torch.float64)
    queries = torch.randn(1500, 8, generator=generator, dtype=torch.float64)  # two chunks
    labels = torch.randint(0, 5, (300,), generator=generator)
    oracle = neighbors.KNeighborsClassifier(
        20,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: torch.tensor((1 - distance) / 0.07).exp().numpy(),
    ).fit(bank, labels)
    found = knn_votes(bank, labels, queries, 5)
    share = found / found.sum(dim=1, keepdim=True)
    torch.testing.assert_close(share, torch.from_numpy(oracle.predict_proba(queries)))


@pytest.fixture
def colour_classes(tmp_path):
    """Four classes of one colour each; three bank and two validation pictures a class."""
    for split, count in (("train", 3), ("val", 2)):
        for label, colour in enumerate(
            [(200, 20, 20), (20, 200, 20), (20, 20, 200), (200, 200, 20)]
        ):
            folder = tmp_path / split / f"class_{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                shade = tuple(channel + 10 * index for channel in colour)
                Image.new("RGB", (40, 30), shade).save(folder / f"{index}.png")
    return tmp_path


def test_knn__separable_classes_are_all_right(colours, colour_classes):
    (score,) = Knn(str(colour_classes), 16, k=3).run(colours(8))
    assert (score.name, score.value, score.num_samples) == ("knn/top1", 100.0, 8)


def test_knn__blind_encoder_is_right_for_one_class_only(colour_classes):
    blind = Encoder("blind", lambda pixels: Features(None, torch.ones(len(pixels), 2, 1, 1)), 8)
    (score,) = Knn(str(colour_classes), 16, k=12).run(blind)
    assert score.value == 25.0


def test_knn__without_a_summary_the_spatial_mean_decides(colours, colour_classes):
    def encode(pixels):
        return Features(None, colours(8).encode(pixels).spatial)

    with_summary = Knn(str(colour_classes), 16, k=3).run(colours(8))
    assert Knn(str(colour_classes), 16, k=3).run(Encoder("x", encode, 8)) == with_summary


def test_knn__limit_keeps_every_class(colours, colour_classes):
    (score,) = Knn(str(colour_classes), 16, k=1).run(colours(8), limit=4)
    assert (score.value, score.num_samples) == (100.0, 4)


def test_knn__bank_smaller_than_k_is_an_error(colours, colour_classes):
    with pytest.raises(ConfigError, match="bank has 12 pictures, fewer than k=20"):
        Knn(str(colour_classes), 16).run(colours(8))


def test_knn__real_pictures_beat_chance_by_colour_alone(colours, real):
    folder = real / "classification" / "caltech101_20x60"
    (score,) = Knn(str(folder), 32).run(Encoder("flat", lambda p: colours(16).encode(p), 16), 100)
    assert score.num_samples == 100
    assert score.value > 2 * 100 / 20
