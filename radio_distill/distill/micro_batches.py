"""Who sees what: which process runs which images of a step, and with what weight.

:func:`assign_micro_batches` turns the partitions of a stage into work for each rank so that the
gradient, summed over ranks, is always the same:

* each partition's images are cut where the work of ranks comes out even (:func:`deal`), by the
  operations that the planner counts; a rank may serve several partitions, one after another;
* partitions that show the same images (``images_of``) go together;
* images that share a mosaic canvas are never parted, or what a teacher sees would depend on the
  number of processes.

ZeRO 2 and 3 reduce gradients in every backward pass, so all ranks must run equally many: a rank
that has fewer runs padding passes, one image through the student at weight zero, without a teacher.
ZeRO 0 and 1 reduce once a step: there only a rank without any image has a padding pass.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from ..data.loader import StepSlice
from ..stage import Partition, Stage
from ..system.distributed import World
from ..teacher_view import TeacherView
from ..types import Size, View
from .alignment import common_grid
from .randomness import StepRandomness
from .views import EMA, STUDENT, shown_by_both

_MOST_DRAWS = 256
SLACK = 0.04
"""Work above the mean that a rank may have, as a share of it, so that fewer groups are cut up."""
_TRIES = 9
_HALVINGS = 12


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass of the student over a micro-batch."""

    partition: Partition
    size: Size
    """Student input of this step, (height, width) in pixels."""
    image_weight: float
    """Weight of one image's loss in the step's loss; zero in a padding pass."""
    drawn: Mapping[str, TeacherView] = field(default_factory=dict)
    """Of this step, the views of the teachers whose size is drawn too."""

    @property
    def is_padding(self) -> bool:
        """Whether it adds nothing, and is run for what ranks do together alone."""
        return self.image_weight == 0

    @property
    def views(self) -> Mapping[str, TeacherView]:
        """The view that each teacher has of the images, by name; none in a padding pass."""
        return {} if self.is_padding else {**self.partition.views[self.size], **self.drawn}


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
                if self._stage.loss.mesa and not item.is_padding:
                    sizes[EMA] = item.size
                sizes |= {name: view.rendered for name, view in item.views.items()}
                views |= self._draws.renderings(step, micro, item, sizes)
            shape = self._draws.shape(micro.size)
            slices.append(StepSlice(micro.start, micro.stop, shape, views))
        return slices

    def mean_cells(self, step: int) -> dict[str, float]:
        """Return the cells at which an image is compared with each teacher, as a mean over the
        images of a step by their weights; the same on all ranks."""
        stage, sizes = self._stage, self._draws.sizes(step, self._stage.partitions)
        cells, shares = defaultdict[str, float](float), stage.teacher_shares()
        for partition in stage.partitions:
            size = sizes[partition.name]
            whole = Pass(partition, size, partition.image_weight, partition.views_drawn(sizes))
            images = MicroBatch(partition.start, partition.start + partition.batch_size, (whole,))
            seen = self._draws.views(step, images, whole, {})
            rows, columns = (side // stage.student.patch_size for side in size)
            for name, view in whole.views.items():
                fine = stage.student.heads_of(name).upsample
                student, shift = (rows * fine, columns * fine), seen.shift(name)
                grid = common_grid(student, view.grid, stage.loss.alignment)
                each = torch.ones(1, *grid) if shift is None else shown_by_both(shift, grid)
                mean = float(each.sum((1, 2), dtype=torch.float64).mean())
                cells[name] += partition.share / shares[name] * mean
        return dict(cells)

    def _assign(self, sizes: tuple[tuple[str, Size], ...]) -> Sequence[MicroBatch]:
        ranks = assign_micro_batches(self._stage, dict(sizes), self._world.world_size)
        return ranks[self._world.rank]


def assign_micro_batches(
    stage: Stage, sizes: Mapping[str, Size], world_size: int
) -> list[list[MicroBatch]]:
    """Return each rank's micro-batches of one step, with at least one pass on every rank.

    Args:
        stage: what its images cost is :attr:`Stage.work`, or where that is not known, their pixels.
        sizes: of this step, as :meth:`.randomness.StepRandomness.sizes` draws them.
        world_size: number of ranks.
    """
    groups: dict[str, list[Partition]] = {}  # partitions that show the same images
    for partition in stage.partitions:
        groups.setdefault(partition.images_of or partition.name, []).append(partition)
    passes = [
        tuple(
            Pass(item, sizes[item.name], item.image_weight, item.views_drawn(sizes))
            for item in group
        )
        for group in groups.values()
    ]
    units = [images_together(item) for item in passes]
    counts = [
        math.ceil(item[0].partition.batch_size / unit)
        for item, unit in zip(passes, units, strict=True)
    ]
    costs = [_cost(stage, item, unit) for item, unit in zip(passes, units, strict=True)]
    if all(shares := [sum(item.ranks for item in group) for group in groups.values()]):
        costs = [share / count for share, count in zip(shares, counts, strict=True)]
    ranks: list[list[MicroBatch]] = [[] for _ in range(world_size)]
    for one, unit, dealt in zip(passes, units, deal(counts, costs, world_size), strict=True):
        limits = [stage.micro_batch(item.partition.name, item.size) for item in one]
        limit = min(filter(None, limits), default=0)
        first = 0
        for rank, count in enumerate(dealt):
            spans = _spans(one[0].partition, first, first + count, limit, unit)
            ranks[rank] += [MicroBatch(start, stop, one) for start, stop in spans]
            first += count
    equal = needs_equal_passes(stage.engine.zero_stage)
    return _pad(ranks, stage.partitions, sizes, equal)


def needs_equal_passes(zero_stage: int | str) -> bool:
    """Return whether ranks meet in every pass of a ZeRO stage, not only once a step."""
    return zero_stage in (2, 3)


def teachers_of(stage: Stage, world: World) -> list[str]:
    """Return the teachers that a rank runs in the steps of a stage, in the order of the recipe.

    Those of all partitions where sizes are drawn in more ways than are worth looking at.
    """
    choices = [[(item.name, size) for size in item.sizes] for item in stage.partitions]
    names: set[str] = set()
    if math.prod(map(len, choices)) > _MOST_DRAWS:
        names.update(*(item.teachers for item in stage.partitions))
        choices = []
    for draw in itertools.product(*choices) if choices else ():
        dealt = assign_micro_batches(stage, dict(draw), world.world_size)[world.rank]
        names.update(*(item.views for micro in dealt for item in micro.passes))
    return [name for name in stage.teachers if name in names]


def images_together(passes: Sequence[Pass]) -> int:
    """Return how many images are never parted: those that fill whole canvases of every pass."""
    return math.lcm(*(view.images_per_input for item in passes for view in item.views.values()))


def _cost(stage: Stage, passes: Sequence[Pass], images: int) -> float:
    """Return what some images cost; what passes ask alike of a teacher runs once."""
    cost, inputs = 0.0, dict[tuple[str, TeacherView], float]()
    for item in passes:
        name = item.partition.name
        work = stage.work.get((name, item.size))
        cost += images * (math.prod(item.size) if work is None else work.image)
        for teacher, view in item.views.items():
            each = math.prod(view.encoded) if work is None else work.inputs[teacher]
            # Where crops are shifted, each partition has its own.
            inputs[name if stage.augmentation.shift else "", view] = view.inputs(images) * each
    return cost + sum(inputs.values())


def _spans(
    partition: Partition, first: int, last: int, micro_batch: int, unit: int
) -> list[tuple[int, int]]:
    """Cut units ``[first, last)`` of a partition's images into micro-batches of whole units."""
    start, stop = (min(index * unit, partition.batch_size) for index in (first, last))
    step = max(micro_batch // unit * unit, unit) if micro_batch else max(stop - start, 1)
    return [
        (partition.start + begin, partition.start + min(begin + step, stop))
        for begin in range(start, stop, step)
    ]


def _pad(
    ranks: list[list[MicroBatch]],
    partitions: Sequence[Partition],
    sizes: Mapping[str, Size],
    equal_passes: bool,
) -> list[list[MicroBatch]]:
    """Give ranks with too few passes padding passes over one image, of the smallest input."""
    counts = [sum(len(micro.passes) for micro in work) for work in ranks]
    cheapest = min(partitions, key=lambda item: math.prod(sizes[item.name]))
    padding = MicroBatch(
        cheapest.start, cheapest.start + 1, (Pass(cheapest, sizes[cheapest.name], 0.0),)
    )
    return [
        work + [padding] * ((max(counts) if equal_passes else 1) - count)
        for work, count in zip(ranks, counts, strict=True)
    ]


def deal(units: Sequence[int], costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Return how many units of each group every rank gets, ``[group][rank]``.

    So that none waits long for another and none needs every teacher. A function of its arguments
    alone, so all ranks find the same.

    Work comes in units that cannot be cut: an image, or the images of a full canvas. Groups of
    equal units are dealt longest unit first, each to the ranks that have most room under a limit.
    So a group fills rank after rank, and a rank seldom serves more than two. The limit is the
    lowest under which all of it fits, found by bisection (multifit: Coffman, Garey and Johnson,
    SIAM J. Computing 7, 1978, here with worst fit). Where that comes close to the mean, a limit a
    little higher is taken if it cuts up fewer groups: small gaps are left empty rather than run
    another teacher for an image or two.

    Args:
        units: of each group.
        costs: of one unit of each group, above zero.
        ranks: how many share the work.
    """
    mean = sum(count * cost for count, cost in zip(units, costs, strict=True)) / ranks
    limits = [mean * (1 + SLACK * number / (_TRIES - 1)) for number in range(_TRIES)]
    if close := [dealt for limit in limits if (dealt := _fill(units, costs, ranks, limit))]:
        return min(close, key=_parts)
    # Where a unit fits nowhere, every rank has more than the limit less this unit. So under the
    # mean and the longest unit all have room; the last term is for rounding.
    low, high = mean, mean + max(costs) * (1 + 1e-6)
    best = _fill(units, costs, ranks, high)
    assert best is not None, "below the mean and one unit there is room"
    for _ in range(_HALVINGS):
        limit = (low + high) / 2
        found = _fill(units, costs, ranks, limit)
        low, high, best = (limit, high, best) if found is None else (low, limit, found)
    return best


def _fill(
    units: Sequence[int], costs: Sequence[float], ranks: int, limit: float
) -> list[list[int]] | None:
    """Deal under a limit of the work of a rank; None where not all of it fits."""
    room = [limit] * ranks
    dealt = [[0] * ranks for _ in units]
    for group in sorted(range(len(units)), key=lambda index: (-costs[index], index)):
        left, cost = units[group], costs[group]
        for rank in sorted(range(ranks), key=lambda index: (-room[index], index)):
            taken = min(left, int(room[rank] / cost))
            dealt[group][rank] = taken
            room[rank] -= taken * cost
            left -= taken
        if left:
            return None
    return dealt


def _parts(dealt: list[list[int]]) -> int:
    """Return into how many parts the groups are cut."""
    return sum(count > 0 for group in dealt for count in group)
