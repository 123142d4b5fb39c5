"""What every upsampler without parameters must do, with real (tiny, random) teachers."""

from functools import cache

import pytest
import torch

from radio_distill.config import TeacherConfig, UpsamplerConfig
from radio_distill.errors import ConfigError
from radio_distill.protocols import Upsampler
from teachers import build_teacher
from upsamplers import UPSAMPLERS, build_upsampler

NAMES = UPSAMPLERS.names()


@cache
def tiny(name):
    return build_teacher(name, TeacherConfig(preset=name))


def build(name, factor, **values):
    return build_upsampler(UpsamplerConfig(name=name, factor=factor, **values), {})


@pytest.mark.parametrize("teacher", ["tiny_vit", "tiny_dinov2", "tiny_cnn"])
@pytest.mark.parametrize("name", NAMES)
def test_upsampler__gives_exactly_the_grid_from_any_picture(name, teacher):
    teacher = tiny(teacher)
    upsampler = build(name, 3)
    assert isinstance(upsampler, Upsampler)
    assert upsampler.factor == 3
    for size in ((50, 70), (101, 64)):
        summary, spatial = upsampler(teacher, torch.rand(2, 3, *size), (6, 9))
        assert spatial.shape == (2, teacher.spec.channels, 6, 9)
        assert summary.shape == (2, teacher.spec.summary_channels)
        assert spatial.is_contiguous(memory_format=torch.channels_last)
        assert not spatial.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_upsampler__factor_one_is_the_teacher(name):
    teacher, pixels = tiny("tiny_vit"), torch.rand(2, 3, 32, 48)
    found, expected = build(name, 1)(teacher, pixels, (4, 6)), teacher.encode(pixels)
    torch.testing.assert_close(found.spatial, expected.spatial)
    torch.testing.assert_close(found.summary, expected.summary)


@pytest.mark.parametrize("name", NAMES)
def test_upsampler__summary_is_that_of_the_whole_picture(name):
    teacher, pixels = tiny("tiny_vit"), torch.rand(2, 3, 48, 48)
    small = torch.nn.functional.interpolate(pixels, (24, 24), mode="bicubic", antialias=True)
    small = small.clamp(0, 1)
    summary = build(name, 2)(teacher, pixels, (6, 6)).summary
    torch.testing.assert_close(summary, teacher.encode(small).summary, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_upsampler__pictures_do_not_mix_and_micro_batches_change_nothing(name):
    teacher, pixels = tiny("tiny_vit"), torch.rand(3, 3, 64, 64)
    whole = build(name, 2)(teacher, pixels, (8, 8))
    parts = build(name, 2, micro_batch=4)(teacher, pixels, (8, 8))
    alone = build(name, 2)(teacher, pixels[1:2], (8, 8))
    torch.testing.assert_close(parts.spatial, whole.spatial, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone.spatial[0], whole.spatial[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_upsampler__an_object_moves_by_its_cells(name):
    """The finer map follows an object of one low-resolution cell, on both axes."""
    teacher, upsampler = tiny("tiny_vit"), build(name, 2)
    grey = torch.full((1, 3, 64, 96), 0.5)
    blank = upsampler(teacher, grey, (8, 12)).spatial
    for row, column in ((0, 0), (4, 8), (6, 2)):
        picture = grey.clone()
        rows, columns = slice(8 * row, 8 * row + 16), slice(8 * column, 8 * column + 16)
        stripes = (torch.arange(16) // 4 % 2).float()
        picture[:, :, rows, columns] = stripes[:, None]
        change = (upsampler(teacher, picture, (8, 12)).spatial - blank).norm(dim=1)[0]
        found = divmod(int(change.argmax()), 12)
        assert (found[0] // 2 * 2, found[1] // 2 * 2) == (row, column)


@pytest.mark.parametrize("name", NAMES)
def test_upsampler__a_constant_picture_gives_a_constant_map_of_a_local_teacher(name):
    from radio_distill.types import TeacherSpec
    from teachers.base import FrozenTeacher

    def average(pixels):
        return pixels.mean((2, 3)), torch.nn.functional.avg_pool2d(pixels, 8)

    spec = TeacherSpec("toy", 3, 3, 8, (32, 32), None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    found = build(name, 3)(FrozenTeacher(average, spec), torch.full((1, 3, 50, 60), 0.3), (6, 9))
    torch.testing.assert_close(found.spatial, torch.full((1, 3, 6, 9), 0.3))


@pytest.mark.parametrize("name", NAMES)
def test_upsampler__a_grid_that_does_not_divide_names_the_nearest(name):
    message = "grid 8x10 does not divide by upsampler.factor 3; nearest 9x9"
    with pytest.raises(ConfigError, match=message):
        build(name, 3)(tiny("tiny_vit"), torch.rand(1, 3, 64, 80), (8, 10))


@pytest.mark.parametrize("name", NAMES)
def test_upsampler__a_teacher_that_cannot_take_the_size_says_so_with_the_grid(name):
    pixels = torch.rand(1, 3, 64, 64)
    with pytest.raises(
        ConfigError, match=r"no grid 4x4 .*'tiny_sam' cannot take 32x32 .*64x64 only"
    ):
        build(name, 2)(tiny("tiny_sam"), pixels, (4, 4))
    assert build(name, 2)(tiny("tiny_sam"), pixels, (8, 8)).spatial.shape[-2:] == (8, 8)
