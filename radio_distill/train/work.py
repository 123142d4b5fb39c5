"""What one process does in each step: micro-batches, and the images that they are made of."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from ..config import Recipe
from ..data.loader import StepSlice
from ..partitions import MicroBatch, images_per_step, partitions_of, share_out
from ..targets import TargetMaker
from ..types import Size
from .distributed import World
from .draws import Draws


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
        self, recipe: Recipe, stage: str, world: World, targets: TargetMaker, draws: Draws
    ):
        config = recipe.stages[stage]
        self.partitions = partitions_of(config)
        self.images_per_step = images_per_step(config)
        self._world, self._targets, self._draws = world, targets, draws
        self._limit = recipe.engine.micro_batch
        self._share_out = lru_cache(maxsize=256)(self._of_sizes)

    def micro_batches(self, step: int) -> Sequence[MicroBatch]:
        """Return this rank's micro-batches of a step."""
        return self._share_out(tuple(self._draws.sizes(step, self.partitions).items()))

    def slices(self, step: int) -> list[StepSlice]:
        """Return the images of each micro-batch, with room for the shifts of the crops."""
        margin = self._draws.margin
        return [
            StepSlice(micro.start, micro.stop, (micro.size[0] + margin, micro.size[1] + margin))
            for micro in self.micro_batches(step)
        ]

    def _of_sizes(self, sizes: tuple[tuple[str, Size], ...]) -> Sequence[MicroBatch]:
        known: Mapping[str, Size] = dict(sizes)
        together = {
            item.name: self._targets.images_together(item.config, known[item.name])
            for item in self.partitions
        }
        ranks = share_out(self.partitions, known, self._world.world_size, self._limit, together)
        return ranks[self._world.rank]
