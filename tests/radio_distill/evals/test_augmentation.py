"""Labels move with the pixels they are of."""

import numpy as np
import pytest
import torch

from radio_distill.evals.augmentation import (
    Augmentation,
    distorted,
    flipped,
    padded,
    resized,
)
from radio_distill.evals.metrics import IGNORED


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def sample(height: int = 48, width: int = 64):
    """A image in blocks whose red is the class, and labels that say where each pixel was."""
    blocks = torch.from_numpy(random().integers(0, 25, (height // 8, width // 8)))
    classes = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)
    pixels = torch.stack([classes * 10, classes * 5, classes]).byte()
    normals = torch.zeros(3, height, width)
    normals[0] = 1.0
    depth = classes.float() + 1
    return pixels, {"segmentation": classes, "depth": depth, "normals": normals}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("crop", [(24, 32), (40, 96)])
def test_augmentation__a_pixel_keeps_its_labels(seed, crop):
    view = Augmentation(crop, fit=(64, 48), scale=(1.0, 1.0), distort=False)
    pixels, labels = view(*sample(), random(seed))
    assert pixels.shape == (3, *crop)
    known = labels["segmentation"] != IGNORED
    assert torch.equal(pixels[0][known].long(), labels["segmentation"][known] * 10)
    assert torch.equal(labels["depth"][known], labels["segmentation"][known].float() + 1)
    assert labels["normals"][0][known].abs().eq(1).all()
    assert not pixels[:, ~known].any(), "what is padded is black"
    assert not labels["depth"][~known].any()
    assert not labels["normals"][:, ~known].any()


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_augmentation__scales_labels_with_pixels(scale):
    view = Augmentation((96, 128), scale=(scale, scale), distort=False, scale_depth=True, flip=0)
    pixels, labels = view(*sample(), random())
    known = labels["segmentation"] != IGNORED
    assert known.sum() == (48 * scale) * (64 * scale)
    near = (pixels[0][known].float() - labels["segmentation"][known] * 10).abs()
    assert near.median() == 0, "but for the borders of blocks, which are interpolated"
    assert torch.equal(labels["depth"][known], (labels["segmentation"][known] + 1) / scale)


def test_augmentation__is_a_function_of_the_generator():
    view = Augmentation((32, 32), fit=(64, 48))
    first, again, other = (view(*sample(), random(seed)) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])


def test_augmentation__no_class_covers_most_of_a_crop():
    """A image three quarters of which are one class: such crops are drawn again."""
    classes = torch.zeros(64, 256, dtype=torch.long)
    classes[:, 192:] = 1
    pixels = torch.zeros(3, 64, 256, dtype=torch.uint8)
    shares = []
    for most in (0.75, 1.0):
        view = Augmentation((64, 64), scale=(1, 1), most_of_one_class=most, distort=False)
        views = [view(pixels, {"segmentation": classes}, random(seed))[1] for seed in range(60)]
        covers = [max((v["segmentation"] == c).float().mean() for c in (0, 1)) for v in views]
        shares.append(sum(cover > 0.75 for cover in covers) / len(covers))
    assert shares[0] < 0.4 * shares[1]


def test_flipped__twice_is_nothing_and_once_negates_x():
    pixels, labels = sample()
    once = flipped(pixels, labels)
    assert torch.equal(once[0][:, :, 0], pixels[:, :, -1])
    assert (once[1]["normals"][0] == -1).all()
    twice = flipped(*once)
    assert torch.equal(twice[0], pixels)
    assert all(torch.equal(twice[1][name], labels[name]) for name in labels)


def test_padded__centred_puts_as_much_on_either_side():
    pixels, labels = sample()
    _, wide = padded(pixels, labels, (48, 74), centred=True)
    known = (wide["segmentation"] != IGNORED).all(dim=0)
    assert known.nonzero().flatten().tolist() == list(range(5, 69))


def test_resized__whole_factors_repeat_labels():
    pixels, labels = sample()
    _, doubled = resized(pixels, labels, (96, 128))
    expected = labels["segmentation"].repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(doubled["segmentation"], expected)


def test_distorted__changes_colours_alone_and_not_always():
    pixels = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    pixels[0] = 140
    views = [distorted(pixels, random(seed)) for seed in range(64)]
    unchanged = sum(torch.equal(view, pixels) for view in views)
    assert 1 <= unchanged < 20, "one in sixteen has no part in any of the four"
    assert all((view == view[:, :1, :1]).all() for view in views), "no pixel moves"
    assert max(int(view.max()) for view in views) > 160 > 120 > min(int(v.max()) for v in views)
