"""What the models of a recipe cost: operations for one image, memory for a micro-batch.

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

from ..config import Facts, Recipe
from ..distill.losses import KINDS, distillation_loss
from ..distill.micro_batches import Pass
from ..distill.views import STUDENT
from ..models.heads import DistilledStudent
from ..models.position import NUM_DRAWS
from ..normalize import NORMALIZERS
from ..protocols import Normalizer, Teacher, Upsampler
from ..stage import Partition, Stage, TeacherView, resolve_stage
from ..system.precision import autocast
from ..types import Features, Size
from .measure import count_flops, peak_memory

_FLOAT = 4  # bytes


@dataclass(frozen=True)
class TeacherCost:
    """One teacher in one partition, at one size of the student's."""

    view: TeacherView
    calls: int
    """Teacher images for one image: 1, or what the upsampler needs."""
    encode_flops: int
    """Of all calls for one image, or of one canvas; in the teacher's dtype."""
    other_flops: int
    """Of upsampler and normalizer for one image, in float32."""

    @property
    def flops(self) -> float:
        """Operations for one image, on full canvases."""
        return self.encode_flops / self.view.images_per_input + self.other_flops


@dataclass(frozen=True)
class PassCost:
    """One partition at one size; operations are for one image."""

    rendered: Mapping[str, Size]
    """Size of each encoder's view, in pixels."""
    tokens: int
    """Student tokens of one image, summary tokens and registers included."""
    student_flops: int
    """Forward, backward and recomputation; with MESA, the averaged student's forward too."""
    teachers: tuple[TeacherCost, ...]


@dataclass(frozen=True)
class PartitionCost:
    """One partition; its figures are means over the sizes that a step may draw, for one image."""

    partition: Partition
    passes: Mapping[Size, PassCost]

    @property
    def rendered(self) -> list[Size]:
        """Sizes of all views, in pixels, the smallest first."""
        return sorted({size for cost in self.passes.values() for size in cost.rendered.values()})

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

    def stage(self, name: str) -> Stage:
        """Return a stage as it will run, but for what the shards and the machine decide."""
        specs = {teacher: item.spec for teacher, item in self.teachers.items()}
        return resolve_stage(self.recipe, name, specs, Facts())

    def partition(self, stage: Stage, partition: Partition) -> PartitionCost:
        """Measure one image of a partition at each of its sizes."""
        key = stage.name, partition.name
        if key not in self._partitions:
            passes = {size: self._pass(stage, partition, size) for size in partition.sizes}
            self._partitions[key] = PartitionCost(partition, passes)
        return self._partitions[key]

    def own_grid_flops(self, partition: Partition, name: str) -> float:
        """Return a teacher's operations for one image of a partition, without upsampler."""
        views = [partition.views[size][name] for size in partition.sizes]
        flops = [self.encode_flops(name, view.encoded) / view.images_per_input for view in views]
        return sum(flops) / len(flops)

    def step_memory(self, stage: Stage, passes: Sequence[Pass], images: int) -> int:
        """Return the most bytes that a micro-batch takes beside weights, gradients and moments.

        That is the views of its images, the targets of all passes over them, and the larger of two:
        a teacher at work on the images of one call, with its own map, of which the normalizer makes
        the target; the student with its losses.
        """
        key = (stage.name, images, *((item.partition.name, item.size) for item in passes))
        if key not in self._step_memory:
            self._step_memory[key] = self._peak_of_step(stage, passes, images)
        return self._step_memory[key]

    def _pass(self, stage: Stage, partition: Partition, size: Size) -> PassCost:
        body, views = self._student.student, partition.views[size]
        grid = body.grid(size)
        flops = self._body_flops(size)
        flops += sum(self._head_flops(name, grid) for name in partition.teachers)
        if stage.loss.mesa:
            flops += self._forward_flops(size)
        return PassCost(
            rendered={STUDENT: size, **{name: view.rendered for name, view in views.items()}},
            tokens=grid[0] * grid[1] + body.num_prefix_tokens,
            student_flops=flops,
            teachers=tuple(self._teacher(stage, view, size) for view in views.values()),
        )

    def _teacher(self, stage: Stage, view: TeacherView, size: Size) -> TeacherCost:
        name, upsampler = view.teacher, self._upsamplers[stage.name]
        target = self._target(view, 1)
        other = count_flops(lambda: self._normalizers[name].apply(target.spatial))
        calls, encode = 1, self.encode_flops(name, view.encoded)
        if view.is_upsampled:
            calls = upsampler.cost(view.grid)
            encode *= calls
            teacher, pixels = self.teachers[name], torch.empty(1, 3, *size)
            other += count_flops(lambda: upsampler(teacher, pixels, view.grid)) - encode
        return TeacherCost(view, calls, encode, other)

    def _target(self, view: TeacherView, images: int) -> Features:
        spec = self.teachers[view.teacher].spec
        width = None if view.mosaic else spec.summary_channels
        summary = None if width is None else torch.empty(images, width)
        return Features(summary, torch.empty(images, spec.channels, *view.grid))

    def _call(self, stage: Stage, view: TeacherView, images: int) -> int:
        """Return the number of teacher images in one call of the encoder."""
        limit, inputs = stage.teachers[view.teacher].micro_batch, view.inputs(images)
        if view.is_upsampled:
            inputs *= self._upsamplers[stage.name].cost(view.grid)
            limit = stage.upsampler.micro_batch or limit
        return min(inputs, limit or inputs)

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
            prediction = self._student.heads[name](token, tokens)
            sum(part.sum() for part in prediction if part is not None).backward()

        return count_flops(run)

    def _peak_of_step(self, stage: Stage, passes: Sequence[Pass], images: int) -> int:
        kept: dict[TeacherView, int] = {}
        peaks = []
        sizes = {view.rendered for item in passes for view in item.views.values()}
        sizes |= {item.size for item in passes}
        pixels = _FLOAT * images * 3 * sum(map(math.prod, sizes))
        for item in passes:
            targets = {name: self._target(view, images) for name, view in item.views.items()}
            kept |= {view: _bytes(targets[view.teacher]) for view in item.views.values()}
            peaks += [
                kept[view]
                + self._encode_memory(view.teacher, view.encoded, self._call(stage, view, images))
                for view in item.views.values()
            ]
            peaks.append(self._peak_of_learning(item, images, targets))
        return pixels + sum(kept.values()) + max(peaks)

    def _peak_of_learning(self, item: Pass, images: int, targets: Mapping[str, Features]) -> int:
        pixels = torch.empty(images, 3, *item.size)
        return peak_memory(lambda: self._learn(item, pixels, targets))

    def _learn(self, item: Pass, pixels: Tensor, targets: Mapping[str, Features]) -> None:
        """Run forward, losses and backward of one pass."""
        with autocast(self.recipe.engine.precision, torch.device("cpu")):
            predictions = self._student(
                pixels, item.partition.teachers, draws=torch.empty(len(pixels), NUM_DRAWS)
            )
        weights = {f"{name}/{kind}": 1.0 for name in targets for kind in KINDS}
        report = distillation_loss(predictions.features, targets, self.recipe.loss, weights)
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
