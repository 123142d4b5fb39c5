import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from radio_distill.evals.encoder import Encoder, Heads, Target
from radio_distill.report.feature_images import (
    LABEL_HEIGHT,
    MARGIN,
    difference_image,
    head_sheet,
    image_grid,
    joint_pca,
    pca_images,
    size_sheet,
)
from radio_distill.types import Features


def _maps(seed=0, channels=12, grids=((8, 10), (16, 20))):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(3, 0.1, channels)[:, None, None]
    return [scale * torch.randn(channels, *grid, generator=generator) for grid in grids]


def test_joint_pca__agrees_with_scikit_learn():
    decomposition = pytest.importorskip("sklearn.decomposition")
    maps = _maps(grids=((8, 10), (8, 10)))
    tokens = torch.cat([item.flatten(1).T for item in maps]).double().numpy()
    oracle = decomposition.PCA(3).fit(tokens).components_
    found = joint_pca(maps).components.T.numpy()
    np.testing.assert_allclose(np.abs(np.sum(oracle * found, axis=1)), 1, atol=1e-9)


def test_joint_pca__sign_follows_the_largest_entry():
    components = joint_pca(_maps()).components
    peak = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    assert (peak > 0).all()


def test_joint_pca__every_map_weighs_alike():
    small, large = _maps(grids=((4, 4), (4, 4)))
    many = large.repeat(1, 5, 5)
    torch.testing.assert_close(joint_pca([small, large]).mean, joint_pca([small, many]).mean)
    torch.testing.assert_close(
        joint_pca([small, large]).components, joint_pca([small, many]).components
    )


def test_pca_images__equal_features_have_equal_colours_across_resolutions():
    (coarse,) = _maps(grids=((6, 6),))
    fine = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    first, second = pca_images([coarse, fine], side=60)
    assert np.array_equal(np.array(first), np.array(second))


def test_pca_images__are_deterministic_and_keep_the_shape():
    first, second = (pca_images(_maps(), side=80) for _ in range(2))
    assert [image.size for image in first] == [(80, 64), (80, 64)]
    assert all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(first, second, strict=True))
    assert np.array(first[1]).std() > 30


def test_pca_images__an_outlier_does_not_flatten_the_rest():
    (spatial,) = _maps(grids=((16, 16),))
    spatial[:, 0, 0] = 1e4
    assert np.array(pca_images([spatial], side=16)[0])[4:, 4:].std() > 30


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pca_images__few_channels(channels):
    (image,) = pca_images(_maps(channels=channels, grids=((4, 4),)), side=8)
    assert np.array(image).shape == (8, 8, 3)


def test_difference_image__black_where_equal_and_bright_where_not():
    (spatial,) = _maps(grids=((8, 8),))
    other = spatial.clone()
    other[:, :, 4:] *= -1
    image = np.array(difference_image(spatial, 3 * other, side=8)).sum(axis=2)
    assert image[:, :4].max() < 10
    assert image[:, 4:].min() > 600


def _cells(sheet, row, columns):
    """Return whether each cell of a row shows anything."""
    pixels, pitch = np.array(sheet), 60 + MARGIN
    top = LABEL_HEIGHT + row * (60 + LABEL_HEIGHT + MARGIN) + LABEL_HEIGHT
    starts = [MARGIN + column * pitch for column in range(columns)]
    return [bool((pixels[top : top + 60, left : left + 60] < 255).any()) for left in starts]


def test_size_sheet__an_encoder_is_painted_at_every_size_that_it_takes_and_no_size_twice():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    seen = []

    def encode(pixels):
        seen.append(tuple(pixels.shape[-2:]))
        return Features(None, F.avg_pool2d(pixels, 8))

    encoders = {
        "any": Encoder("any", encode, 8),
        "limited": Encoder("limited", encode, 8, max_size=64),
        "fixed": Encoder("fixed", encode, 8, fixed_size=(96, 96)),
    }
    sheet = size_sheet(image, encoders, [32, 64, 128], 60)
    assert seen == [(32, 32), (64, 64), (128, 128), (32, 32), (64, 64), (96, 96)]
    assert _cells(sheet, 0, 4) == [True, True, True, True]
    assert _cells(sheet, 1, 4) == [True, True, True, False]
    assert _cells(sheet, 2, 4).count(True) == 2
    assert sheet.width == MARGIN + 4 * (60 + MARGIN)


def test_head_sheet__equal_features_have_equal_colours():
    """A head that is its teacher paints the same cell above and below; another does not."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8))

    class Blocks:
        """Means of 8 x 8 pixels and of their squares."""

        def encode(self, pixels):
            means = [F.avg_pool2d(pixels**power, 8) for power in (1, 2)]
            return Features(None, torch.cat(means, dim=1))

    teacher = Blocks()
    targets = {name: Target(teacher, (40, 40)) for name in ("same", "other")}

    def predict(pixels):
        spatial = teacher.encode(pixels).spatial
        return {"same": Features(None, spatial), "other": Features(None, spatial.flip(3))}

    encoder = Encoder("mine", teacher.encode, 8, heads=Heads(predict, targets))
    sheet = head_sheet(image, encoder, (40, 40), 60)
    assert _cells(sheet, 0, 4) == [True] * 4
    assert _cells(sheet, 1, 4) == [False, False, True, True]
    pixels, pitch = np.array(sheet), LABEL_HEIGHT + MARGIN + 60
    above, below = (
        pixels[top + LABEL_HEIGHT : top + LABEL_HEIGHT + 60]
        for top in (LABEL_HEIGHT, LABEL_HEIGHT + pitch)
    )
    columns = [
        slice(MARGIN + at * (60 + MARGIN), MARGIN + at * (60 + MARGIN) + 60) for at in (2, 3)
    ]
    same, other = (np.array_equal(above[:, at], below[:, at]) for at in columns)
    assert same
    assert not other


def test_image_grid__draws_labels():
    cell = [[Image.new("RGB", (20, 20), "white")]]
    blank, labelled = (image_grid(cell, [text], [text], 60) for text in ("", "dino"))
    assert (np.array(blank) == 255).all()
    assert (np.array(labelled) < 128).any()
