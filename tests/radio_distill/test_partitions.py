"""Every image of a step is run exactly once, with its weight, whoever runs it."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radio_distill.config import PartitionConfig, StageConfig
from radio_distill.partitions import images_per_step, partitions_of, share_out

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


def stage_of(partitions) -> StageConfig:
    return StageConfig(
        partitions=tuple(
            PartitionConfig(name=f"p{i}", teachers=("t",), **values)
            for i, values in enumerate(partitions)
        )
    )


@given(st.lists(PARTITION, min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 7))
def test_share_out__each_image_once_with_its_weight(values, world_size, micro_batch):
    stage = stage_of(values)
    partitions = partitions_of(stage)
    ranks = share_out(partitions, world_size, micro_batch)

    assert len({len(batches) for batches in ranks}) == 1, "ranks must keep pace"
    seen: Counter[int] = Counter()
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.partition.start <= batch.start < batch.stop
        assert batch.stop <= batch.partition.start + batch.partition.batch_size
        assert not micro_batch or batch.stop - batch.start <= micro_batch
        if batch.image_weight:
            seen.update(range(batch.start, batch.stop))
            assert batch.image_weight == batch.partition.image_weight
    assert seen == Counter(range(images_per_step(stage)))


@given(st.lists(PARTITION, min_size=1, max_size=4))
def test_partitions_of__shares_sum_to_one(values):
    partitions = partitions_of(stage_of(values))
    assert sum(p.share for p in partitions) == pytest.approx(1)
    assert sum(p.image_weight * p.batch_size for p in partitions) == pytest.approx(1)


@given(st.lists(PARTITION, min_size=2, max_size=4), st.integers(0, 5))
def test_share_out__enough_ranks_means_ranks_of_their_own(values, extra):
    partitions = partitions_of(stage_of(values))
    ranks = share_out(partitions, len(partitions) + extra)
    for batches in ranks:
        assert len({b.partition.name for b in batches if b.image_weight}) <= 1


def test_share_out__ranks_go_where_the_work_is():
    # `high` has four times the pixels of `low`.
    low = {"batch_size": 32, "size": 256, "weight": 1.0, "ranks": 0}
    high = {
        "batch_size": 8,
        "size": 1024,
        "weight": 1.0,
        "ranks": 0,
    }
    counts = Counter(
        batches[0].partition.name for batches in share_out(partitions_of(stage_of([low, high])), 10)
    )
    assert counts == {"p0": 2, "p1": 8}


def test_share_out__given_shares_of_ranks():
    one = {"batch_size": 32, "size": 256, "weight": 1.0, "ranks": 3}
    other = {"batch_size": 8, "size": 1024, "weight": 1.0, "ranks": 1}
    counts = Counter(
        batches[0].partition.name for batches in share_out(partitions_of(stage_of([one, other])), 8)
    )
    assert counts == {"p0": 6, "p1": 2}
