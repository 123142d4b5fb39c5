"""Sizes that a frozen teacher takes, over all sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from radio_distill.errors import ConfigError
from radio_distill.types import TeacherSpec
from teachers.base import FrozenTeacher, check_size


def spec(patch_size=14, max_size=None, fixed_size=False):
    return TeacherSpec(
        name="t", channels=3, summary_channels=None, patch_size=patch_size, native_size=(56, 56),
        max_size=max_size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), fixed_size=fixed_size,
    )  # fmt: skip


@given(
    patch=st.integers(1, 32),
    largest=st.none() | st.integers(32, 600),
    height=st.integers(1, 700),
    width=st.integers(1, 700),
)
def test_check_size__every_size_it_proposes_is_one_it_takes(patch, largest, height, width):
    described = spec(patch, largest)
    fits = all(side % patch == 0 and side <= (largest or side) for side in (height, width))
    if fits:
        check_size(described, (height, width))
        return
    with pytest.raises(ConfigError, match=rf"'t'.*{height}x{width}") as error:
        check_size(described, (height, width))
    for size in str(error.value).split("nearest ")[1].split(" and "):
        check_size(described, tuple(int(side) for side in size.split("x")))


def test_check_size__proposes_the_two_around():
    with pytest.raises(ConfigError, match=r"98x112.*112x112"):
        check_size(spec(), (100, 112))
    with pytest.raises(ConfigError, match=r"14 .*120.*112x112"):
        check_size(spec(max_size=120), (126, 112))


def test_encode__averages_of_a_plain_function():
    """Any callable will do; this one averages each patch, so the numbers are known."""

    def average(pixels):
        return None, torch.nn.functional.avg_pool2d(pixels, 14)

    teacher = FrozenTeacher(average, spec(), micro_batch=1)
    found = teacher.encode(torch.full((3, 3, 28, 56), 0.75))
    assert found.summary is None
    torch.testing.assert_close(found.spatial, torch.full((3, 3, 2, 4), 0.5))


def test_encode__is_not_changed_by_the_caller_s_autocast():
    convolution = torch.nn.Conv2d(3, 8, 14, 14)
    teacher = FrozenTeacher(lambda pixels: (None, convolution(pixels)), spec())
    pixels = torch.rand(1, 3, 28, 28)
    expected = teacher.encode(pixels).spatial
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.encode(pixels).spatial, expected)
