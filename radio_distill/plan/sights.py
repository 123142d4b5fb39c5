"""How a teacher sees the images of a partition: at what size, and how many at a time."""

import math
from dataclasses import dataclass

from ..config import PartitionConfig, Recipe
from ..distill.targets import input_size, plan_canvas
from ..types import Size, TeacherSpec


@dataclass(frozen=True)
class Sight:
    """What one teacher sees of an image at one size of the student's.

    Where partitions share their images, equal sights give equal targets.
    """

    teacher: str
    size: Size
    """Of its input, in pixels; in a mosaic that of the canvas."""
    grid: Size
    """Of one image's target, in cells."""
    images: int
    """Images on one input: 1, or those of a mosaic."""

    def inputs(self, images: int) -> int:
        """Return how many inputs show some images."""
        return math.ceil(images / self.images)


def sight_of(
    recipe: Recipe, spec: TeacherSpec, partition: PartitionConfig, view: Size, factor: int = 1
) -> Sight:
    """Return how a teacher sees a partition.

    Args:
        recipe: the recipe.
        spec: the teacher's.
        partition: who shows the images.
        view: student input, (height, width) in pixels.
        factor: of the upsampler, for the teachers that it upsamples.
    """
    config = recipe.teachers[spec.name]
    size = input_size(config, spec, partition, view, recipe.student.patch_size)
    height, width = spec.grid(size)
    if spec.name in partition.mosaic:
        images = plan_canvas(spec, size).images
        return Sight(spec.name, spec.native_size, (height, width), images)
    scale = factor if spec.name in partition.upsample else 1
    return Sight(spec.name, size, (height * scale, width * scale), 1)
