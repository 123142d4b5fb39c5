"""Class activation maps: the right half of an image stays, and a wrong one costs confidence."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import layouts
from radio_distill.evals.cam import ClassActivation, ImagenetClassActivation, keep_most_active
from radio_distill.evals.encoder import Encoder
from radio_distill.types import Features

from .probe_sets import perfect_encoder, random_encoder

KINDS = (3, 15, 35)
"""Colours of :func:`layouts.painted`, one a class."""


def squares(root: Path, swapped: bool = False) -> str:
    """A square of the colour of its class, anywhere before 0; in ``val`` of another class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 8)):
        for place, kind in enumerate(KINDS):
            for number in range(count):
                shown = np.zeros((48, 48), dtype=np.uint8)
                top, left = generator.integers(0, 32, 2)
                colour = KINDS[place - 1] if swapped and split == "val" else kind
                shown[top : top + 16, left : left + 16] = colour
                path = root / split / f"class_{kind}" / f"{number}.png"
                layouts.save(path, layouts.painted(shown))
    return str(root)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return squares(tmp_path_factory.mktemp("labels"))


def behind(encoder: Encoder, change) -> Encoder:
    """An encoder behind an upsampler of factor 2 that does something else to its map."""

    def encode(pixels):
        spatial = encoder(F.avg_pool2d(pixels, 2)).spatial
        return Features(None, change(F.interpolate(spatial, scale_factor=2, mode="nearest")))

    return Encoder("upsampled", encode, 2 * encoder.size_multiple, before=encoder)


def asked(folder: str, encoder: Encoder, **values) -> dict[str, float]:
    scores = ClassActivation(folder, 48, **values).run(encoder)
    assert all(not score.headline for score in scores)
    assert len({score.num_samples for score in scores}) == 1
    return {score.metric: score.value for score in scores}


def test_cam__a_map_that_shows_the_object_loses_nothing_and_its_opposite_all(folder):
    opposite = behind(perfect_encoder(cell=2), lambda spatial: -spatial)
    found = asked(folder, opposite, blur=0.4)
    assert found.keys() == {
        "average_drop", "average_increase", "average_drop_coarse", "average_increase_coarse"
    }  # fmt: skip
    assert found["average_drop_coarse"] < 1
    assert found["average_drop"] > 50
    assert found["average_increase"] < 10


def test_cam__the_same_map_is_worth_the_same_behind_an_upsampler(folder):
    same = asked(folder, behind(perfect_encoder(cell=2), lambda spatial: spatial))
    alone = ClassActivation(folder, 24).run(perfect_encoder(cell=2))
    assert abs(same["average_drop"] - same["average_drop_coarse"]) < 1
    assert alone[0].num_samples == 24


def test_cam__does_not_depend_on_batches_and_counts_no_more_than_asked(folder):
    one, many = (asked(folder, perfect_encoder(), batch_size=size) for size in (1, 16))
    assert one == pytest.approx(many, abs=1e-4)
    (score, _) = ClassActivation(folder, 48, most=5).run(perfect_encoder())
    assert score.num_samples == 5
    other = replace(ClassActivation(folder, 48, most=5), seed=1).run(perfect_encoder())[0]
    assert other.protocol == score.protocol
    assert len(ClassActivation(folder, 48, training_images=6).run(perfect_encoder())) == 2


def test_cam__a_map_that_sees_nothing_neither_loses_nor_gains(folder):
    found = asked(folder, random_encoder())
    assert found["average_drop"] == pytest.approx(0, abs=1e-3)


def test_cam__a_classifier_that_is_never_right_has_no_score(tmp_path, caplog):
    assert ClassActivation(squares(tmp_path, swapped=True), 48).run(perfect_encoder()) == []
    assert "gets no image right" in caplog.text


def test_keep_most_active__half_of_the_pixels_stay_and_the_rest_has_no_edges():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 40, 60, generator=generator)
    activation = torch.zeros(2, 4, 6)
    activation[0, :, :3], activation[1, :2] = 1, 1
    shown = keep_most_active(pixels, activation, 0.5, 0.1)
    stays = (shown == pixels).all(dim=1)
    assert stays.float().mean(dim=(1, 2)).tolist() == pytest.approx([0.5, 0.5], abs=1e-3)
    assert stays[0, :, :25].all()
    assert stays[1, :15].all()
    rest = shown[0, :, :, 40:]
    assert rest.std() < 0.3 * pixels[0, :, :, 40:].std()
    assert torch.allclose(rest.mean(), pixels[0, :, :, 40:].mean(), atol=0.02)


def test_imagenet_cam__reads_the_layout(tmp_path: Path):
    folder = str(layouts.imagenet(tmp_path))
    assert ImagenetClassActivation(folder, 48).run(perfect_encoder())
