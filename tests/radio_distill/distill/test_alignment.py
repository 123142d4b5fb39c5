import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_distill.config import LossConfig, build
from radio_distill.distill.alignment import RULES, align, common_grid, resample
from radio_distill.errors import ConfigError, UnknownNameError

grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


@pytest.mark.parametrize(
    ("rule", "student", "teacher", "expected"),
    [
        ("student_down", (64, 64), (27, 27), (27, 27)),
        ("student_down", (64, 48), (27, 48), (27, 48)),
        ("teacher_down", (16, 12), (27, 20), (16, 12)),
        ("teacher_up", (64, 48), (27, 20), (64, 48)),
        ("smaller", (64, 48), (27, 20), (27, 20)),
        ("smaller", (16, 16), (27, 27), (16, 16)),
        ("larger", (16, 16), (27, 27), (27, 27)),
        ("larger", (64, 48), (27, 20), (64, 48)),
        ("smaller", (64, 20), (27, 48), (27, 20)),
        ("larger", (64, 20), (27, 48), (64, 48)),
    ],
)
def test_align__grid_of_each_rule(rule, student, teacher, expected):
    prediction, target = align(torch.rand(2, 3, *student), torch.rand(2, 3, *teacher), rule)
    assert prediction.shape == target.shape == (2, 3, *expected)
    assert common_grid(student, teacher, rule) == expected


@pytest.mark.parametrize(
    ("rule", "student", "teacher", "use"),
    [
        ("student_down", (16, 16), (27, 27), "smaller"),
        ("teacher_down", (64, 64), (27, 27), "smaller"),
        ("teacher_up", (16, 16), (27, 27), "larger"),
        ("teacher_up", (64, 20), (27, 48), "larger"),
        ("student_down", (64, 20), (27, 48), "smaller"),
    ],
)
def test_common_grid__error_where_a_rule_would_go_the_other_way(rule, student, teacher, use):
    with pytest.raises(ConfigError) as caught:
        common_grid(student, teacher, rule)
    message = str(caught.value)
    assert rule in message
    assert f"{student[0]}x{student[1]}" in message
    assert f"use {use}," in message
    assert "\n" not in message


def test_common_grid__error_for_an_unknown_rule():
    with pytest.raises(UnknownNameError, match="'teacher_up'"):
        common_grid((1, 1), (1, 1), "teachers_up")


@pytest.mark.parametrize(("old", "new"), [((4, 6), (7, 9)), ((9, 8), (5, 20)), ((3, 30), (3, 7))])
def test_resample__bicubic_equals_torchs_antialiased_filter(old, new):
    features = torch.rand(2, 3, *old, dtype=torch.float64)
    expected = F.interpolate(features, new, mode="bicubic", align_corners=False, antialias=True)
    torch.testing.assert_close(resample(features, new, "bicubic"), expected)


def test_resample__bicubic_continues_a_parabola_where_bilinear_cuts_its_corners():
    def parabola(cells):
        return ((torch.arange(cells, dtype=torch.float64) + 0.5) / cells).square()[None, None, None]

    inner = slice(6, -6)  # the kernel reaches two old cells
    cubic, linear = (resample(parabola(8), (1, 24), name) for name in ("bicubic", "bilinear"))
    torch.testing.assert_close(cubic[..., inner], parabola(24)[..., inner])
    assert (linear - parabola(24))[..., inner].max() > 1e-3


def test_rules__are_those_of_the_recipe():
    assert [build(LossConfig, {"alignment": rule}).alignment for rule in RULES] == list(RULES)
    with pytest.raises(ConfigError, match=", ".join(sorted(RULES, key=RULES.index))):
        build(LossConfig, {"alignment": "other"})


@settings(max_examples=40, deadline=None)
@given(grid=grids, rule=st.sampled_from(RULES))
def test_align__equal_grids_are_left_alone(grid, rule):
    prediction, target = torch.rand(1, 2, *grid), torch.rand(1, 2, *grid)
    aligned = align(prediction, target, rule)
    assert aligned[0] is prediction
    assert aligned[1] is target


@settings(max_examples=40, deadline=None)
@given(student=grids, teacher=grids, rule=st.sampled_from(["smaller", "larger"]))
def test_align__keeps_constants_and_is_symmetric(student, teacher, rule):
    values = torch.tensor([-3.0, 0.0, 7.5])[None, :, None, None]
    prediction, target = align(values.expand(1, 3, *student), values.expand(1, 3, *teacher), rule)
    torch.testing.assert_close(prediction, values.expand_as(prediction))
    torch.testing.assert_close(target, prediction)
    assert common_grid(student, teacher, rule) == common_grid(teacher, student, rule)


def test_resample__enlarging_is_bilinear_at_cell_centres():
    row = torch.tensor([0.0, 4.0])[None, None, None]  # centres at 1/4 and 3/4
    expected = torch.tensor([0.0, 1.0, 3.0, 4.0])[None, None, None]
    torch.testing.assert_close(resample(row, (1, 4)), expected)


def test_resample__shrinking_reads_every_cell():
    weights = torch.zeros(1, 1, 1, 12, requires_grad=True)
    resample(weights, (1, 3)).sum().backward()
    assert (weights.grad > 0).all()
    plain = torch.zeros(1, 1, 1, 12, requires_grad=True)
    F.interpolate(plain, (1, 3), mode="bilinear", align_corners=False).sum().backward()
    assert (plain.grad == 0).any()  # what the wider filter is for


def test_resample__one_axis_shrinks_while_the_other_grows():
    features = torch.rand(1, 2, 12, 3, dtype=torch.float64)
    both = resample(features, (4, 6))
    torch.testing.assert_close(both, resample(resample(features, (4, 3)), (4, 6)))
    torch.testing.assert_close(both, resample(resample(features, (12, 6)), (4, 6)))


# Where one column remains, torch's CPU kernel (seen in 2.15) reads wrong rows.
wider_grids = st.tuples(st.integers(1, 9), st.integers(2, 9))


@settings(max_examples=80, deadline=None)
@given(old=grids, new=wider_grids, channels=st.integers(1, 3), channels_last=st.booleans())
def test_resample__equals_torchs_antialiased_filter(old, new, channels, channels_last):
    features = torch.rand(2, channels, *old, dtype=torch.float64)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    expected = F.interpolate(features, new, mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(resample(features, new), expected)
    torch.testing.assert_close(resample(features.mT, new[::-1]), expected.mT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_align__low_precision_is_resampled_in_float32(dtype):
    prediction = torch.rand(1, 3, 8, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        aligned, _ = align(prediction, torch.rand(1, 3, 5, 5), "smaller")
    assert aligned.dtype == torch.float32
    torch.testing.assert_close(aligned, resample(prediction.float(), (5, 5)), rtol=0, atol=0)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("rule", "teacher"), [("smaller", (2, 2)), ("smaller", (2, 1)), ("larger", (4, 2))]
)
def test_align__gradient_reaches_the_student(rule, teacher, interpolation):
    prediction = torch.rand(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.rand(1, 2, *teacher, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: align(x, target, rule, interpolation)[0], prediction)
