"""What one process does in each step: micro-batches, and the images that they are made of."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from ..config import Recipe
from ..data.loader import StepSlice
from ..stage import MicroBatch, Pass, assign_micro_batches, images_per_step, partitions_of
from ..system.distributed import World
from ..types import Size, View
from .randomness import StepRandomness
from .targets import TargetMaker
from .views import AVERAGE, STUDENT


class Work:
    """The work of one rank in a stage.

    Args:
        recipe: the recipe.
        stage: name of the stage.
        world: this process's place.
        targets: knows which images must stay together.
        draws: of the stage.
    """

    def __init__(
        self, recipe: Recipe, stage: str, world: World, targets: TargetMaker, draws: StepRandomness
    ):
        config = recipe.stages[stage]
        self.partitions = partitions_of(config)
        self.images_per_step = images_per_step(config)
        self._world, self._targets, self._draws = world, targets, draws
        self._limit = recipe.engine.micro_batch
        self._mesa = recipe.loss.mesa > 0
        self._share_out = lru_cache(maxsize=256)(self._of_sizes)

    def micro_batches(self, step: int) -> Sequence[MicroBatch]:
        """Return this rank's micro-batches of a step."""
        return self._share_out(tuple(self._draws.sizes(step, self.partitions).items()))

    def slices(self, step: int) -> list[StepSlice]:
        """Return the images of each micro-batch, and the views that its encoders need of them."""
        slices = []
        for micro in self.micro_batches(step):
            views: dict[View, np.ndarray | None] = {}
            for item in micro.passes:
                views |= self._draws.renderings(step, micro, item, self._sizes(item))
            shape = self._draws.shape(micro.size)
            slices.append(StepSlice(micro.start, micro.stop, shape, views))
        return slices

    def _sizes(self, item: Pass) -> dict[str, Size]:
        """Return the size of each encoder's view, in pixels."""
        partition = item.partition.config
        sizes = {STUDENT: item.size} | ({AVERAGE: item.size} if self._mesa else {})
        for name in partition.teachers:
            sizes[name] = self._targets.rendered_size(name, partition, item.size)
        return sizes

    def _of_sizes(self, sizes: tuple[tuple[str, Size], ...]) -> Sequence[MicroBatch]:
        known: Mapping[str, Size] = dict(sizes)
        together = {
            item.name: self._targets.images_together(item.config, known[item.name])
            for item in self.partitions
        }
        ranks = assign_micro_batches(
            self.partitions, known, self._world.world_size, self._limit, together
        )
        return ranks[self._world.rank]
