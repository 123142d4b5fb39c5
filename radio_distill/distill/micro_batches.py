"""Who sees what: which process runs which images of a step, and with what weight.

:func:`assign_micro_batches` turns the partitions of a stage into work for each rank so that the
gradient, summed over ranks, is always the same:

* with at least as many ranks as partitions, each partition has ranks of its own (PHI-S paper,
  App. A.7: "partitions"), shared out by cost;
* with fewer, every rank runs all partitions one after another, as micro-batches of one step.

Partitions that show the same images (``images_of``) go together. Images that share a mosaic canvas
are never parted, or what a teacher sees would depend on the number of processes.

ZeRO reduces gradients in every backward pass, so all ranks must run equally many passes: a rank
that has fewer repeats one image at weight zero, a padding pass.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..data.loader import StepSlice
from ..stage import Partition, Stage
from ..system.distributed import World
from ..teacher_view import TeacherView
from ..types import Size, View
from .randomness import StepRandomness
from .views import EMA, STUDENT


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass of the student over a micro-batch."""

    partition: Partition
    size: Size
    """Student input of this step, (height, width) in pixels."""
    image_weight: float
    """Weight of one image's loss in the step's loss; zero in a padding pass."""

    @property
    def views(self) -> Mapping[str, TeacherView]:
        """The view that each teacher has of the images, by name."""
        return self.partition.views[self.size]


@dataclass(frozen=True)
class MicroBatch:
    """Images ``[start, stop)`` of a step, decoded once, and the passes that one rank runs on them.

    There are several passes where partitions share their images.
    """

    start: int
    stop: int
    passes: tuple[Pass, ...]

    @property
    def size(self) -> Size:
        """The largest student input among the passes, in pixels."""
        return max((item.size for item in self.passes), key=math.prod)


class MicroBatchSchedule:
    """The micro-batches that one rank runs in each step, and the images that they are made of.

    Args:
        stage: whose steps they are.
        world: this process's place.
        draws: of the stage.
    """

    def __init__(self, stage: Stage, world: World, draws: StepRandomness):
        self._stage, self._world, self._draws = stage, world, draws
        self._assigned = lru_cache(maxsize=256)(self._assign)

    def micro_batches(self, step: int) -> Sequence[MicroBatch]:
        """Return this rank's micro-batches of a step."""
        return self._assigned(tuple(self._draws.sizes(step, self._stage.partitions).items()))

    def slices(self, step: int) -> list[StepSlice]:
        """Return the images of each micro-batch, and the views that its encoders need of them."""
        slices = []
        for micro in self.micro_batches(step):
            views: dict[View, np.ndarray | None] = {}
            for item in micro.passes:
                sizes = {STUDENT: item.size}
                if self._stage.loss.mesa:
                    sizes[EMA] = item.size
                sizes |= {name: view.rendered for name, view in item.views.items()}
                views |= self._draws.renderings(step, micro, item, sizes)
            shape = self._draws.shape(micro.size)
            slices.append(StepSlice(micro.start, micro.stop, shape, views))
        return slices

    def _assign(self, sizes: tuple[tuple[str, Size], ...]) -> Sequence[MicroBatch]:
        limit = self._stage.engine.micro_batch
        ranks = assign_micro_batches(
            self._stage.partitions, dict(sizes), self._world.world_size, limit
        )
        return ranks[self._world.rank]


def assign_micro_batches(
    partitions: Sequence[Partition],
    sizes: Mapping[str, Size],
    world_size: int,
    micro_batch: int = 0,
) -> list[list[MicroBatch]]:
    """Return each rank's micro-batches of one step, with equally many passes on every rank.

    Args:
        partitions: of one stage.
        sizes: the student input of each in this step, by name.
        world_size: number of ranks.
        micro_batch: most images in one micro-batch; 0 for no limit. Images of one canvas are never
            parted: a micro-batch has at least as many, or a divisible number of them.
    """
    groups: dict[str, list[Partition]] = {}  # partitions that show the same images
    for partition in partitions:
        groups.setdefault(partition.images_of or partition.name, []).append(partition)
    ranks: list[list[MicroBatch]] = [[] for _ in range(world_size)]
    rank = 0
    dedicated = world_size >= len(groups) > 1
    counts = _rank_counts([*groups.values()], world_size)
    for group, dedicated_ranks in zip(groups.values(), counts, strict=True):
        count = dedicated_ranks if dedicated else world_size
        passes = tuple(Pass(item, sizes[item.name], item.image_weight) for item in group)
        together = math.lcm(
            *(view.images_per_input for item in passes for view in item.views.values())
        )
        for part in range(count):
            spans = _spans(group[0], part, count, micro_batch, together)
            ranks[rank + part] += [MicroBatch(start, stop, passes) for start, stop in spans]
        rank += count if dedicated else 0
    return _pad(ranks, partitions, sizes)


def _rank_counts(groups: Sequence[Sequence[Partition]], world_size: int) -> list[int]:
    """Share ranks out in proportion to ``ranks`` where given, else to pixels; at least one each."""
    costs: list[float] = [sum(item.ranks for item in group) for group in groups]
    if not all(costs):
        costs = [sum(_mean_pixels(item) for item in group) for group in groups]
    counts = [1] * len(groups)
    for _ in range(world_size - len(groups)):
        busiest = max(range(len(costs)), key=lambda index: costs[index] / counts[index])
        counts[busiest] += 1
    return counts


def _mean_pixels(partition: Partition) -> float:
    pixels = [math.prod(size) for size in partition.sizes]
    return partition.batch_size * sum(pixels) / len(pixels)


def _spans(
    partition: Partition, part: int, parts: int, micro_batch: int, unit: int
) -> list[tuple[int, int]]:
    """Cut one rank's part of a partition's images into micro-batches, at multiples of ``unit``."""
    num_units = math.ceil(partition.batch_size / unit)
    start, stop = (
        min(num_units * index // parts * unit, partition.batch_size) for index in (part, part + 1)
    )
    step = max(micro_batch // unit * unit, unit) if micro_batch else max(stop - start, 1)
    return [
        (partition.start + first, partition.start + min(first + step, stop))
        for first in range(start, stop, step)
    ]


def _pad(
    ranks: list[list[MicroBatch]], partitions: Sequence[Partition], sizes: Mapping[str, Size]
) -> list[list[MicroBatch]]:
    """Give ranks with fewer passes padding passes over one image, of the smallest input."""
    counts = [sum(len(micro.passes) for micro in work) for work in ranks]
    cheapest = min(partitions, key=lambda item: math.prod(sizes[item.name]))
    padding = MicroBatch(
        cheapest.start, cheapest.start + 1, (Pass(cheapest, sizes[cheapest.name], 0.0),)
    )
    return [
        work + [padding] * (max(counts) - count) for work, count in zip(ranks, counts, strict=True)
    ]
