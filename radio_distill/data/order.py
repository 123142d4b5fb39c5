"""The order of the samples: a pure function of seed and position.

The position is one whole number, the images that training has used up so far. A run is resumed, or
shared out over any number of processes, by counting; there is no state to save.

* Within a source, every epoch has each sample once: shards are permuted, then samples are shuffled
  within windows of a few consecutive shards, so that reading stays local.
* Images of a partition, or of some steps, may come from one source alone (:class:`StepLayout`).
* Sources with weights are interleaved evenly (:func:`split_position`), and each keeps its own order
  and its own epochs, so a small source comes round more often.

Permutations sort raw output of Philox, which numpy promises never to change, unlike its
``Generator.permutation``: a run resumed with another numpy goes on in the same order.
"""

import heapq
import itertools
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple, TypeVar

import numpy as np

_SHARDS, _WINDOW, _SUBSTITUTE, _VIEW = range(4)  # what a stream of random numbers is for
_WORD = (1 << 64) - 1

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Location(NamedTuple):
    """One sample of one shard, both by number."""

    shard: int
    sample: int


def random_stream(*key: int) -> np.random.Philox:
    """Make a stream of random numbers that depends on ``key`` alone."""
    # SeedSequence fills up with zeros, so the length is part of what it is given. A list of numbers
    # would take it three times as long.
    words = np.array([len(key), *(part & _WORD for part in key)], dtype=np.uint64)
    return np.random.Philox(np.random.SeedSequence(words.view(np.uint32)))


def view_generator(seed: int, position: int) -> np.random.Generator:
    """Make the generator of the random view at a position."""
    return np.random.Generator(random_stream(_VIEW, seed, position))


def _counts_before(position: int, shares: Sequence[Fraction]) -> list[int]:
    """Return how many of the positions before one each source has, see :func:`split_position`."""
    counts = []
    for share in shares:
        counts.append(position * share.numerator // share.denominator)
        position -= counts[-1]
    return counts


def split_position(position: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """Return (source, index within it) of a position of the interleaved whole.

    Of the first p positions, source 0 has floor(p * shares[0]); of the rest, source 1 has its
    share, and so on. So counts are exact at all times to less than one image for each source before
    it, without a table. ``shares[i]`` is weight i over the sum of weights i, i + 1, …
    """
    for source, share in enumerate(shares):
        before = position * share.numerator // share.denominator
        if (position + 1) * share.numerator // share.denominator > before:
            return source, before
        position -= before
    raise AssertionError("the last share is 1, so some source takes the position")


class SourceOrder:
    """The order of one source.

    Args:
        counts: samples in each of its shards.
        window: shards whose samples are shuffled together.
        key: what the order depends on, besides the epoch: seed and number of the source.
    """

    def __init__(self, counts: Sequence[int], window: int, key: tuple[int, ...]):
        self._counts = np.asarray(counts, dtype=np.int64)
        self._starts = _starts(self._counts)
        self._window, self._key = window, key
        self.num_samples = int(self._counts.sum())
        self._epochs: dict[int, tuple[np.ndarray, list[int]]] = {}
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def at(self, position: int) -> Location:
        """Return the sample at a position, counted over all epochs."""
        epoch, rest = divmod(position, self.num_samples)
        shards, window_starts = _cached(self._epochs, epoch, 2, lambda: self._shards(epoch))
        window = bisect_right(window_starts, rest) - 1
        first = window * self._window
        members = shards[first : first + self._window]
        starts = _starts(self._counts[members])
        shuffled = _cached(
            self._windows,
            (epoch, window),
            4,
            lambda: _permutation(starts[-1], _WINDOW, *self._key, epoch, window),
        )
        place = _locate(int(shuffled[rest - window_starts[window]]), starts)
        return Location(int(members[place.shard]), place.sample)

    def windows_from(self, position: int) -> Iterator[tuple[int, list[int]]]:
        """Yield the windows of shards from that at a position on, and where each begins."""
        for epoch in itertools.count(position // self.num_samples):
            shards, starts = self._shards(epoch)
            begin = epoch * self.num_samples
            first = max(0, bisect_right(starts, position - begin) - 1)
            for window in range(first, len(starts)):
                members = shards[window * self._window :][: self._window]
                if len(members):  # the last start may be the end
                    yield begin + starts[window], members.tolist()

    def any(self, *draw: int) -> Location:
        """Return a random sample, by a draw that ``draw`` names."""
        number = int(random_stream(_SUBSTITUTE, *self._key, *draw).random_raw())
        return _locate(number % self.num_samples, self._starts)

    def _shards(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """Return the shards in the order of an epoch, and the position where each window starts."""
        shards = _permutation(len(self._counts), _SHARDS, *self._key, epoch)
        return shards, _starts(self._counts[shards])[:: self._window]


@dataclass(frozen=True)
class StepLayout:
    """Which images of each step come from one source alone."""

    images: int = 1
    """Of a step."""
    own: tuple[tuple[int, int, int], ...] = ()
    """(start, stop, source): images [start, stop) of each step come from a source."""
    homogeneous: tuple[tuple[int, float], ...] = ()
    """(source, share): in that share of the steps all other images come from it."""

    @property
    def mixed(self) -> int:
        """Images of a step that have no source of their own."""
        return self.images - sum(stop - start for start, stop, _ in self.own)


class _Stream(NamedTuple):
    """An order of one source's samples, for the images that come from it in one of the ways."""

    order: SourceOrder
    first_shard: int
    """Number of the source's first shard among those of all sources."""
    rate: Fraction
    """Its images for each image of the whole."""


class SampleOrder:
    """The order of all sources together; shards are numbered through.

    Images that a :class:`StepLayout` takes from one source are an order of their own over it, with
    epochs of their own; so are its homogeneous steps, which come evenly between the others.

    Args:
        counts: for each source, the samples in each of its shards.
        weights: share of each source; empty makes all of them one source.
        layout: of a step, where some images come from one source.
    """

    def __init__(
        self,
        counts: Sequence[Sequence[int]],
        *,
        weights: Sequence[float] = (),
        seed: int,
        window: int,
        layout: StepLayout | None = None,
    ):
        if not weights:
            counts, weights = [[count for source in counts for count in source]], [1.0]
        first_shard = [0, *accumulate(len(source) for source in counts)]
        self.num_samples = sum(map(sum, counts))
        self._layout = layout = layout or StepLayout()
        # 0.1 is meant as a tenth.
        pure = [Fraction(repr(share)) for _, share in layout.homogeneous]
        self._turns = _remaining([*pure, Fraction(1) - sum(pure)])
        self._shares = _remaining([Fraction(repr(weight)) for weight in weights])

        def stream(source: int, images: Fraction, *key: int) -> _Stream:
            order = SourceOrder(counts[source], window, (seed, source, *key))
            return _Stream(order, first_shard[source], images / layout.images)

        self._own = [
            stream(source, Fraction(stop - start), 1, number)
            for number, (start, stop, source) in enumerate(layout.own)
        ]
        sources = [source for source, _ in layout.homogeneous]
        self._pure = [
            stream(source, share * layout.mixed, 2, number)
            for number, (source, share) in enumerate(zip(sources, pure, strict=True))
        ]
        left = (Fraction(1) - sum(pure)) * layout.mixed
        self._mixture = []
        for source, share in enumerate(self._shares):
            self._mixture.append(stream(source, left * share))
            left -= left * share

    def at(self, position: int) -> Location:
        """Return the sample at a position."""
        stream, index = self._place(position)
        return _numbered(stream, stream.order.at(index))

    def substitute(self, position: int, attempt: int) -> Location:
        """Return another sample of the same source, for a position whose sample is bad."""
        stream, _ = self._place(position)
        return _numbered(stream, stream.order.any(position, attempt))

    def shards_from(self, position: int) -> Iterator[int]:
        """Yield shards in the order in which they are needed from a position on, without end.

        Streams are merged by the positions where their windows begin.
        """
        needs = [_needs(stream, index) for stream, index in self._from(position) if stream.rate]
        return (shard for _, shard in heapq.merge(*needs))

    def _place(self, position: int) -> tuple[_Stream, int]:
        """Return the stream that a position belongs to, and the index within it."""
        step, offset = divmod(position, self._layout.images)
        before = 0  # images of the step with a source of their own
        for stream, (start, stop, _) in zip(self._own, self._layout.own, strict=True):
            if start <= offset < stop:
                return stream, step * (stop - start) + offset - start
            before += stop - start if stop <= offset else 0
        turn, nth = split_position(step, self._turns)
        index = nth * self._layout.mixed + offset - before
        if turn < len(self._pure):
            return self._pure[turn], index
        source, index = split_position(index, self._shares)
        return self._mixture[source], index

    def _from(self, position: int) -> Iterator[tuple[_Stream, int]]:
        """Yield each stream with an index that no later position is before."""
        step, offset = divmod(position, self._layout.images)
        for stream, (start, stop, _) in zip(self._own, self._layout.own, strict=True):
            inside = min(max(offset - start, 0), stop - start)
            yield stream, step * (stop - start) + inside
        *pure, mixed = (nth * self._layout.mixed for nth in _counts_before(step, self._turns))
        yield from zip(self._pure, pure, strict=True)
        yield from zip(self._mixture, _counts_before(mixed, self._shares), strict=True)


def _needs(stream: _Stream, index: int) -> Iterator[tuple[float, int]]:
    """Yield the shards of a stream from an index on, and about which position needs each."""
    for begin, members in stream.order.windows_from(index):
        for member in members:
            yield begin / float(stream.rate), stream.first_shard + member


def _numbered(stream: _Stream, place: Location) -> Location:
    return Location(stream.first_shard + place.shard, place.sample)


def _remaining(weights: Sequence[Fraction]) -> list[Fraction]:
    """Return each weight over the sum of itself and those behind it; 0 where all of them are 0."""
    return [weight / (sum(weights[i:]) or 1) for i, weight in enumerate(weights)]


def _permutation(count: int, *key: int) -> np.ndarray:
    return np.argsort(random_stream(*key).random_raw(count), kind="stable")


def _starts(counts: np.ndarray) -> list[int]:
    """Return where each shard starts, and at the end the sum."""
    return [0, *np.cumsum(counts).tolist()]


def _locate(index: int, starts: list[int]) -> Location:
    shard = bisect_right(starts, index) - 1
    return Location(shard, index - starts[shard])


def _cached(cache: dict[Key, Value], key: Key, limit: int, make: Callable[[], Value]) -> Value:
    if key not in cache:
        if len(cache) >= limit:
            del cache[next(iter(cache))]
        cache[key] = make()
    return cache[key]
