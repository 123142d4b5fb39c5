"""Crops that are shifted against each other, and maps that warp_to_student."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_distill.distill.views import EMA, STUDENT, Views, crop_of, warp_to_student
from radio_distill.types import View

PATCH = 8


def patch_means(pixels: torch.Tensor) -> torch.Tensor:
    """An encoder that sees one patch at a time, so that its map moves with the image."""
    return F.avg_pool2d(pixels, PATCH)


def offsets_of(cells):
    table = {name: torch.tensor(rows) for name, rows in cells.items()}
    return lambda name: table[name]


def crops_of(pixels, size, offsets, names=(STUDENT, "dino")):
    """Each encoder's crop, cut out at whole pixels."""
    crops = {}
    for name in names:
        corners = (offsets(name) * PATCH).tolist()
        rows = [
            image[:, top : top + size[0], left : left + size[1]]
            for image, (top, left) in zip(pixels, corners, strict=True)
        ]
        crops[View(size, crop_of("low", name))] = torch.stack(rows)
    return crops


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 6),
    st.integers(2, 6),
    st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=1, max_size=3),
)
def test_warp_to_student__a_map_that_moves_with_the_image_meets_the_students(rows, columns, cells):
    size, margin = (rows * PATCH, columns * PATCH), 3 * PATCH
    pixels = torch.rand(len(cells), 3, size[0] + margin, size[1] + margin)
    offsets = offsets_of(
        {
            STUDENT: [(top, left) for top, left, _, _ in cells],
            "dino": [(top, left) for _, _, top, left in cells],
        }
    )
    views = Views(crops_of(pixels, size, offsets), size, offsets, (rows, columns), "low")
    student = patch_means(views.of_student())
    teacher = patch_means(views.of_teacher("dino", size))
    moved, seen = warp_to_student(teacher, views.shift("dino"))
    for row, (top, left, other_top, other_left) in enumerate(cells):
        down, right = abs(top - other_top), abs(left - other_left)
        assert seen[row].sum() == max(rows - down, 0) * max(columns - right, 0)
    kept = seen[:, None].expand_as(moved)
    torch.testing.assert_close(moved[kept], student[kept], rtol=1e-4, atol=1e-5)


def test_warp_to_student__equal_crops_leave_the_map():
    features = torch.randn(2, 5, 4, 7)
    moved, seen = warp_to_student(features, torch.zeros(2, 2))
    torch.testing.assert_close(moved, features)
    assert seen.all()


def test_warp_to_student__parts_of_a_cell_are_interpolated():
    ramp = torch.arange(6.0).expand(1, 1, 4, 6)
    moved, seen = warp_to_student(ramp, torch.tensor([[0.0, 0.5 / 6]]))
    torch.testing.assert_close(moved[..., :5], ramp[..., :5] + 0.5)
    assert seen[0, 0].tolist() == [True] * 5 + [False], "the last cell is not in the other crop"


def test_warp_to_student__gradcheck():
    features = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    shift = torch.tensor([[1 / 3, -1 / 8]])
    assert torch.autograd.gradcheck(lambda item: warp_to_student(item, shift)[0], features)


def test_views__without_shift_all_see_the_same_at_their_own_size():
    small, large = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 48, 48)
    views = Views({View((32, 32)): small, View((48, 48)): large}, (32, 32))
    assert views.of_student(STUDENT) is small
    assert views.of_student(EMA) is small
    assert views.of_teacher("dino", (48, 48)) is large
    assert not views.are_shifted
    assert views.shift("dino") is None
    with pytest.raises(KeyError):
        views.of_teacher("dino", (64, 64))  # never another's view, resized
