"""Every image of a step is run exactly once, with its weight, whoever runs it."""

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radio_distill.config import (
    DataConfig,
    EngineConfig,
    PartitionConfig,
    Recipe,
    StageConfig,
    TeacherConfig,
)
from radio_distill.distill.micro_batches import assign_micro_batches, teachers_of
from radio_distill.stage import ImageWork, Stage, resolve_stage
from radio_distill.system.distributed import World
from radio_distill.teacher_view import Mosaic
from radio_distill.types import TeacherSpec

PARTITION = st.builds(
    lambda batch, size, weight, ranks: {
        "batch_size": batch,
        "size": 16 * size,
        "weight": weight,
        "ranks": ranks,
    },
    st.integers(1, 40),
    st.integers(1, 8),
    st.floats(0.1, 10),
    st.integers(0, 3),
)


def largest_sizes(partitions):
    return {item.name: max(item.sizes, key=math.prod) for item in partitions}


SPEC = TeacherSpec("t", 8, 8, 16, (32, 32), None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TALL = replace(SPEC, name="u", native_size=(16, 16))


def stage_of(partitions, micro_batch=0, zero_stage=1) -> Stage:
    named = [
        PartitionConfig(**({"name": f"p{i}", "teachers": ("t",)} | values))
        for i, values in enumerate(partitions)
    ]
    recipe = Recipe(
        name="any",
        data=DataConfig(shards=("none",)),
        teachers={name: TeacherConfig(preset="x") for name in ("t", "u")},
        stages={"stage1": StageConfig(partitions=tuple(named))},
        engine=EngineConfig(micro_batch=micro_batch, zero_stage=zero_stage),
    )
    return resolve_stage(recipe, "stage1", {"t": SPEC, "u": TALL})


@given(
    st.lists(PARTITION, min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(0, 7),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 3),
)
def test_share_out__each_image_once_with_its_weight(values, world_size, limit, unit, shared, zero):
    if shared:  # one more partition that shows the first one's images
        twin = {"name": "twin", "size": 256, "images_of": "p0", "weight": 2.0}
        values = [*values, values[0] | twin]
    stage = stage_of(values, limit, zero)
    partitions = stage.partitions
    for view in partitions[0].views.values():  # some of its images share a canvas
        view["t"] = replace(view["t"], mosaic=Mosaic((16, 16 * unit), (16, 16), 16))
    ranks = assign_micro_batches(stage, largest_sizes(partitions), world_size)

    counts = {passes_of(work) for work in ranks}
    assert min(counts) >= 1
    if zero >= 2:
        assert len(counts) == 1, "ranks run equally many passes"
    for work in ranks if zero < 2 else ():
        has_padding = any(item.is_padding for micro in work for item in micro.passes)
        assert not has_padding or passes_of(work) == 1, "only where there is no image"
    seen = {partition.name: Counter() for partition in partitions}
    for micro in (micro for work in ranks for micro in work):
        for item in micro.passes:
            partition = item.partition
            assert partition.start <= micro.start < micro.stop
            assert micro.stop <= partition.start + partition.batch_size
            if not item.image_weight:
                continue
            together = unit if partition.name in ("p0", "twin") else 1
            assert not limit or micro.stop - micro.start <= max(limit, together)
            assert (micro.start - partition.start) % together == 0, "canvases are never parted"
            seen[partition.name].update(range(micro.start, micro.stop))
            assert item.image_weight == partition.image_weight
    for partition in partitions:
        images = range(partition.start, partition.start + partition.batch_size)
        assert seen[partition.name] == Counter(images)
    if not shared:
        assert sum(seen.values(), Counter()) == Counter(range(stage.images_per_step))


def passes_of(work) -> int:
    return sum(len(micro.passes) for micro in work)


@given(st.lists(PARTITION, min_size=1, max_size=4))
def test_partitions__shares_sum_to_one(values):
    partitions = stage_of(values).partitions
    assert sum(p.share for p in partitions) == pytest.approx(1)
    assert sum(p.image_weight * p.batch_size for p in partitions) == pytest.approx(1)


def images_of(stage, ranks) -> list[Counter]:
    """The images of each partition that every rank runs."""
    counts = []
    for work in assign_micro_batches(stage, largest_sizes(stage.partitions), ranks):
        counts.append(Counter())
        for micro in work:
            for item in micro.passes:
                if item.image_weight:
                    counts[-1][item.partition.name] += micro.stop - micro.start
    return counts


def with_work(stage, *encoders) -> Stage:
    """A stage of partitions of 64 px, where an image costs 1 and its teacher what is given."""
    work = {
        (f"p{number}", (64, 64)): ImageWork(1.0, {teacher: cost})
        for number, (teacher, cost) in enumerate(encoders)
    }
    return replace(stage, work=work)


def test_share_out__by_pixels_where_nothing_was_counted():
    # An image of `p1` has 16 times the pixels of one of `p0`, and its teacher sees as many.
    low = {"batch_size": 32, "size": 64, "weight": 1.0, "teacher_sizes": {"t": 64}}
    high = {"batch_size": 8, "size": 256, "weight": 1.0, "teacher_sizes": {"t": 256}}
    counts = images_of(stage_of([low, high]), 5)
    assert Counter(frozenset(count.items()) for count in counts) == {
        frozenset({("p1", 2)}): 4,
        frozenset({("p0", 32)}): 1,
    }


def test_share_out__by_what_was_counted():
    stage = stage_of([{"batch_size": 12, "size": 64}, {"batch_size": 12, "size": 64}])
    work = {
        ("p0", (64, 64)): ImageWork(1.0, {"t": 1.0}),
        ("p1", (64, 64)): ImageWork(1.0, {"t": 3.0}),
    }
    counts = images_of(replace(stage, work=work), 3)
    assert sorted((count["p0"], count["p1"]) for count in counts) == [(0, 6), (0, 6), (12, 0)]


def test_share_out__given_shares_of_ranks():
    one = {"batch_size": 32, "size": 256, "weight": 1.0, "ranks": 3}
    other = {"batch_size": 8, "size": 1024, "weight": 1.0, "ranks": 1}
    counts = images_of(stage_of([one, other]), 8)
    assert Counter(name for count in counts for name in count) == {"p0": 6, "p1": 2}


def test_teachers_of__a_rank_runs_those_of_its_images():
    one, other = {"batch_size": 4, "size": 64}, {"batch_size": 4, "size": 64, "teachers": ("u",)}
    work = {
        ("p0", (64, 64)): ImageWork(1.0, {"t": 1.0}),
        ("p1", (64, 64)): ImageWork(1.0, {"u": 1.0}),
    }
    stage = replace(stage_of([one, other]), work=work)
    assert [teachers_of(stage, World(rank, 2)) for rank in range(2)] == [["t"], ["u"]]
    assert teachers_of(stage, World()) == ["t", "u"]
    drawn = {"size": 0, "sizes": (16, 32, 48, 64), "batch_size": 1}
    every = stage_of([drawn | {"teachers": ("u",)} for _ in range(5)])
    assert teachers_of(every, World(0, 2)) == ["u"], "1,024 draws are not looked at"


def test_share_out__partitions_of_the_same_images_stay_together():
    four = {"batch_size": 4, "size": 64}
    stage = stage_of([four, four, four | {"name": "twin", "size": 128, "images_of": "p0"}])
    ranks = assign_micro_batches(stage, largest_sizes(stage.partitions), 2)
    shared = [micro for work in ranks for micro in work if len(micro.passes) == 2]
    assert {micro.size for micro in shared} == {(128, 128)}
    assert [item for micro in shared for item in range(micro.start, micro.stop)] == [0, 1, 2, 3]
    assert stage.images_per_step == 8


def test_teacher_shares__parts_of_the_step():
    one = {"batch_size": 4, "size": 64, "weight": 1.0}
    shares = stage_of([one | {"teachers": ("t", "u")}, one, one]).teacher_shares()
    assert shares == {"t": pytest.approx(1), "u": pytest.approx(1 / 3)}
