import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from radio_distill.errors import DataError
from radio_distill.evals.encoder import Encoder
from radio_distill.evals.masks import labelled_classes
from radio_distill.evals.metrics import IGNORED
from radio_distill.evals.probes import class_shares
from radio_distill.evals.segmentation import FeaturePreservation, Segmentation
from radio_distill.types import Features

COLOURS = {3: (220, 30, 30), 7: (30, 220, 30), 200: (30, 30, 220)}


def _write(folder, split, name, mask):
    image = np.zeros((*mask.shape, 3), dtype=np.uint8)
    for number, colour in COLOURS.items():
        image[mask == number] = colour
    for kind, array, ending in (("images", image, "png"), ("masks", mask, "png")):
        target = folder / kind / split
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(target / f"{name}.{ending}")


@pytest.fixture
def squares(tmp_path):
    """Images of coloured 8 px squares with their classes as masks, some unlabelled."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for index in range(3):
            cells = random.choice([0, 3, 7, 200], (4, 4)).astype(np.uint8)
            _write(tmp_path, split, f"{index}", cells.repeat(8, 0).repeat(8, 1))
    return tmp_path


def test_class_shares__cross_entropy_is_that_of_pixels():
    target = torch.randint(-1, 6, (24, 24), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(1))
    shares = class_shares(target, (4, 4), 6)
    by_cell = -(shares * logits.log_softmax(dim=0)).sum() / shares.sum()
    pixels = logits.repeat_interleave(6, 1).repeat_interleave(6, 2)
    by_pixel = F.cross_entropy(pixels[None], target[None], ignore_index=IGNORED)
    torch.testing.assert_close(by_cell, by_pixel)


def test_segmentation__features_that_show_the_class_are_read_off(colours, squares):
    (score,) = Segmentation(str(squares), 32, steps=200).run(colours(4))
    assert score.name == "segmentation/miou"
    assert score.value > 85  # logits are interpolated, so borders of squares stay soft


def test_segmentation__is_deterministic_and_noise_is_worse(colours, noise, squares):
    benchmark = Segmentation(str(squares), 32, steps=50)
    assert benchmark.run(colours(4)) == benchmark.run(colours(4))
    assert benchmark.run(noise(4))[0].value < 50


def test_segmentation__encoder_with_another_size_is_scored_on_the_same_pixels(colours, squares):
    (score,) = Segmentation(str(squares), 30, steps=200).run(colours(8))  # encodes at 32
    assert score.value > 60


def test_segmentation__leaves_global_randomness_alone(colours, squares):
    before = torch.random.get_rng_state()
    Segmentation(str(squares), 32, steps=5).run(colours(4))
    assert torch.equal(before, torch.random.get_rng_state())


def test_labelled_classes__nothing_labelled(tmp_path):
    _write(tmp_path, "train", "0", np.zeros((8, 8), dtype=np.uint8))
    with pytest.raises(DataError, match="label nothing"):
        labelled_classes([tmp_path / "masks" / "train" / "0.png"])


def test_segmentation__real_images_beat_noise(colours, noise, real):
    folder = str(real("segmentation/coco"))
    benchmark = Segmentation(folder, 64, steps=300, tokens_per_step=512, learning_rate=1e-2)
    # All images: with a few of them there are too few cells for either to learn anything.
    by_colour, by_noise = (benchmark.run(encoder(8))[0] for encoder in (colours, noise))
    assert by_colour.num_samples == 27
    assert by_colour.value > 1.3 * by_noise.value > 0


def _upsampled(coarse, change=lambda spatial: spatial):
    """An encoder twice as fine: the coarse map, repeated and changed."""

    def encode(pixels):
        spatial = change(coarse.encode(F.avg_pool2d(pixels, 2)).spatial)
        return Features(None, F.interpolate(spatial, scale_factor=2.0))

    return Encoder("upsampled", encode, 2 * coarse.size_multiple, before=coarse)


def test_feature_preservation__repeated_cells_score_as_the_coarse_ones(colours, squares):
    fine, coarse = FeaturePreservation(str(squares), 32, steps=200).run(_upsampled(colours(4)))
    assert (fine.name, coarse.metric) == ("feature_preservation/miou", "miou_coarse")
    assert not fine.headline
    assert coarse.value > 40
    assert fine.value > 0.9 * coarse.value


def test_feature_preservation__another_space_is_found_out(colours, squares):
    """Negated features tell classes apart as well as ever, and not by the frozen probe."""
    negated = _upsampled(colours(4), lambda spatial: -spatial)
    fine, coarse = FeaturePreservation(str(squares), 32, steps=200).run(negated)
    assert fine.value < 0.5 * coarse.value
    (own,) = Segmentation(str(squares), 32, steps=200).run(negated)
    assert own.value > 1.5 * fine.value


def test_feature_preservation__without_an_upsampler_it_is_passed_over(colours, squares):
    assert FeaturePreservation(str(squares), 32).run(colours(4)) == []
