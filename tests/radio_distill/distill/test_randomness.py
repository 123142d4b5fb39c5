"""StepRandomness are functions of seed and step, and stay within what the recipe allows."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from radio_distill.config import AugmentationConfig, size_pair
from radio_distill.distill.micro_batches import MicroBatch, Pass
from radio_distill.distill.randomness import StepRandomness
from radio_distill.distill.views import EMA, STUDENT
from radio_distill.stage import Partition
from radio_distill.teacher_view import TeacherView
from radio_distill.types import View


def partition_of(*sizes) -> Partition:
    return Partition("low", 0, 1.0, 8, tuple(map(size_pair, sizes)), ("dino",))


def draws_of(seed=1, images=8, **augmentation) -> StepRandomness:
    return StepRandomness(seed, AugmentationConfig(**augmentation), images, 16)


def test_sizes__every_size_is_drawn_alike_and_in_the_same_order_again():
    partition, draws = partition_of(64, (64, 96), 128), draws_of()
    drawn = [draws.sizes(step, [partition])["low"] for step in range(900)]
    assert all(count == pytest.approx(300, abs=60) for count in Counter(drawn).values())
    assert set(drawn) == {(64, 64), (64, 96), (128, 128)}
    assert drawn == [draws_of().sizes(step, [partition])["low"] for step in range(900)]
    assert drawn != [draws_of(seed=2).sizes(step, [partition])["low"] for step in range(900)]


def test_window__tiles_the_grid_on_the_wanted_share_of_steps():
    item = Pass(partition_of(432), (432, 432), 1.0)  # 27 cells: windows of 9 and 27
    draws = draws_of(window_share=0.25)
    drawn = Counter(draws.window(step, item) for step in range(2000))
    assert set(drawn) == {0, 9, 27}
    assert drawn[0] == pytest.approx(1500, abs=100)
    assert draws_of().window(3, item) == 0
    prime = Pass(partition_of(272), (272, 176), 1.0)  # 17 x 11 cells
    assert {draws_of(window_share=1).window(step, prime) for step in range(20)} == {0}


SIZES = {STUDENT: (64, 64), EMA: (64, 64), "dino": (96, 96)}


def test_renderings__an_image_has_the_same_crops_in_any_micro_batch():
    item, draws = Pass(partition_of(64), (64, 64), 1.0), draws_of(shift=3)
    whole = draws.renderings(5, MicroBatch(0, 8, (item,)), item, SIZES)
    part = draws.renderings(5, MicroBatch(2, 5, (item,)), item, SIZES)
    assert {view.crop: view.size for view in whole} == {f"low/{n}": s for n, s in SIZES.items()}
    for view, crops in whole.items():
        assert np.array_equal(crops[2:5], part[view])
        assert (crops[:, :2] + crops[:, 2:] <= 1).all(), "within the view"
    height, width = draws.shape((64, 64))
    corners = whole[View((96, 96), "low/dino")][:, :2] * (height, width) / 16
    assert np.allclose(corners, corners.round()), "whole patches of the student"


def test_views__shifts_are_the_distances_of_the_crops():
    item, draws = Pass(partition_of(64), (64, 64), 1.0), draws_of(shift=3)
    micro = MicroBatch(0, 8, (item,))
    crops = draws.renderings(5, micro, item, SIZES)
    shown = draws.views(5, micro, item, {view: torch.rand(8, 3, *view.size) for view in crops})
    shifts = shown.shift("dino") * 64 / 16
    assert torch.equal(shifts, shifts.round()), "whole patches"
    assert 1 <= shifts.abs().max() <= 3
    assert not torch.equal(shifts, shown.shift(EMA) * 64 / 16), "each has its own crop"
    student, dino = crops[View((64, 64), f"low/{STUDENT}")], crops[View((96, 96), "low/dino")]
    apart = (student - dino)[:, :2] * draws.shape((64, 64)) / 64
    assert np.allclose(apart, shown.shift("dino").numpy(), atol=1e-6)


def test_renderings__without_shift_each_size_once():
    item = Pass(partition_of(64), (64, 64), 1.0)
    views = draws_of().renderings(5, MicroBatch(0, 8, (item,)), item, SIZES)
    assert views == {View((64, 64)): None, View((96, 96)): None}


def test_positions__rows_belong_to_images():
    item = Pass(partition_of(64), (64, 64), 1.0)
    whole = draws_of().positions(4, MicroBatch(0, 8, (item,)))
    assert torch.equal(whole[3:6], draws_of().positions(4, MicroBatch(3, 6, (item,))))
    assert not torch.equal(whole, draws_of().positions(5, MicroBatch(0, 8, (item,))))


def test_student__no_teacher_can_have_its_name():
    assert not STUDENT.isidentifier()
    assert not EMA.isidentifier()


def test_sizes__a_teachers_is_drawn_whatever_the_students():
    """EUPE's last stage: all nine pairs of 256, 384 and 512 come equally often."""
    sides = [(256, 256), (384, 384), (512, 512)]
    views = {side: TeacherView("dino", side, (1, 1)) for side in sides}
    partition = replace(
        partition_of(256, 384, 512), drawn={(side, "dino"): views for side in sides}
    )
    draws = draws_of()
    drawn = [draws.sizes(step, [partition]) for step in range(900)]
    pairs = Counter((sizes["low"], sizes["low/dino"]) for sizes in drawn)
    assert len(pairs) == 9
    assert all(count == pytest.approx(100, abs=40) for count in pairs.values())
    assert partition.views_drawn(drawn[0]) == {"dino": views[drawn[0]["low/dino"]]}


def test_survivors__of_each_image_however_the_step_is_cut():
    partition = replace(partition_of(64), batch_size=400, teachers=("a", "b", "c"), start=100)
    draws, item = draws_of(images=500), Pass(partition, (64, 64), 1.0)
    whole = draws.survivors(3, MicroBatch(100, 500, (item,)), item, 0.25)
    assert whole.others.shape == (2, 400)
    assert float(whole.others.float().mean()) == pytest.approx(0.75, abs=0.06)
    assert whole.scale == pytest.approx(400 / (400 + int(whole.others.sum())))
    part = draws.survivors(3, MicroBatch(150, 180, (item,)), item, 0.25)
    assert part.scale == whole.scale
    assert torch.equal(part.others, whole.others[:, 50:80])
