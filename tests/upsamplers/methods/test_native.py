"""The teacher at a higher resolution."""

import pytest
import torch
import torch.nn.functional as F

from radio_distill.config import TeacherConfig
from radio_distill.errors import ConfigError
from radio_distill.types import Features, TeacherSpec
from teachers import build_teacher
from upsamplers.methods.native import Native


def tiny(name):
    return build_teacher(name, TeacherConfig(preset=name))


class Average:
    """Says each patch's mean colour; notes the batches and sizes that it is shown."""

    def __init__(self, max_size=None, fixed_size=False):
        none, one = (0.0,) * 3, (1.0,) * 3
        self.spec = TeacherSpec("toy", 3, 3, 4, (16, 16), max_size, none, one, fixed_size)
        self.calls = []

    def encode(self, pixels):
        self.calls.append(tuple(pixels.shape[::2]))
        return Features(pixels.mean((2, 3)), F.avg_pool2d(pixels, 4))

    def to(self, device):
        return self


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_cnn"])
def test_native__is_the_teacher_at_factor_times_the_pixels(name):
    teacher = tiny(name)
    patch = teacher.spec.patch_size
    pixels = torch.rand(2, 3, 4 * patch, 6 * patch)
    summary, spatial = Native(2)(teacher, pixels, (4, 6))
    torch.testing.assert_close(spatial, teacher.encode(pixels).spatial)
    assert summary.shape == (2, teacher.spec.summary_channels)


def test_native__summary_is_that_of_the_small_image():
    teacher = tiny("tiny_vit")
    small = torch.rand(1, 3, 24, 16)
    features = Native(2)(teacher, small, (6, 4))
    torch.testing.assert_close(features.summary, teacher.encode(small).summary)


def test_native__counts_a_large_image_as_so_many_small_ones():
    teacher = Average()
    Native(2, micro_batch=8)(teacher, torch.rand(5, 3, 32, 32), (8, 8))
    assert teacher.calls == [(5, 16), (2, 32), (2, 32), (1, 32)]
    assert Native(2).cost((8, 8)) == 5
    assert Native(1).cost((8, 8)) == 1


def test_native__a_micro_batch_below_one_large_image_takes_one_at_a_time():
    teacher = Average()
    Native(3, micro_batch=4)(teacher, torch.rand(2, 3, 24, 24), (6, 6))
    assert teacher.calls == [(2, 8), (1, 24), (1, 24)]


def test_native__says_why_a_teacher_cannot_before_it_encodes():
    teacher = Average(fixed_size=True)
    message = "show teacher 'toy' 32x48 pixels, which takes 16x16 only; use 'tile'"
    with pytest.raises(ConfigError, match=message):
        Native(2)(teacher, torch.rand(1, 3, 16, 24), (8, 12))
    teacher = Average(max_size=40)
    with pytest.raises(ConfigError, match=r"32x48.* 40.*'tile'"):
        Native(2)(teacher, torch.rand(1, 3, 16, 24), (8, 12))
    assert teacher.calls == []


def test_native__a_grid_that_does_not_divide():
    with pytest.raises(ConfigError, match="7x9"):
        Native(2)(Average(), torch.rand(1, 3, 16, 16), (7, 9))
