"""What the models of a recipe cost: operations for one picture, memory for a micro-batch.

The models run on fake tensors (:mod:`.measure`), each part once: stages and partitions share most
of what is measured. The student's memory includes that of its losses.

Left out, since it is small: the margin of shifted crops, the noise on weights, the windows that
are drawn in some steps (they save attention), and the map that MESA compares with.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..balance import NORMALIZERS
from ..config import PartitionConfig, Recipe, partition_sizes
from ..losses import KINDS, distillation_loss
from ..models.distilled import DistilledStudent
from ..models.position import NUM_DRAWS
from ..mosaic import plan_mosaic
from ..partitions import Partition, Pass
from ..protocols import Normalizer, Teacher, Upsampler
from ..targets import input_size
from ..types import Features, Size
from .measure import count_flops, peak_memory


@dataclass(frozen=True)
class TeacherCost:
    """One teacher in one partition, at one size of the student's."""

    name: str
    size: Size
    """Of its input, in pixels; in a mosaic that of the canvas."""
    grid: Size
    """Of the targets of one picture, in cells."""
    calls: int
    """Teacher images for one picture: 1, or what the upsampler needs."""
    pictures: int
    """Pictures on one teacher image: 1, or those of a mosaic."""
    encode_flops: int
    """Of all calls for one picture, or of one canvas; in the teacher's dtype."""
    other_flops: int
    """Of upsampler and normalizer for one picture, in float32."""

    @property
    def way(self) -> tuple[str, Size, Size]:
        """What it sees, and what it makes of it: equal ways make equal targets of one picture."""
        return self.name, self.size, self.grid

    @property
    def flops(self) -> float:
        """Operations for one picture, on full canvases."""
        return self.encode_flops / self.pictures + self.other_flops

    def encodings(self, images: int) -> int:
        """Return how often ``encode_flops`` are due for some pictures."""
        return math.ceil(images / self.pictures)


@dataclass(frozen=True)
class PassCost:
    """One partition at one size; operations are for one picture."""

    tokens: int
    """Student tokens of one picture, summary tokens and registers included."""
    student_flops: int
    """Forward, backward and recomputation; with MESA, the averaged student's forward too."""
    teachers: tuple[TeacherCost, ...]


@dataclass(frozen=True)
class PartitionCost:
    """One partition; its figures are means over the sizes that a step may draw, for one picture."""

    partition: Partition
    passes: Mapping[Size, PassCost]

    @property
    def tokens(self) -> float:
        return self._mean([cost.tokens for cost in self.passes.values()])

    @property
    def student_flops(self) -> float:
        return self._mean([cost.student_flops for cost in self.passes.values()])

    @property
    def teacher_flops(self) -> float:
        return self._mean(
            [sum(teacher.flops for teacher in cost.teachers) for cost in self.passes.values()]
        )

    @property
    def teachers(self) -> list[TeacherCost]:
        """Each way in which a teacher is used, once."""
        return list(dict.fromkeys(item for cost in self.passes.values() for item in cost.teachers))

    @staticmethod
    def _mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)


class ModelCosts:
    """Measures the models of a recipe.

    What is handed in consists of fake tensors on the CPU, made under the mode of
    :func:`.measure.fake_tensors`; the methods are called under it too.

    Args:
        recipe: the recipe.
        student: the student with its heads.
        teachers: the recipe's teachers, by name.
        upsamplers: by stage name.

    Attributes:
        encode_flops: operations of a teacher, by name, for one image of a size.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: DistilledStudent,
        teachers: Mapping[str, Teacher],
        upsamplers: Mapping[str, Upsampler],
    ):
        self.recipe, self._student = recipe, student
        self.teachers, self._upsamplers = teachers, upsamplers
        self._normalizers = {
            name: _normalizer(recipe.normalizer.name, teacher.spec.channels)
            for name, teacher in teachers.items()
        }
        for parameter in student.parameters():
            parameter.grad = torch.empty_like(parameter)  # memory of a step does not include it
        self.encode_flops = cache(self._count_encode)
        self._body_flops = cache(self._count_body)
        self._forward_flops = cache(self._count_forward)
        self._head_flops = cache(self._count_head)
        self._encode_memory = cache(self._peak_of_encode)
        self._partitions: dict[tuple[str, str], PartitionCost] = {}
        self._step_memory: dict[tuple[object, ...], int] = {}

    @property
    def parameters(self) -> int:
        """Number of parameters of student and heads."""
        return sum(parameter.numel() for parameter in self._student.parameters())

    def partition(self, stage: str, partition: Partition) -> PartitionCost:
        """Measure one picture of a partition at each of its sizes."""
        key = stage, partition.name
        if key not in self._partitions:
            passes = {size: self._pass(stage, partition, size) for size in partition.sizes}
            self._partitions[key] = PartitionCost(partition, passes)
        return self._partitions[key]

    def images_together(self, partition: Partition, size: Size) -> int:
        """Return how many images must stay together, because they share canvases."""
        config = partition.config
        return math.lcm(*(self._pictures(config, name, size) for name in config.teachers))

    def encode_size(self, partition: PartitionConfig, name: str, view: Size) -> Size:
        """Return the size of what a teacher encodes: its view of a picture, or the canvas."""
        if name in partition.mosaic:
            return self.teachers[name].spec.native_size
        return self._input_size(partition, name, view)

    def own_grid_flops(self, partition: PartitionConfig, name: str) -> float:
        """Return a teacher's operations for one picture of a partition, without upsampler."""
        flops = [
            self.encode_flops(name, self.encode_size(partition, name, view))
            / self._pictures(partition, name, view)
            for view in partition_sizes(partition)
        ]
        return sum(flops) / len(flops)

    def step_memory(self, stage: str, passes: Sequence[Pass], images: int) -> int:
        """Return the most bytes that a micro-batch takes beside weights, gradients and moments.

        That is the targets of all passes over its images, and the larger of two: a teacher at work
        on the images of one call, with its own map, of which the normalizer makes the target; the
        student with its losses.
        """
        key = (stage, images, *((item.partition.name, item.size) for item in passes))
        if key not in self._step_memory:
            self._step_memory[key] = self._peak_of_step(stage, passes, images)
        return self._step_memory[key]

    def _pass(self, stage: str, partition: Partition, size: Size) -> PassCost:
        body, config = self._student.student, partition.config
        grid = body.grid(size)
        flops = self._body_flops(size)
        flops += sum(self._head_flops(name, grid) for name in config.teachers)
        if self.recipe.loss.mesa:
            flops += self._forward_flops(size)
        return PassCost(
            tokens=grid[0] * grid[1] + body.num_prefix_tokens,
            student_flops=flops,
            teachers=tuple(self._teacher(stage, config, name, size) for name in config.teachers),
        )

    def _teacher(
        self, stage: str, partition: PartitionConfig, name: str, view: Size
    ) -> TeacherCost:
        size = self.encode_size(partition, name, view)
        grid = self._grid(stage, partition, name, view)
        target = self._targets(stage, partition, name, view, 1)
        other = count_flops(lambda: self._normalizers[name].apply(target.spatial))
        calls, encode = 1, self.encode_flops(name, size)
        if name in partition.upsample:
            calls = self._upsamplers[stage].cost(grid)
            encode *= calls
            upsampler, teacher = self._upsamplers[stage], self.teachers[name]
            pixels = torch.empty(1, 3, *view)
            other += count_flops(lambda: upsampler(teacher, pixels, grid)) - encode
        pictures = self._pictures(partition, name, view)
        return TeacherCost(name, size, grid, calls, pictures, encode, other)

    def _input_size(self, partition: PartitionConfig, name: str, view: Size) -> Size:
        config, spec = self.recipe.teachers[name], self.teachers[name].spec
        return input_size(config, spec, partition, view, self.recipe.student.patch_size)

    def _pictures(self, partition: PartitionConfig, name: str, view: Size) -> int:
        """Return how many pictures lie on one image of a teacher's."""
        if name not in partition.mosaic:
            return 1
        spec, size = self.teachers[name].spec, self._input_size(partition, name, view)
        return plan_mosaic(name, spec.native_size, size, spec.patch_size).images

    def _grid(self, stage: str, partition: PartitionConfig, name: str, view: Size) -> Size:
        height, width = self.teachers[name].spec.grid(self._input_size(partition, name, view))
        factor = self._upsamplers[stage].factor if name in partition.upsample else 1
        return height * factor, width * factor

    def _targets(
        self, stage: str, partition: PartitionConfig, name: str, view: Size, images: int
    ) -> Features:
        spec, grid = self.teachers[name].spec, self._grid(stage, partition, name, view)
        width = None if name in partition.mosaic else spec.summary_channels
        summary = None if width is None else torch.empty(images, width)
        return Features(summary, torch.empty(images, spec.channels, *grid))

    def _call(
        self, stage: str, partition: PartitionConfig, name: str, view: Size, images: int
    ) -> tuple[Size, int]:
        """Return size and number of the teacher images in one call of the encoder."""
        limit = self.recipe.teachers[name].micro_batch
        images = math.ceil(images / self._pictures(partition, name, view))
        if name in partition.upsample:
            config = self.recipe.stages[stage].upsampler
            images *= self._upsamplers[stage].cost(self._grid(stage, partition, name, view))
            limit = config.micro_batch or limit
        return self.encode_size(partition, name, view), min(images, limit or images)

    def _count_encode(self, name: str, size: Size) -> int:
        return count_flops(lambda: self.teachers[name].encode(torch.empty(1, 3, *size)))

    def _peak_of_encode(self, name: str, size: Size, images: int) -> int:
        pixels = torch.empty(images, 3, *size)
        return peak_memory(lambda: self.teachers[name].encode(pixels))

    def _count_body(self, size: Size) -> int:
        def run() -> None:
            summary, spatial = self._student.student(torch.empty(1, 3, *size))
            (summary.sum() + spatial.sum()).backward()

        return count_flops(run)

    def _count_forward(self, size: Size) -> int:
        with torch.no_grad():
            return count_flops(lambda: self._student.student(torch.empty(1, 3, *size)))

    def _count_head(self, name: str, grid: Size) -> int:
        width = self._student.student.embed_dim
        token = torch.empty(1, width, requires_grad=True)
        tokens = torch.empty(1, width, *grid, requires_grad=True)

        def run() -> None:
            prediction = self._student.adaptors[name](token, tokens)
            sum(part.sum() for part in prediction if part is not None).backward()

        return count_flops(run)

    def _peak_of_step(self, stage: str, passes: Sequence[Pass], images: int) -> int:
        kept, peaks = {}, []
        for item in passes:
            config = item.partition.config
            targets = {
                name: self._targets(stage, config, name, item.size, images)
                for name in config.teachers
            }
            kept |= {(name, value.spatial.shape): _bytes(value) for name, value in targets.items()}
            peaks.append(self._peak_of_pass(stage, item, images, targets))
        return sum(kept.values()) + max(peaks)

    def _peak_of_pass(
        self, stage: str, item: Pass, images: int, targets: Mapping[str, Features]
    ) -> int:
        config = item.partition.config
        calls = {
            name: self._call(stage, config, name, item.size, images) for name in config.teachers
        }
        teaching = [
            _bytes(targets[name]) + self._encode_memory(name, *call) for name, call in calls.items()
        ]
        return max(*teaching, peak_memory(lambda: self._learn(item, images, targets)))

    def _learn(self, item: Pass, images: int, targets: Mapping[str, Features]) -> None:
        """Run forward, losses and backward of one pass."""
        pixels = torch.empty(images, 3, *item.size)
        reduced = self.recipe.engine.precision == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            predictions = self._student(
                pixels, item.partition.config.teachers, draws=torch.empty(images, NUM_DRAWS)
            )
        weights = {f"{name}/{kind}": 1.0 for name in targets for kind in KINDS}
        report = distillation_loss(predictions, targets, self.recipe.loss, weights)
        report.total.sum().backward()


def _normalizer(name: str, channels: int) -> Normalizer:
    """Make a normalizer that works as a fitted one does."""
    normalizer: Normalizer = NORMALIZERS.get(name)()
    shapes = {"mean": (channels,), "scale": (), "rotation": (channels, channels)}
    state = {key: torch.empty(shapes[key]) for key in getattr(normalizer, "tensors", ())}
    return normalizer.load_state(state)


def _bytes(features: Features) -> int:
    tensors: list[Tensor] = [tensor for tensor in features if tensor is not None]
    return sum(tensor.nbytes for tensor in tensors)
