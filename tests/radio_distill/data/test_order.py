from collections import Counter
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_distill.data.order import (
    Location,
    SampleOrder,
    StepLayout,
    random_stream,
    split_position,
    view_generator,
)

counts_of_shards = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@settings(max_examples=40)
@given(counts_of_shards, st.integers(1, 14), st.integers(0, 1 << 65), st.integers(0, 50))
def test_sample_order__every_epoch_has_every_sample_once(counts, window, seed, epoch):
    order = SampleOrder([counts], seed=seed, window=window)
    expected = {Location(shard, i) for shard, count in enumerate(counts) for i in range(count)}
    assert order.num_samples == len(expected)
    start = epoch * order.num_samples
    for first in (start, start + order.num_samples):
        found = [order.at(p) for p in range(first, first + order.num_samples)]
        assert len(set(found)) == len(found)
        assert set(found) == expected


@settings(max_examples=25)
@given(counts_of_shards, st.integers(1, 5), st.integers(0, 200))
def test_shards_from__names_every_shard_before_or_when_it_is_needed(counts, window, position):
    order = SampleOrder([counts], seed=5, window=window)
    coming = list(dict.fromkeys(islice(order.shards_from(position), 4 * len(counts))))
    needed = list(dict.fromkeys(order.at(position + i).shard for i in range(order.num_samples)))
    assert needed[0] in coming[:window]
    assert window > 1 or coming[: len(needed)] == needed
    for number, shard in enumerate(needed):
        assert coming.index(shard) < number + 2 * window, "those of a window come together"


def test_shards_from__sources_come_as_their_weights_have_them():
    order = SampleOrder([[4] * 30, [4] * 30], weights=[0.75, 0.25], seed=0, window=1)
    for position in (0, 37, 500):
        coming = list(islice(order.shards_from(position), 24))
        needed = {order.at(position + i).shard for i in range(60)}
        assert needed <= set(coming)
        assert abs(sum(shard < 30 for shard in coming) - 18) <= 2


@settings(max_examples=25)
@given(counts_of_shards, st.integers(1, 5), st.permutations(range(60)))
def test_sample_order__depends_on_position_alone(counts, window, positions):
    order = SampleOrder([counts], seed=3, window=window)
    visited = {position: order.at(position) for position in positions}  # caches come and go
    fresh = SampleOrder([counts], seed=3, window=window)
    assert all(fresh.at(position) == visited[position] for position in range(60))


def test_sample_order__epochs_and_seeds_differ():
    def epoch(seed, number):
        order = SampleOrder([[20, 20, 20]], seed=seed, window=2)
        return [order.at(number * 60 + i) for i in range(60)]

    runs = [epoch(0, 0), epoch(0, 1), epoch(1, 0), epoch(1 << 32, 0)]
    assert all(a != b for i, a in enumerate(runs) for b in runs[:i])


def test_sample_order__shuffles_within_windows_of_shards():
    order = SampleOrder([[50] * 6], seed=0, window=2)
    places = [order.at(position) for position in range(300)]
    for first in (0, 100, 200):
        part = places[first : first + 100]
        assert len({place.shard for place in part}) == 2
        assert [place.shard for place in part] != sorted(place.shard for place in part)


def test_sample_order__shards_meet_in_other_windows_every_epoch():
    order = SampleOrder([[5] * 8], seed=0, window=2)
    firsts = {frozenset(order.at(40 * epoch + i).shard for i in range(10)) for epoch in range(6)}
    assert len(firsts) > 3


def test_sample_order__first_samples_stay_for_ever():
    # A run that was saved must be resumed in this order, whatever changes in this project or numpy.
    order = SampleOrder([[3, 4], [5]], weights=(0.75, 0.25), seed=7, window=2)
    expected = [(2, 1), (0, 1), (0, 2), (1, 2), (2, 3), (1, 3), (0, 0), (1, 1)]
    assert [order.at(position) for position in range(8)] == expected
    assert view_generator(7, 1).random() == 0.48876717566722405


def test_sample_order__is_uniform():
    order = SampleOrder([[4, 4]], seed=0, window=2)
    firsts = [order.at(8 * epoch) for epoch in range(4000)]
    counts = np.array([firsts.count(Location(i // 4, i % 4)) for i in range(8)])
    assert ((counts - 500) ** 2 / 500).sum() < 24.3  # chi squared, 7 degrees, p = 0.001


@settings(max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 10**12))
def test_split_position__is_exact_at_all_times(weights, start):
    shares = [Fraction(weight, sum(weights[i:])) for i, weight in enumerate(weights)]
    nexts = {}
    for position in range(start, start + 100):
        source, index = split_position(position, shares)
        assert index == nexts.get(source, index), "each source goes on without gaps"
        nexts[source] = index + 1
        expected = Fraction(weights[source] * position, sum(weights))
        assert abs(index - expected) < source + 1


def test_sample_order__weights_are_exact_and_sources_keep_their_epochs():
    order = SampleOrder([[10, 10], [5]], weights=(0.95, 0.05), seed=0, window=2)
    places = [order.at(position) for position in range(2000)]
    small = [place.sample for place in places if place.shard == 2]
    large = [place for place in places if place.shard < 2]
    for first in range(0, 2000, 20):
        assert sum(place.shard == 2 for place in places[first : first + 20]) == 1
    for first in range(0, len(small), 5):
        assert sorted(small[first : first + 5]) == [0, 1, 2, 3, 4]
    for first in range(0, len(large) - 19, 20):
        assert len(set(large[first : first + 20])) == 20


def test_sample_order__a_source_keeps_its_order_when_weights_change():
    def first_source(weights):
        order = SampleOrder([[10, 10], [5]], weights=weights, seed=0, window=2)
        return [place for place in map(order.at, range(400)) if place.shard < 2][:100]

    assert first_source((0.5, 0.5)) == first_source((0.9, 0.1))


def test_sample_order__without_weights_all_images_count_alike():
    order = SampleOrder([[10], [30]], seed=0, window=2)
    places = [order.at(position) for position in range(40)]
    assert sum(place.shard == 0 for place in places) == 10


def test_substitute__is_fixed_and_stays_in_the_source():
    order = SampleOrder([[6, 4], [5]], weights=(0.5, 0.5), seed=0, window=1)
    drawn = {}
    for position in range(200):
        for attempt in (1, 2):
            place = order.substitute(position, attempt)
            assert place == order.substitute(position, attempt)
            assert (place.shard == 2) == (order.at(position).shard == 2)
            drawn[place] = drawn.get(place, 0) + 1
    assert len(drawn) == 15
    assert any(order.substitute(p, 1) != order.substitute(p, 2) for p in range(5))


def test_random_stream__keys_do_not_run_together():
    keys = [(0, 1), (1, 0), (1 << 32,), (1,), (0, 0, 1), (1 << 32, 0), (-1,), (0,)]
    draws = [int(random_stream(*key).random_raw()) for key in keys]
    assert len(set(draws)) == len(draws)


SOURCES = [[4, 3], [5], [2, 2, 2]]
LAYOUT = StepLayout(10, own=((2, 5, 1), (7, 8, 2)), homogeneous=((2, 0.1), (0, 0.25)))


def source_of(place: Location) -> int:
    return 0 if place.shard < 2 else 1 if place.shard == 2 else 2


def with_layout(layout=LAYOUT, weights=(3, 1, 0)) -> SampleOrder:
    return SampleOrder(SOURCES, weights=weights, seed=4, window=2, layout=layout)


def test_layout__images_of_a_step_with_a_source_of_their_own_have_its_epochs():
    order = with_layout()
    places = [order.at(10 * step + offset) for step in range(20) for offset in (2, 3, 4)]
    for first in range(0, 60, 5):
        assert {place.sample for place in places[first : first + 5]} == set(range(5))
    assert {place.shard for place in places} == {2}
    assert {source_of(order.at(10 * step + 7)) for step in range(20)} == {2}


def test_layout__a_share_of_the_steps_is_of_one_source_and_the_others_are_mixed():
    order = with_layout()
    rest = [offset for offset in range(10) if offset not in (2, 3, 4, 7)]
    steps = [[source_of(order.at(10 * step + at)) for at in rest] for step in range(400)]
    pure = Counter(sources[0] for sources in steps if len(set(sources)) == 1)
    assert pure[2] == 40, "a tenth; in the mixture its weight is 0"
    mixed = Counter(source for sources in steps for source in sources)
    assert mixed[1] == pytest.approx(400 * 6 * 0.65 / 4, abs=6)
    assert mixed[0] == 400 * 6 - mixed[1] - mixed[2]
    # Of the homogeneous steps of a source each epoch has each sample once.
    of_2 = [step for step, sources in enumerate(steps) if set(sources) == {2}]
    places = [order.at(10 * step + at) for step in of_2 for at in rest]
    assert all(count == 40 for count in Counter(places).values())
    assert len(set(places)) == 6


def test_layout__without_sources_of_their_own_changes_nothing():
    plain = SampleOrder(SOURCES, weights=(3, 1, 2), seed=4, window=2)
    order = with_layout(StepLayout(7), (3, 1, 2))
    assert [order.at(i) for i in range(200)] == [plain.at(i) for i in range(200)]
    coming = islice(zip(order.shards_from(35), plain.shards_from(35), strict=False), 50)
    assert all(one == other for one, other in coming)


@given(st.integers(0, 500))
def test_layout__shards_come_before_or_when_they_are_needed(position):
    order = with_layout()
    coming = set(islice(order.shards_from(position), 40))
    assert {order.at(position + i).shard for i in range(60)} <= coming


def test_layout__a_substitute_is_of_the_same_source():
    order = with_layout()
    for position in range(200):
        wanted = source_of(order.at(position))
        assert source_of(order.substitute(position, 1)) == wanted
