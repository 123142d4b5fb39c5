"""Who sees what: which process runs which images of a step, and with what weight.

A step's loss is ``sum_p share_p * mean over the images of p (loss)``, with
``share_p = weight_p / sum(weights)``. That definition knows nothing of processes. :func:`share_out`
turns it into work for each rank so that the gradient, averaged over ranks, is always the same:

* with at least as many ranks as partitions, each partition has ranks of its own (PHI-S paper,
  App. A.7: "partitions"), shared out by cost;
* with fewer, every rank runs all partitions one after another, as micro-batches of one step.

ZeRO reduces gradients in every backward pass, so all ranks must run equally many micro-batches:
a rank that has fewer repeats one image at weight zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .config import PartitionConfig, StageConfig, size_pair
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
    def size(self) -> Size:
        """Student input, (height, width) in pixels."""
        return size_pair(self.config.size)

    @property
    def batch_size(self) -> int:
        return self.config.batch_size

    @property
    def image_weight(self) -> float:
        """Weight of one image's loss in the step's loss."""
        return self.share / self.batch_size


@dataclass(frozen=True)
class MicroBatch:
    """Images ``[start, stop)`` of a step, run in one forward and backward pass on one rank."""

    partition: Partition
    start: int
    stop: int
    image_weight: float
    """Weight of one image's loss in the step's loss; zero where a rank only keeps pace."""


def partitions_of(stage: StageConfig) -> tuple[Partition, ...]:
    """Lay the partitions of a stage one after another over the images of a step."""
    total = sum(config.weight for config in stage.partitions)
    partitions, start = [], 0
    for config in stage.partitions:
        partitions.append(Partition(config, start, config.weight / total))
        start += config.batch_size
    return tuple(partitions)


def images_per_step(stage: StageConfig) -> int:
    """Number of images that all processes together see in one step."""
    return sum(config.batch_size for config in stage.partitions)


def share_out(
    partitions: Sequence[Partition], world_size: int, micro_batch: int = 0
) -> list[list[MicroBatch]]:
    """Return each rank's micro-batches, equally many on every rank.

    Args:
        partitions: of one stage.
        world_size: number of ranks.
        micro_batch: most images in one micro-batch; 0 for no limit.
    """
    ranks: list[list[MicroBatch]] = [[] for _ in range(world_size)]
    rank = 0
    dedicated = world_size >= len(partitions) > 1
    counts = _rank_counts(partitions, world_size) if dedicated else [world_size] * len(partitions)
    for partition, count in zip(partitions, counts, strict=True):
        for part in range(count):
            ranks[rank + part] += _micro_batches(partition, part, count, micro_batch)
        rank += count if dedicated else 0
    return _pad(ranks, partitions)


def _rank_counts(partitions: Sequence[Partition], world_size: int) -> list[int]:
    """Share ranks out in proportion to ``ranks`` where given, else to pixels; at least one each."""
    costs = [partition.config.ranks for partition in partitions]
    if not all(costs):
        costs = [p.batch_size * p.size[0] * p.size[1] for p in partitions]
    counts = [1] * len(partitions)
    for _ in range(world_size - len(partitions)):
        busiest = max(range(len(costs)), key=lambda index: costs[index] / counts[index])
        counts[busiest] += 1
    return counts


def _micro_batches(
    partition: Partition, part: int, parts: int, micro_batch: int
) -> list[MicroBatch]:
    start = partition.start + partition.batch_size * part // parts
    stop = partition.start + partition.batch_size * (part + 1) // parts
    step = micro_batch or max(stop - start, 1)
    return [
        MicroBatch(partition, first, min(first + step, stop), partition.image_weight)
        for first in range(start, stop, step)
    ]


def _pad(ranks: list[list[MicroBatch]], partitions: Sequence[Partition]) -> list[list[MicroBatch]]:
    length = max(len(batches) for batches in ranks)
    cheapest = min(partitions, key=lambda partition: partition.size[0] * partition.size[1])
    idle = MicroBatch(cheapest, cheapest.start, cheapest.start + 1, 0.0)
    return [batches + [idle] * (length - len(batches)) for batches in ranks]
