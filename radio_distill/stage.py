"""Who sees what: which process runs which images of a step, and with what weight.

A step's loss is ``sum_p share_p * mean over the images of p (loss)``, with
``share_p = weight_p / sum(weights)``. That definition knows nothing of processes.
:func:`assign_micro_batches` turns it into work for each rank so that the gradient, summed over
ranks, is always the same:

* with at least as many ranks as partitions, each partition has ranks of its own (PHI-S paper,
  App. A.7: "partitions"), shared out by cost;
* with fewer, every rank runs all partitions one after another, as micro-batches of one step.

Partitions that show the same images (``images_of``) go together. Images that share a mosaic canvas
are never parted, or what a teacher sees would depend on the number of processes.

ZeRO reduces gradients in every backward pass, so all ranks must run equally many passes: a rank
that has fewer repeats one image at weight zero.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .config import PartitionConfig, StageConfig, partition_sizes
from .types import Size


@dataclass(frozen=True)
class Partition:
    """A partition of a step, resolved: where its images lie and what each of them weighs."""

    config: PartitionConfig
    start: int
    """Index of its first image within the step's images."""
    share: float
    """Its part of the step's loss; the shares of a step sum to one."""

    @property
    def name(self) -> str:
        return self.config.name

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """Student inputs, (height, width) in pixels, of which each step draws one."""
        return partition_sizes(self.config)

    @property
    def batch_size(self) -> int:
        return self.config.batch_size

    @property
    def image_weight(self) -> float:
        """Weight of one image's loss in the step's loss."""
        return self.share / self.batch_size


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass of the student over a micro-batch."""

    partition: Partition
    size: Size
    """Student input of this step, (height, width) in pixels."""
    image_weight: float
    """Weight of one image's loss in the step's loss; zero where a rank only keeps pace."""


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
        """The largest student input among the passes."""
        return max((item.size for item in self.passes), key=math.prod)


def partitions_of(stage: StageConfig) -> tuple[Partition, ...]:
    """Lay the partitions of a stage one after another over the images of a step."""
    total = sum(config.weight for config in stage.partitions)
    starts: dict[str, int] = {}
    partitions, end = [], 0
    for config in stage.partitions:
        start = starts[config.images_of] if config.images_of else end
        starts[config.name] = start
        partitions.append(Partition(config, start, config.weight / total))
        end = max(end, start + config.batch_size)
    return tuple(partitions)


def images_per_step(stage: StageConfig) -> int:
    """Number of images that all processes together decode in one step."""
    return sum(config.batch_size for config in stage.partitions if not config.images_of)


def teacher_shares(partitions: Sequence[Partition]) -> dict[str, float]:
    """Return the part of a step's loss in which each teacher takes part, at most one."""
    shares: dict[str, float] = {}
    for partition in partitions:
        for name in partition.config.teachers:
            shares[name] = shares.get(name, 0.0) + partition.share
    return shares


def assign_micro_batches(
    partitions: Sequence[Partition],
    sizes: Mapping[str, Size],
    world_size: int,
    micro_batch: int = 0,
    units: Mapping[str, int] | None = None,
) -> list[list[MicroBatch]]:
    """Return each rank's micro-batches of one step, with equally many passes on every rank.

    Args:
        partitions: of one stage.
        sizes: the student input of each in this step, by name.
        world_size: number of ranks.
        micro_batch: most images in one micro-batch; 0 for no limit.
        units: images that must stay together, by partition (those of a mosaic canvas). A
            micro-batch has at least that many, or a divisible number of them.
    """
    groups = _groups(partitions)
    together = [math.lcm(*((units or {}).get(item.name, 1) for item in group)) for group in groups]
    ranks: list[list[MicroBatch]] = [[] for _ in range(world_size)]
    rank = 0
    dedicated = world_size >= len(groups) > 1
    counts = _rank_counts(groups, world_size) if dedicated else [world_size] * len(groups)
    for group, unit, count in zip(groups, together, counts, strict=True):
        passes = tuple(Pass(item, sizes[item.name], item.image_weight) for item in group)
        for part in range(count):
            spans = _spans(group[0], part, count, micro_batch, unit)
            ranks[rank + part] += [MicroBatch(start, stop, passes) for start, stop in spans]
        rank += count if dedicated else 0
    return _pad(ranks, partitions, sizes)


def _groups(partitions: Sequence[Partition]) -> list[list[Partition]]:
    """Bring partitions that show the same images together."""
    groups: dict[str, list[Partition]] = {}
    for partition in partitions:
        groups.setdefault(partition.config.images_of or partition.name, []).append(partition)
    return list(groups.values())


def _rank_counts(groups: Sequence[Sequence[Partition]], world_size: int) -> list[int]:
    """Share ranks out in proportion to ``ranks`` where given, else to pixels; at least one each."""
    costs: list[float] = [sum(item.config.ranks for item in group) for group in groups]
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
    counts = [sum(len(micro.passes) for micro in work) for work in ranks]
    cheapest = min(partitions, key=lambda item: math.prod(sizes[item.name]))
    keep_pace = Pass(cheapest, sizes[cheapest.name], 0.0)
    idle = MicroBatch(cheapest.start, cheapest.start + 1, (keep_pace,))
    return [
        work + [idle] * (max(counts) - count) for work, count in zip(ranks, counts, strict=True)
    ]
