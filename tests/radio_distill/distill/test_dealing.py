"""Dealing leaves nothing over, cuts no unit, and lets no rank wait long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radio_distill.distill.micro_batches import SLACK, deal

GROUPS = st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 100)), min_size=1, max_size=6)


@given(GROUPS, st.integers(1, 70))
def test_deal__all_units_and_no_rank_more_than_a_unit_above_the_mean(groups, ranks):
    units, costs = [list(column) for column in zip(*groups, strict=True)]
    dealt = deal(units, costs, ranks)
    assert [sum(group) for group in dealt] == units
    assert min(min(group) for group in dealt) >= 0
    loads = [
        sum(group[rank] * cost for group, cost in zip(dealt, costs, strict=True))
        for rank in range(ranks)
    ]
    mean = sum(loads) / ranks
    assert max(loads) <= max(mean * (1 + SLACK), mean + max(costs)) * (1 + 1e-6)
    assert deal(units, costs, ranks) == dealt


@pytest.mark.parametrize(
    ("units", "costs", "expected"),
    [
        ([4, 4], [1.0, 1.0], [[4, 0], [0, 4]]),  # a rank serves one group where that is even
        ([2, 6], [3.0, 1.0], [[2, 0], [0, 6]]),
        ([1, 6], [4.0, 1.0], [[1, 0], [1, 5]]),  # and two where it is not
    ],
)
def test_deal__cuts_up_few_groups(units, costs, expected):
    assert deal(units, costs, 2) == expected
