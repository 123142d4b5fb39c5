"""Zero-shot classification and retrieval: texts and images in one space."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import layouts
from radio_distill.evals.cache import SummaryCache
from radio_distill.evals.encoder import Encoder, to_pixels
from radio_distill.evals.retrieval import CocoCaptions, FlickrCaptions
from radio_distill.evals.zero_shot import (
    ImagenetZeroShot,
    class_names,
    prompt_templates,
    text_classifier,
)
from radio_distill.types import Features


class Letters(nn.Module):
    """A text tower that counts letters; as open_clip has them, and as ours are."""

    def __init__(self, dim=32):
        super().__init__()
        self.table = torch.randn(128, dim, generator=torch.Generator().manual_seed(0))

    def encode_text(self, tokens, normalize=False):
        embedding = tokens @ self.table
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def embed(self, texts):
        return self.encode_text(_count(texts))


def _count(texts):
    letters = [np.frombuffer(text.encode(), np.uint8) % 128 for text in texts]
    return torch.tensor(np.stack([np.bincount(some, minlength=128) for some in letters])).float()


class Painted:
    """Says what an encoder makes of the images that a text names."""

    def __init__(self, encoder, pictures):
        pixels = {word: to_pixels(path, (16, 16))[None] for word, path in pictures.items()}
        self.answers = {
            word: encoder(some).spatial.mean(dim=(2, 3))[0] for word, some in pixels.items()
        }

    def embed(self, texts):
        nothing = torch.zeros_like(next(iter(self.answers.values())))
        return torch.stack(
            [
                next((self.answers[word] for word in self.answers if word in text), nothing)
                for text in texts
            ]
        )


class Numbered(Painted):
    """The same of the number that a text begins with."""

    def embed(self, texts):
        return torch.stack([self.answers[re.match(r"\d+", text).group()] for text in texts])


def with_text(encoder, text):
    return Encoder(encoder.name, encoder.encode, encoder.size_multiple, text=text)


def test_text_classifier__equals_open_clip():
    open_clip = pytest.importorskip("open_clip")
    names, templates = class_names()[:12], prompt_templates()
    expected = open_clip.build_zero_shot_classifier(Letters(), _count, names, templates, 5)
    done = []
    sentences = [[template(name) for template in templates] for name in names]
    ours = text_classifier(Letters(), sentences, done.append)
    torch.testing.assert_close(ours, expected.T, rtol=0, atol=1e-6)
    assert done == list(range(1, 13))


def test_class_names__are_those_of_the_challenge_in_the_order_of_its_folders():
    timm = pytest.importorskip("timm.data")
    names, info = class_names(), timm.ImageNetInfo()
    assert (len(names), len(prompt_templates())) == (1000, 80)
    alike = [name.lower() in info.index_to_description(i).lower() for i, name in enumerate(names)]
    assert sum(alike) > 600  # open_clip has other words for the rest
    assert (names[0], names[9], names[-1]) == ("tench", "ostrich", "toilet paper")


def test_zero_shot__pictures_that_show_their_name_are_all_right(hues, tmp_path):
    root = str(layouts.imagenet(tmp_path))
    names, folders = class_names(), sorted((tmp_path / "val").iterdir())
    shown = dict(zip((names[0], names[2], names[9]), folders, strict=True))
    text = Painted(hues(8), {name: min(folder.iterdir()) for name, folder in shown.items()})
    top1, top5 = ImagenetZeroShot(root, 16).run(with_text(hues(8), text))
    assert (top1.name, top1.value, top1.num_samples) == ("imagenet_zero_shot/top1", 100.0, 6)
    assert (top5.value, top1.headline, top5.headline) == (100.0, True, False)
    assert top1.details == {"classes": 1000}


def test_zero_shot__texts_are_embedded_once_for_an_encoder_that_keeps_them(hues, tmp_path):
    root = str(layouts.imagenet(tmp_path / "imagenet"))

    class Counted(Letters):
        asked = 0

        def embed(self, texts):
            self.asked += 1
            return super().embed(texts)

    def score(text, encoder="a"):
        cache = SummaryCache(tmp_path / "cache", encoder)
        return ImagenetZeroShot(root, 16).run(replace(with_text(hues(8), text), cache=cache))

    first, second, other = Counted(6), Counted(6), Counted(6)
    assert score(first) == score(second) == score(other, "b")
    assert (first.asked, second.asked, other.asked) == (1000, 0, 1000)


def test_zero_shot__noise_is_at_chance_and_no_text_tower_is_passed_over(noise, tmp_path):
    root = str(layouts.imagenet(tmp_path, val=20))
    top1, top5 = ImagenetZeroShot(root, 16).run(with_text(noise(8, channels=32), Letters()))
    assert top1.value <= 4  # 60 pictures, 1,000 classes
    assert top5.value <= 10
    assert ImagenetZeroShot(root, 16).run(noise(8)) == []


@pytest.mark.parametrize(
    ("benchmark", "layout"),
    [(CocoCaptions, layouts.coco_retrieval), (FlickrCaptions, layouts.flickr30k)],
)
def test_retrieval__texts_that_name_their_picture_are_all_found(hues, tmp_path, benchmark, layout):
    pictures = sorted(layout(tmp_path, pictures=6).rglob("*.jpg"))
    text = Numbered(hues(8), {str(number): path for number, path in enumerate(pictures)})
    scores = benchmark(str(tmp_path), 16).run(with_text(hues(8), text))
    assert {score.metric: score.value for score in scores} == {
        f"{way}@{rank}": 100.0 for way in ("text_to_image", "image_to_text") for rank in (1, 5, 10)
    }
    assert scores[0].details == {"images": 6, "captions": 30}
    assert [score.metric for score in scores if score.headline] == [
        "text_to_image@1", "image_to_text@1"
    ]  # fmt: skip


def test_retrieval__noise_is_at_chance(noise, tmp_path):
    root = str(layouts.coco_retrieval(tmp_path, pictures=40))
    scores = CocoCaptions(root, 16).run(with_text(noise(8, channels=32), Letters()))
    found = {score.metric: score.value for score in scores}
    assert found["text_to_image@1"] <= 10
    assert found["image_to_text@1"] <= 10
    assert CocoCaptions(root, 16).run(noise(8)) == []


def test_retrieval__limit_keeps_all_captions_of_a_picture_and_batches_change_nothing(
    hues, tmp_path
):
    pictures = sorted(layouts.coco_retrieval(tmp_path, pictures=7).rglob("*.jpg"))
    text = Numbered(hues(8), {str(number): path for number, path in enumerate(pictures)})
    scores = [
        CocoCaptions(str(tmp_path), 16, batch_size=size).run(with_text(hues(8), text), limit=3)
        for size in (1, 2, 3)
    ]
    assert scores[0] == scores[1] == scores[2]
    assert scores[0][0].details == {"images": 3, "captions": 15}
    assert {score.value for score in scores[0]} == {100.0}


def test_retrieval__a_caption_of_another_picture_is_not_right(hues, tmp_path):
    """Texts of image n say n + 1: no text is right, and no image finds its own."""
    pictures = sorted(layouts.coco_retrieval(tmp_path, pictures=6).rglob("*.jpg"))
    text = Numbered(hues(8), {str(number): pictures[number - 5] for number in range(6)})
    scores = CocoCaptions(str(tmp_path), 16, ranks=(1,)).run(with_text(hues(8), text))
    assert [score.value for score in scores] == [0.0, 0.0]


def test_retrieval__reads_real_captions(colours, real, tmp_path):
    folder = real("evaluation/coco51")

    def encode(pixels):
        return Features(torch.ones(len(pixels), 32), torch.ones(len(pixels), 3, 2, 2))

    scores = CocoCaptions(str(folder), 16).run(Encoder("blind", encode, 8, text=Letters()))
    assert scores[0].details == {"images": 25, "captions": 125}
    assert scores[0].value == pytest.approx(4.0)
