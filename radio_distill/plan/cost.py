"""Floating-point operations of a recipe's models for one image, counted without running them.

The models run on fake tensors, which have shape, type and device but no data, so a training step of
any size is measured in seconds on any machine. Code whose course depends on values cannot be.
Counted as usual: matrix products, convolutions and attention, a multiplication and an addition as
two. Attention is its two products, once more for each in the backward pass; what a fused kernel
computes twice is left out. So are, being small: the margin of shifted crops, the noise on weights,
and the windows that are drawn in some steps (they save attention).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..distill.views import STUDENT
from ..models.heads import DistilledStudent
from ..normalize import NORMALIZERS
from ..protocols import Normalizer, Teacher, Upsampler
from ..stage import Partition, Stage
from ..teacher_view import TeacherView
from ..types import Features, Size


def fake_tensors() -> FakeTensorMode:
    """Return the mode under which to build and run what is measured."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_module(module: nn.Module) -> nn.Module:
    """Turn a module of the meta device, in place, into one of fake tensors on the CPU.

    Must run under :func:`fake_tensors`. Returns the module.
    """
    return module.to_empty(device="cpu")


def count_flops(run: Callable[[], Any]) -> int:
    """Return the operations of ``run``, backward pass and recomputation included."""
    with _slow_attention(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@contextmanager
def _slow_attention() -> Iterator[None]:
    """Keep attention in parts that every supported version of the counter knows."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class FlopsBySize:
    """The operations of a network by the size of its input.

    They are counted at three sizes at most. Between these lies a parabola in the input's area:
    exact for transformers, whose attention grows with the square of the tokens, and for
    convolutions.

    Args:
        count: counts them at one size, (height, width) in pixels.
        sizes: that will be asked for.
    """

    def __init__(self, count: Callable[[Size], int], sizes: Sequence[Size]):
        self._count = count
        self._areas = {math.prod(size): size for size in sizes}
        areas = sorted(self._areas)
        self._nodes = [areas[0], areas[len(areas) // 2], areas[-1]] if len(areas) > 3 else areas
        self._counted: dict[int, int] = {}

    def __call__(self, size: Size) -> int:
        """Return the operations for one input."""
        area = math.prod(size)
        if area in self._nodes or area not in self._areas:
            if area not in self._counted:
                self._counted[area] = self._count(self._areas.get(area, size))
            return self._counted[area]
        flops = 0.0
        for node in self._nodes:
            others = [other for other in self._nodes if other != node]
            share = math.prod((area - other) / (node - other) for other in others)
            flops += share * self(self._areas[node])
        return round(flops)


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
    """Forward, backward and recomputation; with MESA, the EMA's forward too."""
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
        return self._mean(lambda cost: cost.tokens)

    @property
    def student_flops(self) -> float:
        return self._mean(lambda cost: cost.student_flops)

    @property
    def teacher_flops(self) -> float:
        return self._mean(lambda cost: sum(teacher.flops for teacher in cost.teachers))

    @property
    def teachers(self) -> list[TeacherCost]:
        """Each way in which a teacher is used, once."""
        return list(dict.fromkeys(item for cost in self.passes.values() for item in cost.teachers))

    def _mean(self, of: Callable[[PassCost], float]) -> float:
        return sum(of(self.passes[size]) for size in self.partition.sizes) / len(
            self.partition.sizes
        )


class ModelCosts:
    """Counts the operations of a recipe's models.

    What is handed in consists of fake tensors on the CPU, made under the mode of
    :func:`fake_tensors`; the methods are called under it too.

    Args:
        stages: of one recipe, resolved, by name.
        student: the student with its heads.
        teachers: the recipe's teachers, by name.
        upsamplers: by stage name.
    """

    def __init__(
        self,
        stages: Mapping[str, Stage],
        student: DistilledStudent,
        teachers: Mapping[str, Teacher],
        upsamplers: Mapping[str, Upsampler],
    ):
        self.stages, self.student = stages, student
        self.teachers, self.upsamplers = teachers, upsamplers
        partitions = [item for stage in stages.values() for item in stage.partitions]
        sizes = [size for item in partitions for size in item.sizes]
        self._body = FlopsBySize(self._count_body, sizes)
        self._forward = FlopsBySize(self._count_forward, sizes)
        self._encode = {
            name: FlopsBySize(
                lambda size, teacher=teacher: count_flops(  # type: ignore[misc]
                    lambda: teacher.encode(torch.empty(1, 3, *size))
                ),
                [view.encoded for stage in stages.values() for _, view in stage.views(name)],
            )
            for name, teacher in teachers.items()
        }
        for parameter in student.parameters():
            parameter.grad = torch.empty_like(parameter)  # memory of a step does not include it
        self._partitions: dict[tuple[str, str], PartitionCost] = {}

    @cached_property
    def parameters(self) -> int:
        """Number of parameters of student and heads."""
        return sum(parameter.numel() for parameter in self.student.parameters())

    @cached_property
    def normalizers(self) -> dict[str, Normalizer]:
        """One for each teacher, which works as a fitted one does."""
        normalizers = {}
        for name, teacher in self.teachers.items():
            channels = teacher.spec.channels
            kind = next(iter(self.stages.values())).normalizer.name
            normalizer: Normalizer = NORMALIZERS.get(kind)()
            shapes = {"mean": (channels,), "scale": (), "rotation": (channels, channels)}
            state = {key: torch.empty(shapes[key]) for key in getattr(normalizer, "tensors", ())}
            normalizers[name] = normalizer.load_state(state)
        return normalizers

    def partition(self, stage: Stage, partition: Partition) -> PartitionCost:
        """Count the operations for one image of a partition at each of its sizes."""
        key = stage.name, partition.name
        if key not in self._partitions:
            passes = {size: self._pass(stage, partition, size) for size in partition.sizes}
            self._partitions[key] = PartitionCost(partition, passes)
        return self._partitions[key]

    def own_grid_flops(self, partition: Partition, name: str) -> float:
        """Return a teacher's operations for one image of a partition, without upsampler."""
        views = [partition.views[size][name] for size in partition.sizes]
        flops = [self._encode[name](view.encoded) / view.images_per_input for view in views]
        return sum(flops) / len(flops)

    def target(self, view: TeacherView, images: int) -> Features:
        """Return features of the shape of a view's targets."""
        spec = self.teachers[view.teacher].spec
        width = None if view.mosaic else spec.summary_channels
        summary = None if width is None else torch.empty(images, width)
        return Features(summary, torch.empty(images, spec.channels, *view.grid))

    def _pass(self, stage: Stage, partition: Partition, size: Size) -> PassCost:
        body, views = self.student.student, partition.views[size]
        grid = body.grid(size)
        flops = self._body(size) + (self._forward(size) if stage.loss.mesa else 0)
        flops += sum(self._count_head(name, grid) for name in partition.teachers)
        return PassCost(
            rendered={STUDENT: size, **{name: view.rendered for name, view in views.items()}},
            tokens=grid[0] * grid[1] + body.num_prefix_tokens,
            student_flops=flops,
            teachers=tuple(self._teacher(stage, view, size) for view in views.values()),
        )

    def _teacher(self, stage: Stage, view: TeacherView, size: Size) -> TeacherCost:
        name, upsampler = view.teacher, self.upsamplers[stage.name]
        target = self.target(view, 1)
        other = count_flops(lambda: self.normalizers[name].apply(target.spatial))
        calls, encode = 1, self._encode[name](view.encoded)
        if view.is_upsampled:
            calls = upsampler.cost(view.grid)
            encode *= calls
            teacher, pixels = self.teachers[name], torch.empty(1, 3, *size)
            other += count_flops(lambda: upsampler(teacher, pixels, view.grid)) - encode
        return TeacherCost(view, calls, encode, other)

    def _count_body(self, size: Size) -> int:
        def run() -> None:
            summary, spatial = self.student.student(torch.empty(1, 3, *size))
            (summary.sum() + spatial.sum()).backward()

        return count_flops(run)

    def _count_forward(self, size: Size) -> int:
        with torch.no_grad():
            return count_flops(lambda: self.student.student(torch.empty(1, 3, *size)))

    def _count_head(self, name: str, grid: Size) -> int:
        width = self.student.student.embed_dim
        token = torch.empty(1, width, requires_grad=True)
        tokens = torch.empty(1, width, *grid, requires_grad=True)

        def run() -> None:
            prediction = self.student.heads[name](token, tokens)
            sum(part.sum() for part in prediction if part is not None).backward()

        return count_flops(run)
