"""Work of a recipe's models: operations, memory traffic and kernels, counted without running them.

The costs of one micro-batch of a partition are those of :attr:`PartitionCost.passes` at its size:
``costs.partition(stage, partition).passes[size]`` gives ``student(images)``, and for each teacher
``encode(inputs)``; both are :class:`.meter.Work`, whose ``flops`` serve to deal work by cost.

Left out, being small: the losses, the margin of shifted crops, the noise on weights, and the
windows that are drawn in some steps (they save attention).
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..distill.relations import teachers_related
from ..distill.targets import upsampled
from ..distill.views import STUDENT
from ..models.heads import DistilledStudent
from ..models.spectral import ReparametrizedLinear, begin_step, closing_loss, share_matrices
from ..normalize import NORMALIZERS
from ..normalize.affine import Affine
from ..normalize.statistics import Moments
from ..protocols import Normalizer, Teacher, Upsampler
from ..stage import Partition, Stage
from ..system.precision import autocast
from ..teacher_view import TeacherView
from ..types import Features, Size
from .meter import Work, measure_work, share_equal_blocks, structure


@dataclass(frozen=True)
class BatchWork:
    """The work of a network on some inputs of one size."""

    one: Work
    """On one input."""
    fixed: float = 0
    """Bytes of its traffic that do not grow with the inputs: weights that are cast or derived."""

    def __call__(self, inputs: float) -> Work:
        """Return the work on some inputs at once."""
        more = self.growth * (inputs - 1)
        return self.one + replace(more, kernels=0, block_kernels=0)

    @property
    def growth(self) -> Work:
        """The work of one input more, without the kernels, of which there are as many."""
        share = 1 - self.fixed / self.one.traffic if self.fixed else 1
        grown = self.one * share
        return replace(grown, flops=self.one.flops, kernels=0, block_kernels=0)

    def __add__(self, other: "BatchWork") -> "BatchWork":
        return BatchWork(self.one + other.one, self.fixed + other.fixed)


class WorkBySize:
    """The work of a network by the size of its input.

    It is measured at three sizes at most. Between these lies a parabola in the input's area: exact
    for the operations of transformers, whose attention grows with the square of the tokens, and of
    convolutions.

    Args:
        measure: measures it for some inputs of one size, (height, width) in pixels.
        sizes: that will be asked for.
    """

    def __init__(self, measure: Callable[[Size, int], Work], sizes: Sequence[Size]):
        self._measure = measure
        self._areas = {math.prod(size): size for size in sizes}
        areas = sorted(self._areas)
        self._nodes = [areas[0], areas[len(areas) // 2], areas[-1]] if len(areas) > 3 else areas
        self._measured: dict[int, Work] = {}

    def __call__(self, size: Size) -> BatchWork:
        """Return the work on inputs of one size."""
        return BatchWork(self._one(size), self._fixed)

    def _one(self, size: Size) -> Work:
        area = math.prod(size)
        if area in self._nodes or area not in self._areas:
            if area not in self._measured:
                self._measured[area] = self._measure(self._areas.get(area, size), 1)
            return self._measured[area]
        work = Work()
        for node in self._nodes:
            others = [other for other in self._nodes if other != node]
            share = math.prod((area - other) / (node - other) for other in others)
            work += self._one(self._areas[node]) * share
        return Work(*(round(getattr(work, item.name)) for item in fields(Work)))

    @cached_property
    def _fixed(self) -> float:
        size = self._areas[self._nodes[0]]
        return max(2 * self._one(size).traffic - self._measure(size, 2).traffic, 0)


@dataclass(frozen=True)
class TeacherCost:
    """One teacher in one partition, at one size of the student's."""

    view: TeacherView
    calls: int
    """Teacher images for one image: 1, or what the upsampler needs."""
    encode: BatchWork
    """Of one call on some inputs: images or tiles of them, or canvases; in the teacher's dtype."""
    other: BatchWork
    """Of upsampler and normalizer for some images, in float32."""

    @property
    def encode_flops(self) -> float:
        """Operations of all calls for one image, or of one canvas."""
        return self.calls * self.encode.one.flops

    @property
    def other_flops(self) -> float:
        """Operations of upsampler and normalizer for one image."""
        return self.other.one.flops

    @property
    def flops(self) -> float:
        """Operations for one image, on full canvases."""
        return self.encode_flops / self.view.images_per_input + self.other_flops


@dataclass(frozen=True)
class PassCost:
    """One partition at one size."""

    rendered: Mapping[str, Size]
    """Size of each encoder's view, in pixels."""
    tokens: int
    """Student tokens of one image, summary tokens and registers included."""
    student: BatchWork
    """Forward, backward and recomputation; with MESA, the EMA's forward too."""
    teachers: tuple[TeacherCost, ...]

    @property
    def student_flops(self) -> float:
        """Operations for one image."""
        return self.student.one.flops


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
        self._body = WorkBySize(self._measure_body, sizes)
        self._forward = WorkBySize(self._measure_forward, sizes)
        grids = [student.student.grid(size) for size in sizes]
        self._heads = {
            name: WorkBySize(partial(self._measure_head, name), grids) for name in teachers
        }
        self._encode, self._normalize = {}, {}
        for name, teacher in teachers.items():
            views = [view for stage in stages.values() for _, view in stage.views(name)]
            self._encode[name] = WorkBySize(
                partial(_measure_encode, teacher), [view.encoded for view in views]
            )
            self._normalize[name] = WorkBySize(
                partial(self._measure_normalizer, name),
                [view.grid for view in views if not view.is_upsampled],
            )
        for teacher in teachers.values():
            if isinstance(tower := getattr(teacher, "tower", None), nn.Module):
                share_equal_blocks(tower)
        engine = next(iter(stages.values())).engine
        self.precision, self._cuts_weights = engine.precision, engine.zero_stage == 3
        for parameter in student.parameters():
            parameter.grad = torch.empty_like(parameter)  # memory of a step does not include it
        self._partitions: dict[tuple[str, str], PartitionCost] = {}
        self.known_peaks: dict[Hashable, int] = {}
        self.known_growth: dict[Hashable, Sequence[int]] = {}
        """What :mod:`.memory` has measured."""

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
            kind = next(iter(self.stages.values())).recipe.normalizers[name]
            normalizer: Normalizer = NORMALIZERS.get(kind)()
            shapes = {"mean": (channels,), "scale": (), "rotation": (channels, channels)}
            if isinstance(normalizer, Affine) and shapes.keys() >= set(normalizer.tensors):
                # Fitting PHI-S to 4,096 channels takes half a minute.
                normalizer.load_state({key: torch.empty(shapes[key]) for key in normalizer.tensors})
            else:  # such as a plug-in's: what its state consists of, fitting alone says
                with unset_fake_temporarily():
                    normalizer.fit(Moments.standard(channels))
            normalizers[name] = normalizer
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
        flops = [
            self._encode[name](view.encoded).one.flops / view.images_per_input for view in views
        ]
        return sum(flops) / len(flops)

    def target(self, view: TeacherView, images: int) -> Features:
        """Return features of the shape of a view's targets."""
        spec = self.teachers[view.teacher].spec
        width = None if view.mosaic else spec.summary_channels
        summary = None if width is None else torch.empty(images, width)
        return Features(summary, torch.empty(images, spec.channels, *view.grid))

    @cached_property
    def few_blocks(self) -> int:
        """How many of the student's first blocks tell of all: those unlike the last, and one."""
        body = self.student.student
        kinds = [structure(block) for block in body.blocks]
        # Global blocks among others are not equal, nor is a head for all blocks one for a few.
        if not kinds or body.window_size or self.student.reads_blocks:
            return len(kinds)
        return next(at for at in range(len(kinds)) if len(set(kinds[at:])) == 1) + 1

    @contextmanager
    def with_blocks(self, blocks: Iterable[nn.Module]) -> Iterator[None]:
        """Give the student other blocks for a while."""
        body = self.student.student
        own = body.blocks
        body.blocks = nn.ModuleList(blocks)
        try:
            yield
        finally:
            body.blocks = own

    def by_depth(self, run: Callable[[], None]) -> Work:
        """Measure the student with few blocks: its work grows by the same with each equal one."""
        blocks, few = self.student.student.blocks, self.few_blocks
        rest = len(blocks) - few
        if not few:
            return measure_work(run)
        with self.with_blocks(()):
            outside = measure_work(run)
        if rest < 2:
            return outside + (measure_work(run) - outside).inside_blocks()
        with self.with_blocks(blocks[:few]):
            inside = measure_work(run) - outside
        with self.with_blocks(blocks[: few + 1]):
            inside += (measure_work(run) - outside - inside) * rest
        return outside + inside.inside_blocks()

    @contextmanager
    def sharing_matrices(self) -> Iterator[None]:
        """Let passes run as in a step: matrices are derived before and have gradients already."""
        is_shared = not self._cuts_weights and share_matrices(self.student)
        for layer in self.student.modules():
            if isinstance(layer, ReparametrizedLinear) and layer.shared is not None:
                layer.shared.grad = torch.empty_like(layer.shared)
        yield
        if is_shared:
            closing_loss(self.student).backward()

    @cached_property
    def matrices(self) -> Work:
        """Once a step: deriving the matrices that passes share, and handing on their gradients."""

        def run() -> None:
            begin_step(self.student, 0)
            with self.sharing_matrices():
                pass

        return measure_work(run)

    def student_pass(self, size: Size, images: int) -> Callable[[], None]:
        """Return what runs the student, without heads, forward and backward."""

        def run() -> None:
            with autocast(self.precision, torch.device("cpu")):
                summary, spatial = self._run(images, size)
            (summary.sum() + spatial.sum()).backward()

        return run

    def _pass(self, stage: Stage, partition: Partition, size: Size) -> PassCost:
        body, views = self.student.student, partition.views[size]
        grid = body.grid(size)
        work = self._body(size)
        related = teachers_related(stage, partition)
        for _ in filter(None, (stage.loss.mesa, stage.anchor, related)):
            work += self._forward(size)  # once more
        for name in partition.teachers:
            work += self._heads[name](grid)
        return PassCost(
            rendered={STUDENT: size, **{name: view.rendered for name, view in views.items()}},
            tokens=grid[0] * grid[1] + body.num_prefix_tokens,
            student=work,
            teachers=tuple(self._teacher(stage, view, size) for view in views.values()),
        )

    def _teacher(self, stage: Stage, view: TeacherView, size: Size) -> TeacherCost:
        name, upsampler = view.teacher, self.upsamplers[stage.name]
        normalizer = self.normalizers[name]
        calls, encode = 1, self._encode[name](view.encoded)
        if view.is_upsampled:
            calls = upsampler.cost(view.grid)
            teacher = self.teachers[name]
            pixels = torch.empty(1, len(teacher.spec.mean), *size)
            whole = measure_work(
                lambda: upsampled(upsampler, teacher, pixels, view.grid, normalizer)
            )
            encodes = encode(calls)
            other = Work(
                whole.flops - encodes.flops,
                max(whole.traffic - encodes.traffic, 0),
                max(whole.kernels - encodes.kernels, 0),
            )
        else:
            other = self._normalize[name](view.grid).one
        return TeacherCost(view, calls, encode, BatchWork(other))

    def _measure_body(self, size: Size, images: int) -> Work:
        with self.sharing_matrices():
            return self.by_depth(self.student_pass(size, images))

    def _measure_forward(self, size: Size, images: int) -> Work:
        def run() -> None:
            with torch.no_grad(), autocast(self.precision, torch.device("cpu")):
                self._run(images, size)

        return self.by_depth(run)

    def _run(self, images: int, size: Size) -> tuple[torch.Tensor, ...]:
        body = self.student.student
        outputs: tuple[torch.Tensor, ...] = body(torch.empty(images, body.bands, *size))
        return outputs

    def _measure_normalizer(self, name: str, grid: Size, images: int) -> Work:
        spatial = torch.empty(images, self.teachers[name].spec.channels, *grid)
        return measure_work(lambda: self.normalizers[name].apply(spatial))

    def _measure_head(self, name: str, grid: Size, images: int) -> Work:
        body = self.student.student
        token = torch.empty(images, body.summary_dim, requires_grad=True)
        tokens = torch.empty(images, body.embed_dim, *grid, requires_grad=True)
        head, depth = self.student.heads[name], self.student.student.depth
        inner = [token, tokens] * depth if head.reads_blocks else []
        levels = self.student.inner_heads(name).values()

        def run() -> None:
            with autocast(self.precision, torch.device("cpu")):
                parts = list(head(token, tokens, *inner))
                parts += [level(token, tokens).spatial for level in levels]
            sum(part.sum() for part in parts if part is not None).backward()

        return measure_work(run)


def _measure_encode(teacher: Teacher, size: Size, images: int) -> Work:
    bands = len(teacher.spec.mean)
    return measure_work(lambda: teacher.encode(torch.empty(images, bands, *size)))
