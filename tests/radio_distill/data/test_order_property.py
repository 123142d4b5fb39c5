"""The order of data, for any shards, workers, processes and interruptions.

Through the real loader and real shards, of webdataset's own writer; nothing is simulated.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset import TarWriter

from radio_distill.config import DataConfig
from radio_distill.data.loader import ShardBatches, StepSlice, in_every_step
from radio_distill.types import ImageBatch, ViewOrigin

SIZE = (8, 8)
SHARED = [*HealthCheck]
"""Every example reads the same shards."""


@dataclass(frozen=True)
class Run:
    """What is to be trained on, and in how many steps."""

    counts: tuple[tuple[int, ...], ...]
    """Samples of each shard of each source."""
    weights: tuple[int, ...]
    batch: int
    seed: int
    window: int

    @property
    def totals(self) -> list[int]:
        """Samples of each source; without weights there is one source."""
        sums = [sum(source) for source in self.counts]
        return sums if self.weights else [sum(sums)]

    @property
    def steps(self) -> int:
        """Steps in which every source comes round more than twice, but no more than 40."""
        weights = self.weights or (1,)
        slowest = max(
            total * sum(weights) / weight
            for total, weight in zip(self.totals, weights, strict=True)
        )
        return min(40, int(2 * slowest / self.batch) + 2)


runs = st.builds(
    lambda counts, weighted, weights, batch, seed, window: Run(
        tuple(counts), tuple(weights[: len(counts)]) if weighted else (), batch, seed, window
    ),
    st.lists(
        st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), min_size=1, max_size=3
    ),
    st.booleans(),
    st.lists(st.integers(1, 4), min_size=3, max_size=3),
    st.integers(4, 12),
    st.integers(0, 1 << 40),
    st.integers(1, 4),
)
"""A global batch has at least one image for each of four processes."""

segments = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 4), st.just(0)), min_size=1, max_size=4
)
"""Steps until the run is stopped, processes, and workers of each."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Give patterns for the sources of a run; shards with the same samples are made once."""
    from io import BytesIO

    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("order")

    def image(*key: int) -> bytes:
        buffer = BytesIO()
        noise = np.random.default_rng(key).integers(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(noise).save(buffer, "PNG")
        return buffer.getvalue()

    def shard(source: int, number: int, count: int) -> str:
        path = root / f"{source}-{number}-of-{count}.tar"
        if not path.exists():
            with TarWriter(str(path)) as writer:
                for sample in range(count):
                    key = f"{source}_{number}_{sample}"
                    writer.write({"__key__": key, "png": image(source, number, sample)})
        return str(path)

    def patterns(run: Run) -> tuple[str, ...]:
        names = []
        for source, counts in enumerate(run.counts):
            paths = [shard(source, number, count) for number, count in enumerate(counts)]
            if not run.weights:
                names += paths
                continue
            folder = root / ("source-" + "-".join(Path(path).stem for path in paths))
            folder.mkdir(exist_ok=True)
            for path in paths:
                link = folder / Path(path).name
                if not link.exists():
                    link.hardlink_to(path)
            names.append(str(folder))
        return tuple(names)

    return patterns


def steps_of(
    run: Run, patterns: tuple[str, ...], ranks: int, workers: int, start: int, count: int
) -> list[list[ImageBatch]]:
    """For each step the batches of all ranks, each from a loader of its own."""
    config = DataConfig(
        shards=patterns,
        weights=tuple(map(float, run.weights)),
        workers=workers,
        shuffle_shards=run.window,
        min_size=1,
    )
    by_rank = []
    for rank in range(ranks):
        border = [run.batch * r // ranks for r in (rank, rank + 1)]
        slices = in_every_step([StepSlice(*border, SIZE)])
        source = ShardBatches(config, seed=run.seed, images_per_step=run.batch, slices=slices)
        stream = source.batches(start)
        by_rank.append([step[0] for step in islice(stream, count)])
        stream.close()
        assert source.bad == {}
    return [list(step) for step in zip(*by_rank, strict=True)]


def images_of(steps: list[list[ImageBatch]]) -> Iterator[tuple[str, ViewOrigin, torch.Tensor]]:
    for step in steps:
        for batch in step:
            yield from zip(batch.keys, batch.origins, batch.pixels, strict=True)


def assert_exactly_once(run: Run, keys: list[str]) -> None:
    """Every epoch of every source has each of its samples once."""
    for source, total in enumerate(run.totals):
        own = [key for key in keys if not run.weights or key.startswith(f"{source}-")]
        for first in range(0, len(own) - total + 1, total):
            assert len(set(own[first : first + total])) == total
        rest = own[len(own) // total * total :]
        assert len(set(rest)) == len(rest)
        names = {
            f"{s}-{n}-of-{count}.tar:{s}_{n}_{i}.png"
            for s, counts in enumerate(run.counts)
            if s == source or not run.weights
            for n, count in enumerate(counts)
            for i in range(count)
        }
        assert set(own) <= names
        assert len(own) < total or set(own[:total]) == names


def check(run: Run, patterns, parts: list[tuple[int, int, int]]) -> None:
    """Compare a run with interruptions with one without."""
    whole = steps_of(run, patterns, 1, 0, 0, run.steps)
    assert_exactly_once(run, [key for key, _, _ in images_of(whole)])
    step = 0
    for count, ranks, workers in [*parts, (run.steps, 1, 0)]:
        count = min(count, run.steps - step)
        part = steps_of(run, patterns, ranks, workers, step, count)
        for mine, theirs in zip(part, whole[step : step + count], strict=True):
            assert Counter(k for batch in mine for k in batch.keys) == Counter(theirs[0].keys)
        for mine, theirs in zip(
            images_of(part), images_of(whole[step : step + count]), strict=True
        ):
            assert mine[:2] == theirs[:2]
            assert torch.equal(mine[2], theirs[2])
        step += count
    assert step == run.steps


@settings(max_examples=50, suppress_health_check=SHARED)
@given(runs, segments)
def test_order__any_run_any_interruption(shards, run, parts):
    check(run, shards(run), parts)


@settings(max_examples=20, suppress_health_check=SHARED)
@given(runs, st.integers(1, 4))
def test_order__interrupted_at_the_border_of_an_epoch(shards, run, ranks):
    epoch = run.totals[0] // run.batch
    parts = [(max(0, epoch - 1), ranks, 0), (1, 1, 0), (1, ranks, 0)]
    check(run, shards(run), parts)


@pytest.mark.parametrize(
    ("workers", "ranks", "weights"), [(1, 2, ()), (2, 3, (3, 1)), (3, 1, (1, 2)), (4, 1, ())]
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_order__with_real_workers(shards, workers, ranks, weights):
    run = Run(((3, 5), (4, 2, 1)), weights, 6, 7, 2)
    check(run, shards(run), [(2, ranks, workers), (2, 1, 0), (1, ranks, workers)])
