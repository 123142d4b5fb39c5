"""What is drawn anew in every step, each as a function of the stage's seed and the step alone.

So an interrupted run goes on with the same draws, and all processes draw the same: they need not
tell each other which size, which window, or where a crop lies.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import AugmentationConfig
from ..models.position import NUM_DRAWS
from ..partitions import MicroBatch, Partition, Pass
from ..types import Size
from ..views import Views


class Draws:
    """The draws of a stage.

    Args:
        seed: of the stage.
        config: the recipe's section.
        images: of one step, over all processes.
        patch_size: the student's, the unit of shifts.
    """

    def __init__(self, seed: int, config: AugmentationConfig, images: int, patch_size: int):
        self._seed, self._config = seed, config
        self._images, self._patch_size = images, patch_size

    @property
    def margin(self) -> int:
        """Pixels by which a decoded view exceeds the student's input on each axis."""
        return self._config.shift * self._patch_size

    def sizes(self, step: int, partitions: Sequence[Partition]) -> dict[str, Size]:
        """Draw the student input of each partition, (height, width) in pixels."""
        return {
            item.name: item.sizes[
                int(self._of(step, f"size/{item.name}").integers(len(item.sizes)))
            ]
            for item in partitions
        }

    def positions(self, step: int, micro: MicroBatch) -> Tensor:
        """Return uniform numbers for the position augmentation, ``[B, NUM_DRAWS]``."""
        draws = self._of(step, "positions").random((self._images, NUM_DRAWS), dtype=np.float32)
        return torch.from_numpy(draws[micro.start : micro.stop])

    def window(self, step: int, item: Pass) -> int:
        """Draw the side of the attention windows, in tokens; 0 for global attention.

        Windows must tile the grid. Where none of the wanted sides does, attention stays global.
        """
        generator, config = self._of(step, f"window/{item.partition.name}"), self._config
        if generator.random() >= config.window_share:
            return 0
        height, width = (side // self._patch_size for side in item.size)
        low, high = config.window_sizes[0], min(config.window_sizes[1], height, width)
        sides = [side for side in range(low, high + 1) if height % side == width % side == 0]
        return int(generator.choice(sides)) if sides else 0

    def views(self, step: int, micro: MicroBatch, item: Pass, pixels: Tensor) -> Views:
        """Show the pixels ``[B, 3, H, W]`` of a micro-batch, each encoder's crop shifted."""

        def offsets(encoder: str) -> Tensor:
            generator = self._of(step, f"shift/{item.partition.name}/{encoder}")
            cells = generator.integers(self._config.shift + 1, size=(self._images, 2))
            return torch.from_numpy(cells[micro.start : micro.stop] * self._patch_size)

        return Views(pixels, item.size, offsets, self.margin)

    def noise(self, step: int) -> int:
        """Return a seed for noise on weights."""
        return int(self._of(step, "noise").integers(2**31))

    def _of(self, step: int, stream: str) -> np.random.Generator:
        key = [zlib.crc32(f"{self._seed}/{stream}".encode()), step]
        return np.random.Generator(np.random.Philox(key=key))
