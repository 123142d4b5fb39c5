"""Draws are functions of seed and step, and stay within what the recipe allows."""

from collections import Counter

import pytest
import torch

from radio_distill.config import AugmentationConfig, PartitionConfig
from radio_distill.partitions import MicroBatch, Partition, Pass
from radio_distill.train.draws import Draws
from radio_distill.views import AVERAGE, STUDENT


def partition_of(*sizes) -> Partition:
    config = PartitionConfig(name="low", sizes=sizes, teachers=("dino",), batch_size=8)
    return Partition(config, 0, 1.0)


def draws_of(seed=1, images=8, **augmentation) -> Draws:
    return Draws(seed, AugmentationConfig(**augmentation), images, 16)


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


def test_views__an_image_has_the_same_crops_in_any_micro_batch():
    partition, draws = partition_of(64), draws_of(shift=3)
    item = Pass(partition, (64, 64), 1.0)
    pixels = torch.rand(8, 3, 64 + draws.margin, 64 + draws.margin)
    whole = draws.views(5, MicroBatch(0, 8, (item,)), item, pixels)
    part = draws.views(5, MicroBatch(2, 5, (item,)), item, pixels[2:5])
    for name in (STUDENT, AVERAGE):
        assert torch.equal(whole.of_student(name)[2:5], part.of_student(name))
    assert torch.equal(whole.of_teacher("dino")[2:5], part.of_teacher("dino"))
    shifts = whole.shift("dino") * 64 / 16
    assert torch.equal(shifts, shifts.round()), "whole patches"
    assert 1 <= shifts.abs().max() <= 3
    assert not torch.equal(shifts, whole.shift(AVERAGE) * 64 / 16), "each has its own crop"


def test_positions__rows_belong_to_images():
    item = Pass(partition_of(64), (64, 64), 1.0)
    whole = draws_of().positions(4, MicroBatch(0, 8, (item,)))
    assert torch.equal(whole[3:6], draws_of().positions(4, MicroBatch(3, 6, (item,))))
    assert not torch.equal(whole, draws_of().positions(5, MicroBatch(0, 8, (item,))))
