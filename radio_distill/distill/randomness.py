"""What is drawn anew in every step, each as a function of the stage's seed and the step alone.

So an interrupted run goes on with the same draws, and all processes draw the same: they need not
tell each other which size, which window, or where a crop lies.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..config import AugmentationConfig
from ..models.position import NUM_DRAWS
from ..stage import Partition, Stage
from ..types import Size, View
from .colours import DRAWS, is_plain, recoloured
from .losses import Survivors
from .views import Views, crop_of

if TYPE_CHECKING:
    from .micro_batches import MicroBatch, Pass


class StepRandomness:
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

    @classmethod
    def of_stage(cls, stage: Stage) -> "StepRandomness":
        """Make the draws of a stage."""
        patch_size = stage.student.patch_size
        return cls(stage.seed, stage.augmentation, stage.images_per_step, patch_size)

    def shape(self, size: Size) -> Size:
        """Return what is cropped out of a photograph, in the student's pixels: its input, and the
        range of the shifts."""
        margin = self._config.shift * self._patch_size
        return size[0] + margin, size[1] + margin

    def sizes(self, step: int, partitions: Sequence[Partition]) -> dict[str, Size]:
        """Draw the student input of each partition by its name, (height, width) in pixels.

        And as ``partition/teacher`` what one image measures to a teacher whose size is drawn too.
        """
        sizes: dict[str, Size] = {}
        for item in partitions:
            sizes[item.name] = self._choice(step, item.name, item.sizes)
            for (size, teacher), views in item.drawn.items():
                if size == sizes[item.name]:
                    name = f"{item.name}/{teacher}"
                    sizes[name] = self._choice(step, name, list(views))
        return sizes

    def _choice(self, step: int, name: str, sizes: Sequence[Size]) -> Size:
        return sizes[int(self._of(step, f"size/{name}").integers(len(sizes)))]

    def positions(self, step: int, micro: "MicroBatch") -> Tensor:
        """Return uniform numbers for the position augmentation, ``[B, NUM_DRAWS]``."""
        draws = self._of(step, "positions").random((self._images, NUM_DRAWS), dtype=np.float32)
        return torch.from_numpy(draws[micro.start : micro.stop])

    def window(self, step: int, item: "Pass") -> int:
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

    def renderings(
        self, step: int, micro: "MicroBatch", item: "Pass", sizes: Mapping[str, Size]
    ) -> dict[View, np.ndarray | None]:
        """Say which views of a micro-batch's images its encoders need.

        Args:
            step: counted from 0.
            micro: the images.
            item: the pass.
            sizes: of each encoder's view, in pixels.

        Returns:
            For each view where it lies within what :meth:`shape` says is cropped, as shares of its
            height and width: (top, left, height, width), ``[B, 4]``; None for all of it.
        """
        if not self._config.shift:
            return {View(size): None for size in sizes.values()}
        offsets, name = self._offsets(step, micro, item), item.partition.name
        rows, columns = self._cells(item.size)
        whole = np.array([rows, columns]) + self._config.shift  # in patches
        inside = np.array([rows, columns]) / whole
        return {
            View(size, crop_of(name, encoder)): np.concatenate(
                [offsets(encoder) / whole, np.broadcast_to(inside, (micro.stop - micro.start, 2))],
                axis=1,
            )
            for encoder, size in sizes.items()
        }

    def recoloured(
        self, step: int, start: int, stop: int, size: Size, views: Mapping[View, Tensor]
    ) -> Mapping[View, Tensor]:
        """Change the colours of images [start, stop) of a step, alike in all of their views.

        ``size`` is the student's input, (height, width) in pixels.
        """
        if is_plain(self._config):
            return views
        draws = self._of(step, "colours").random((self._images, DRAWS))
        return recoloured(views, size, self._config, draws[start:stop])

    def views(
        self, step: int, micro: "MicroBatch", item: "Pass", pixels: Mapping[View, Tensor]
    ) -> Views:
        """Show a micro-batch's renderings to the encoders of a pass, each its own crop."""
        if not self._config.shift:
            return Views(pixels, item.size)
        offsets = self._offsets(step, micro, item)
        return Views(
            pixels,
            item.size,
            lambda encoder: torch.from_numpy(offsets(encoder)),
            self._cells(item.size),
            item.partition.name,
        )

    def _offsets(self, step: int, micro: "MicroBatch", item: "Pass") -> Callable[[str], np.ndarray]:
        """Draw where the crop of a named encoder begins, ``[B, 2]`` whole patches."""

        def offsets(encoder: str) -> np.ndarray:
            generator = self._of(step, f"shift/{item.partition.name}/{encoder}")
            patches = generator.integers(self._config.shift + 1, size=(self._images, 2))
            return patches[micro.start : micro.stop]

        return offsets

    def _cells(self, size: Size) -> Size:
        return size[0] // self._patch_size, size[1] // self._patch_size

    def survivors(self, step: int, micro: "MicroBatch", item: "Pass", dropped: float) -> Survivors:
        """Draw which teachers of a pass stay for each image, see :mod:`.losses`."""
        partition, teachers = item.partition, len(item.partition.teachers)
        generator = self._of(step, f"teachers/{partition.name}")
        stay = generator.random((teachers - 1, partition.batch_size)) >= dropped
        first, last = micro.start - partition.start, micro.stop - partition.start
        scale = partition.batch_size / float(partition.batch_size + stay.sum())
        return Survivors(torch.from_numpy(stay[:, first:last]), scale)

    def noise(self, step: int) -> int:
        """Return a seed for noise on weights."""
        return int(self._of(step, "noise").integers(2**31))

    def _of(self, step: int, stream: str) -> np.random.Generator:
        key = [zlib.crc32(f"{self._seed}/{stream}".encode()), step]
        return np.random.Generator(np.random.Philox(key=key))
