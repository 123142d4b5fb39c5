"""What the models of a recipe cost: operations for one picture, memory for a micro-batch.

The models run on fake tensors (:mod:`.measure`), each part once: stages and partitions share most
of what is measured. The student's memory includes that of its losses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..balance import NORMALIZERS
from ..config import PartitionConfig, Recipe, size_pair
from ..losses import distillation_loss
from ..models.distilled import DistilledStudent
from ..models.position import NUM_DRAWS
from ..partitions import Partition
from ..protocols import Normalizer, Teacher, Upsampler
from ..targets import input_size
from ..types import Features, Size
from .measure import count_flops, peak_memory


@dataclass(frozen=True)
class TeacherCost:
    """One teacher in one partition; operations are for one picture."""

    name: str
    size: Size
    """Of its input, in pixels."""
    grid: Size
    """Of the targets, in cells."""
    calls: int
    """Teacher images for one picture: 1, or what the upsampler needs."""
    encode_flops: int
    """Of all calls together, in the teacher's dtype."""
    other_flops: int
    """Of upsampler and normalizer, in float32."""


@dataclass(frozen=True)
class PartitionCost:
    """One partition; operations are for one picture."""

    partition: Partition
    tokens: int
    """Student tokens of one picture, summary tokens and registers included."""
    student_flops: int
    """Forward, backward and recomputation."""
    teachers: tuple[TeacherCost, ...]

    @property
    def teacher_flops(self) -> int:
        return sum(teacher.encode_flops + teacher.other_flops for teacher in self.teachers)


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
        self._head_flops = cache(self._count_head)
        self._encode_memory = cache(self._peak_of_encode)

    @property
    def parameters(self) -> int:
        """Number of parameters of student and heads."""
        return sum(parameter.numel() for parameter in self._student.parameters())

    def partition(self, stage: str, partition: Partition) -> PartitionCost:
        """Measure one picture of a partition."""
        body = self._student.student
        grid = body.grid(partition.size)
        names = partition.config.teachers
        return PartitionCost(
            partition=partition,
            tokens=grid[0] * grid[1] + body.num_prefix_tokens,
            student_flops=self._body_flops(partition.size)
            + sum(self._head_flops(name, grid) for name in names),
            teachers=tuple(self._teacher(stage, partition.config, name) for name in names),
        )

    def input_size(self, partition: PartitionConfig, name: str) -> Size:
        """Return the size at which a teacher sees a partition's images."""
        config, spec = self.recipe.teachers[name], self.teachers[name].spec
        return input_size(config, spec, partition, self.recipe.student.patch_size)

    def step_memory(self, stage: str, partition: Partition, images: int) -> int:
        """Return the most bytes that a micro-batch takes beside weights, gradients and moments.

        That is the targets and the larger of two: a teacher at work on the images of one call,
        with its own map, of which the normalizer makes the target; the student with its losses.
        """
        config = partition.config
        targets = {name: self._targets(stage, config, name, images) for name in config.teachers}
        sizes = {name: _bytes(target) for name, target in targets.items()}
        teaching = max(
            sizes[name] + self._encode_memory(name, *self._call(stage, config, name, images))
            for name in targets
        )
        learning = peak_memory(lambda: self._learn(partition, images, targets))
        return sum(sizes.values()) + max(teaching, learning)

    def _teacher(self, stage: str, partition: PartitionConfig, name: str) -> TeacherCost:
        size, grid = self.input_size(partition, name), self._grid(stage, partition, name)
        target = self._targets(stage, partition, name, 1)
        other = count_flops(lambda: self._normalizers[name].apply(target.spatial))
        calls, encode = 1, self.encode_flops(name, size)
        if name in partition.upsample:
            calls = self._upsamplers[stage].cost(grid)
            encode *= calls
            pixels = torch.empty(1, 3, *size_pair(partition.size))
            upsampler, teacher = self._upsamplers[stage], self.teachers[name]
            other += count_flops(lambda: upsampler(teacher, pixels, grid)) - encode
        return TeacherCost(name, size, grid, calls, encode, other)

    def _grid(self, stage: str, partition: PartitionConfig, name: str) -> Size:
        height, width = self.teachers[name].spec.grid(self.input_size(partition, name))
        factor = self._upsamplers[stage].factor if name in partition.upsample else 1
        return height * factor, width * factor

    def _targets(self, stage: str, partition: PartitionConfig, name: str, images: int) -> Features:
        spec, grid = self.teachers[name].spec, self._grid(stage, partition, name)
        width = spec.summary_channels
        summary = None if width is None else torch.empty(images, width)
        return Features(summary, torch.empty(images, spec.channels, *grid))

    def _call(
        self, stage: str, partition: PartitionConfig, name: str, images: int
    ) -> tuple[Size, int]:
        """Return size and number of the teacher images in one call of the encoder."""
        limit = self.recipe.teachers[name].micro_batch
        if name in partition.upsample:
            config = self.recipe.stages[stage].upsampler
            images *= self._upsamplers[stage].cost(self._grid(stage, partition, name))
            limit = config.micro_batch or limit
        return self.input_size(partition, name), min(images, limit or images)

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

    def _count_head(self, name: str, grid: Size) -> int:
        width = self._student.student.embed_dim
        token = torch.empty(1, width, requires_grad=True)
        tokens = torch.empty(1, width, *grid, requires_grad=True)

        def run() -> None:
            prediction = self._student.adaptors[name](token, tokens)
            sum(part.sum() for part in prediction if part is not None).backward()

        return count_flops(run)

    def _learn(self, partition: Partition, images: int, targets: Mapping[str, Features]) -> None:
        """Run forward, losses and backward of one micro-batch."""
        pixels = torch.empty(images, 3, *partition.size)
        reduced = self.recipe.engine.precision == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            predictions = self._student(
                pixels, partition.config.teachers, draws=torch.empty(images, NUM_DRAWS)
            )
        report = distillation_loss(predictions, targets, self.recipe.loss, self.recipe.teachers)
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
