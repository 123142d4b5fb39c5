"""Colours change alike for all encoders, by the formulas of torchvision."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from radio_distill.config import AugmentationConfig
from radio_distill.distill.colours import DRAWS, blur, is_plain, recoloured, turn_hue
from radio_distill.distill.randomness import StepRandomness
from radio_distill.types import View

NEVER = dict.fromkeys(("jitter_share", "grey_share", "blur_share", "solarise_share"), 0.0)


def image(size=(12, 16), images=3, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, 3, *size, generator=generator)


def changed(pixels: torch.Tensor, draws: np.ndarray, **config) -> torch.Tensor:
    size = tuple(pixels.shape[2:])
    config = AugmentationConfig(**(NEVER | config))
    return recoloured({View(size): pixels}, size, config, draws)[View(size)]


def test_jitter__equals_torchvision_image_by_image():
    pixels, draws = image(), np.random.default_rng(0).random((3, DRAWS))
    found = changed(pixels, draws, jitter=(0.4, 0.5, 0.2, 0.1), jitter_share=1.0)
    for row, (one, drawn) in enumerate(zip(pixels, draws, strict=True)):
        expected = F.adjust_brightness(one, 0.6 + 0.8 * drawn[4])
        expected = F.adjust_contrast(expected, 0.5 + 1.0 * drawn[5])
        expected = F.adjust_saturation(expected, 0.8 + 0.4 * drawn[6])
        expected = F.adjust_hue(expected, -0.1 + 0.2 * drawn[7])
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.3])
def test_hue__equals_torchvision_and_leaves_grey_alone(turn):
    pixels = image()
    pixels[0, :, :4] = pixels[0, :1, :4]  # grey
    found = turn_hue(pixels, torch.full((3, 1, 1, 1), turn))
    torch.testing.assert_close(found, F.adjust_hue(pixels, turn), rtol=0, atol=1e-5)


def test_blur__equals_torchvision_at_each_images_width():
    pixels = image()
    found = blur(pixels, torch.tensor([0.1, 0.9, 2.0]), reach=3)
    for row, sigma in enumerate((0.1, 0.9, 2.0)):
        torch.testing.assert_close(found[row], F.gaussian_blur(pixels[row], 7, sigma))


def test_grey_and_solarise__equal_torchvision_in_their_share_of_the_images():
    pixels, draws = image(), np.full((3, DRAWS), 0.9)
    draws[1, 1] = draws[2, 3] = 0.1
    found = changed(pixels, draws, grey_share=0.2, solarise_share=0.2)
    assert torch.equal(found[0], pixels[0])
    torch.testing.assert_close(found[1], F.rgb_to_grayscale(pixels[1], 3), rtol=0, atol=1e-6)
    assert torch.equal(found[2], F.solarize(pixels[2], 128 / 255))


def test_recoloured__all_encoders_see_one_picture():
    """A view of half the size is the half of the large one: jitter and blur measure in shares."""
    fine = F.gaussian_blur(image((96, 96)), 31, 8.0)
    fine = (fine - fine.amin()) / (fine.amax() - fine.amin())
    coarse = F.resize(fine, [48, 48], antialias=True)
    config = AugmentationConfig(
        jitter=(0.2, 0.4, 0.4, 0.1), jitter_share=1.0, blur_share=1.0, blur_sigma=(3.0, 3.0)
    )
    draws = np.random.default_rng(0).random((3, DRAWS))
    views = {View((96, 96)): fine, View((48, 48)): coarse}
    found = recoloured(views, (96, 96), config, draws)
    halved = F.resize(found[View((96, 96))], [48, 48], antialias=True)
    difference = (halved - found[View((48, 48))]).abs()
    assert difference.max() < 0.02
    assert (found[View((48, 48))] - coarse).abs().max() > 0.1
    assert torch.equal(views[View((96, 96))], fine), "what was handed in stays as it was"


def test_draws__belong_to_an_image_however_the_step_is_cut():
    config = AugmentationConfig(jitter=(0.4, 0.4, 0.2, 0.1), blur_share=0.5, solarise_share=0.5)
    draws = StepRandomness(1, config, 8, 16)
    pixels, size = image(images=8), (12, 16)
    whole = draws.recoloured(5, 0, 8, size, {View(size): pixels})[View(size)]
    parts = [
        draws.recoloured(5, start, stop, size, {View(size): pixels[start:stop]})[View(size)]
        for start, stop in ((0, 3), (3, 4), (4, 8))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
    other = draws.recoloured(6, 0, 8, size, {View(size): pixels})[View(size)]
    assert not torch.allclose(other, whole)


def test_is_plain__by_default_and_without_a_strength():
    assert is_plain(AugmentationConfig())
    assert is_plain(AugmentationConfig(jitter=(0.4, 0, 0, 0), jitter_share=0.0))
    assert not is_plain(AugmentationConfig(jitter=(0.4, 0, 0, 0)))
    views = {View((12, 16)): image()}
    draws = StepRandomness(1, AugmentationConfig(), 3, 16)
    assert draws.recoloured(0, 0, 3, (12, 16), views) is views
