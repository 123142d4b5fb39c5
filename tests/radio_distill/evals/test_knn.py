import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional as F

import layouts
from radio_distill.data.folder import spread
from radio_distill.errors import ConfigError
from radio_distill.evals.encoder import Encoder, to_pixels
from radio_distill.evals.knn import ImagenetKnn, Knn, knn_votes, nearest_in_bank, thin_out
from radio_distill.evals.metrics.classification import macro_accuracy
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


@pytest.mark.parametrize(
    ("bank_chunk", "query_chunk"), [(7, 5), (150, 64), (299, 1), (1, 130), (4096, 4096)]
)
def test_nearest_in_bank__chunks_change_nothing(bank_chunk, query_chunk):
    generator = torch.Generator().manual_seed(1)
    bank = torch.randn(300, 24, generator=generator).half()
    queries = torch.randn(130, 24, generator=generator).half()
    exact = F.normalize(queries.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    expected, where = exact.topk(20, dim=1)
    similarity, index = nearest_in_bank(
        bank, queries, 20, bank_chunk=bank_chunk, query_chunk=query_chunk
    )
    torch.testing.assert_close(similarity.double(), expected, rtol=0, atol=1e-6)
    assert similarity.dtype == torch.float32
    assert index.equal(where)


def test_nearest_in_bank__no_more_neighbours_than_the_bank_has():
    similarity, index = nearest_in_bank(torch.eye(3), torch.eye(3), 20, bank_chunk=2)
    assert similarity.shape == (3, 3)
    assert index[:, 0].tolist() == [0, 1, 2]


def test_knn__images_are_resampled_once_to_a_size_the_encoder_takes(colours, colour_classes):
    """Asked for 16 px, an encoder of patch 7 is given 14, and nothing is resized a second time."""
    shown = []

    def encode(pixels):
        shown.append(pixels)
        return Features(None, pixels[:, :, ::7, ::7])

    Knn(str(colour_classes), 16, k=3).run(Encoder("patch 7", encode, 7))
    assert {tuple(pixels.shape[1:]) for pixels in shown} == {(3, 14, 14)}
    first = sorted((colour_classes / "train/class_0").iterdir())[0]
    assert torch.equal(shown[0][0], to_pixels(first, (14, 14)))


@pytest.fixture
def colour_classes(tmp_path):
    """Four classes of one colour each; three bank and two validation images a class."""
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
    scores = Knn(str(colour_classes), 16, k=3).run(colours(8))
    assert [(score.name, score.value, score.num_samples) for score in scores] == [
        ("knn/top1", 100.0, 8),
        ("knn/macro_accuracy", 100.0, 8),
    ]
    assert [score.headline for score in scores] == [True, False]
    assert all(score.details == {"classes": 4} for score in scores)


def test_knn__blind_encoder_is_right_for_one_class_only(colour_classes):
    blind = Encoder("blind", lambda pixels: Features(None, torch.ones(len(pixels), 2, 1, 1)), 8)
    scores = Knn(str(colour_classes), 16, k=12).run(blind)
    assert [score.value for score in scores] == [25.0, 25.0]


def test_knn__without_a_summary_the_spatial_mean_decides(colours, colour_classes):
    def encode(pixels):
        return Features(None, colours(8).encode(pixels).spatial)

    with_summary = Knn(str(colour_classes), 16, k=3).run(colours(8))
    assert Knn(str(colour_classes), 16, k=3).run(Encoder("x", encode, 8)) == with_summary


def test_knn__limit_keeps_every_class(colours, colour_classes):
    top1, _ = Knn(str(colour_classes), 16, k=1).run(colours(8), limit=4)
    assert (top1.value, top1.num_samples, top1.details) == (100.0, 4, {"classes": 4})


def test_knn__bank_smaller_than_k_is_an_error(colours, colour_classes):
    with pytest.raises(ConfigError, match=r"12 images.*k=20") as caught:
        Knn(str(colour_classes), 16).run(colours(8))
    option = re.search(r"--evaluation.options '(.*)'", str(caught.value)).group(1)
    assert Knn(str(colour_classes), 16, **yaml.safe_load(option)["knn"]).run(colours(8))
    with pytest.raises(ConfigError, match=r"--evaluation\.limit.*{imagenet_knn: {k: 4}}"):
        ImagenetKnn(str(colour_classes), 16).run(colours(8), limit=8)


def _fill(folder, counts, colour_of):
    for split, classes in counts.items():
        for name, count in classes.items():
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                shade = tuple(channel + index for channel in colour_of[name])
                Image.new("RGB", (24, 24), shade).save(folder / split / name / f"{index}.png")


def test_knn__a_class_that_is_never_found_shows_in_macro_accuracy(tmp_path):
    """A blind encoder finds the large class alone: 18 of 20 images, one of two classes."""
    colours = {"7": (10, 10, 10), "11": (200, 10, 10)}
    _fill(tmp_path, {"train": {"7": 30, "11": 2}, "val": {"7": 18, "11": 2}}, colours)
    blind = Encoder("blind", lambda pixels: Features(None, torch.ones(len(pixels), 2, 1, 1)), 8)
    top1, macro = Knn(str(tmp_path), 16, k=32).run(blind)
    assert (top1.value, macro.value) == (90.0, 50.0)


def test_macro_accuracy__agrees_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 9, (200,), generator=generator).clamp_max(6)
    answers = torch.where(torch.rand(200, generator=generator) < 0.4, labels, 1)
    expected = metrics.balanced_accuracy_score(labels, answers)
    assert macro_accuracy(answers == labels, labels) == pytest.approx(expected)


def test_knn__limit_loses_no_small_class(colours, tmp_path):
    colour_of = {"a": (200, 20, 20), "b": (20, 200, 20), "c": (20, 20, 200)}
    _fill(
        tmp_path, {"train": {"a": 40, "b": 2, "c": 5}, "val": {"a": 9, "b": 1, "c": 2}}, colour_of
    )
    top1, macro = Knn(str(tmp_path), 16, k=1).run(colours(8), limit=6)
    assert (top1.num_samples, top1.details) == (6, {"classes": 3})
    assert (top1.value, macro.value) == (100.0, 100.0)


def test_thin_out__shares_follow_the_classes_and_both_splits_have_the_same():
    train = [(Path(f"{label}-{index}"), label) for label in range(10) for index in range(30)]
    val = [(Path(f"v{label}-{index}"), label) for label in range(10) for index in range(label + 1)]
    bank, queries = thin_out(train, val, 50)
    assert Counter(label for _, label in bank) == dict.fromkeys(range(10), 5)
    assert bank == spread(train, 50)  # of equal classes the same as everywhere
    counts = Counter(label for _, label in queries)
    assert sum(counts.values()) == 50
    assert all(abs(counts[label] - 50 / 55 * (label + 1)) <= 0.55 for label in range(10))
    few, asked = thin_out(train, val, 4)
    assert len({label for _, label in few}) == 4
    assert {label for _, label in few} == {label for _, label in asked}
    assert thin_out(train, val, 0) == (train, val)


def test_knn__fewer_images_than_classes_is_said(colours, colour_classes, caplog):
    top1, _ = Knn(str(colour_classes), 16, k=1).run(colours(8), limit=3)
    assert top1.details == {"classes": 3}
    assert "3 of 4 classes" in caplog.text
    with pytest.raises(ConfigError, match="limit 1"):
        Knn(str(colour_classes), 16, k=1).run(colours(8), limit=1)


def test_knn__real_images_beat_chance_by_colour_alone(colours, real):
    folder = real("classification/caltech101_20x60")
    score, _ = Knn(str(folder), 32).run(Encoder("flat", lambda p: colours(16).encode(p), 16), 100)
    assert score.num_samples == 100
    assert score.value > 2 * 100 / 20


def test_imagenet_knn__is_knn_over_the_folder_of_imagenet(colours, tmp_path):
    root = str(layouts.imagenet(tmp_path))
    scores = ImagenetKnn(root, 16, k=3).run(colours(8))
    assert [(score.name, score.value, score.num_samples) for score in scores] == [
        ("imagenet_knn/top1", 100.0, 6),
        ("imagenet_knn/macro_accuracy", 100.0, 6),
    ]
    same = Knn(root, 16, k=3).run(colours(8))
    assert [score.value for score in same] == [score.value for score in scores]
    assert same[0].protocol != scores[0].protocol
