"""Memory of one device, for P parameters of student and heads, W devices, ZeRO stage z:

    weights    4 P, under z = 3 divided by W; from z = 1 on also DeepSpeed's master copy, 4 P / W
    gradients  4 P, from z = 2 on divided by W
    optimizer  8 P (two moments), from z = 1 on divided by W
    average    4 P for the student's EMA: of the first device, of all where it teaches (MESA)
    teachers   every teacher of the recipe, matrices in its dtype: each device holds all of them
    step       what the largest micro-batch takes beside these, see :func:`step_memory`

Left out: CUDA's own share, communication buffers, fragmentation (:data:`USABLE` leaves room for
them), and the parameters that ZeRO 3 gathers for a moment. Kernels are those of a CPU; their
temporary buffers are not seen, on a GPU they differ.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch

from ..config import EngineConfig
from ..distill.losses import KINDS, distillation_loss, weighted_inner
from ..distill.micro_batches import Pass, images_together
from ..models.position import NUM_DRAWS
from ..stage import Partition, Stage
from ..system.precision import autocast
from ..teacher_view import TeacherView
from ..types import Features, Size
from .cost import ModelCosts
from .meter import peak_memory, peaks_memory

GIB = 2**30
USABLE = 0.9
"""Share of a device's memory that tensors may fill. Assumed."""
SAFETY = 0.8
"""Share of the room for a step that an automatic micro-batch may fill: kernels differ. Assumed."""
MOST_IMAGES = 128
"""Images of an automatic micro-batch: with more, launches are no smaller part of the time."""
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device."""

    weights: float
    gradients: float
    optimizer: float
    average: float = 0
    teachers: float = 0
    step: float = 0

    @property
    def total(self) -> float:
        state = self.weights + self.gradients + self.optimizer + self.average
        return state + self.teachers + self.step

    def fits(self, gib: float) -> bool:
        """Return whether it leaves the room that :data:`USABLE` asks for on so much memory."""
        return self.total <= USABLE * gib * GIB


def state_memory(parameters: int, zero_stage: int, devices: int) -> Memory:
    """Return the bytes of float32 weights, gradients and moments on one of some devices."""
    whole, part = 4 * parameters, 4 * parameters / devices
    return Memory(
        weights=(part if zero_stage == 3 else whole) + (part if zero_stage else 0),
        gradients=part if zero_stage >= 2 else whole,
        optimizer=2 * (part if zero_stage else whole),
    )


def resident_memory(costs: ModelCosts, stage: Stage, devices: int, teacher_bytes: int) -> Memory:
    """Return what stays on the fullest device from step to step."""
    others = bool(stage.config.ema_decay) + bool(stage.anchor)
    return replace(
        state_memory(costs.parameters, _zero_stage(stage.engine, devices), devices),
        average=4 * costs.parameters * others,
        teachers=teacher_bytes,
    )


def with_micro_batches(stage: Stage, costs: ModelCosts, resident: Memory, gib: float) -> Stage:
    """Return a stage with the micro-batches that `auto` means on devices of so much memory."""
    if stage.engine.micro_batch != "auto":
        return stage
    room = USABLE * gib * GIB - resident.total
    return replace(stage, micro_batches=micro_batches_that_fit(costs, stage, room))


def micro_batches_that_fit(
    costs: ModelCosts, stage: Stage, room: float
) -> dict[tuple[str, Size], int]:
    """Return the most images of a pass, by partition and size, for which a step has room.

    That is a number of canvases, or of images, which is a power of two; at least one. Partitions
    that show the same images are looked at together, the others at their largest sizes.

    The student's part is measured at a partition's largest size. At a smaller one it is taken to
    grow with tokens and images as a whole, copies of weights in another dtype too, which do not: so
    what is found fits, but may be half of the most where such copies are much of the room.

    Args:
        costs: of the recipe's models.
        stage: resolved.
        room: bytes beside weights, gradients, moments and teachers; a part is left free of it.
    """
    groups: dict[str, list[Partition]] = {}
    for partition in stage.partitions:
        groups.setdefault(partition.images_of or partition.name, []).append(partition)
    found = {}
    for group in groups.values():
        found.update(_fitting_together(costs, stage, group, room * SAFETY))
    return found


def _fitting_together(
    costs: ModelCosts, stage: Stage, group: Sequence[Partition], room: float
) -> dict[tuple[str, Size], int]:
    """Return the same for partitions that show the same images, and all of ``room``."""
    largest = {
        item.name: Pass(item, max(item.sizes, key=math.prod), item.image_weight) for item in group
    }
    passes = list(largest.values())
    most = _most_images(passes, room, lambda images: step_memory(costs, stage, passes, images))

    def in_proportion(item: Pass, images: int) -> float:
        measured = largest[item.partition.name]
        sizes = costs.partition(stage, item.partition).passes
        share = images * sizes[item.size].tokens / (most * sizes[measured.size].tokens)
        return share * _learning_memory(costs, stage, measured, most)

    def most_at(name: str, size: Size) -> int:
        if size == largest[name].size:
            return most
        passes = list({**largest, name: replace(largest[name], size=size)}.values())
        return _most_images(
            passes, room, lambda images: step_memory(costs, stage, passes, images, in_proportion)
        )

    return {(item.name, size): most_at(item.name, size) for item in group for size in item.sizes}


def _most_images(passes: Sequence[Pass], room: float, needed: Callable[[int], float]) -> int:
    """Return the most images of a micro-batch that needs no more than ``room`` bytes."""
    unit = images_together(passes)
    units = _power_of_two(max(min(passes[0].partition.batch_size, MOST_IMAGES) // unit, 1))
    while units > 1 and (memory := needed(unit * units)) > room:
        # Part of it does not grow with the images: in proportion there are never too few.
        units = min(units // 2, _power_of_two(max(int(units * room / memory), 1)))
    return unit * units


def _power_of_two(number: int) -> int:
    """Return the largest power of two that is no more than a positive number."""
    return 1 << (number.bit_length() - 1)


def step_memory(
    costs: ModelCosts,
    stage: Stage,
    passes: Sequence[Pass],
    images: int,
    learning: Callable[[Pass, int], float] | None = None,
) -> float:
    """Return the most bytes that a micro-batch takes beside weights, gradients and moments.

    That is the views of its images, the targets of all passes over them, and the larger of two: a
    teacher at work on the images of one call, with its own map, of which the normalizer makes the
    target; the student with its losses, which is measured unless ``learning`` tells it.
    """
    sizes = {view.rendered for item in passes for view in item.views.values()}
    sizes |= {item.size for item in passes}
    pixels = _FLOAT * images * stage.data.bands * sum(map(math.prod, sizes))
    kept: dict[TeacherView, int] = {}
    peaks: list[float] = []
    for item in passes:
        for view in item.views.values():
            target = costs.target(view, images)
            kept[view] = sum(part.nbytes for part in target if part is not None)
            peaks.append(kept[view] + _encode_memory(costs, stage, view, images))
        if learning is None:
            peaks.append(_learning_memory(costs, stage, item, images))
        else:
            peaks.append(learning(item, images))
    return pixels + sum(kept.values()) + max(peaks)


def _encode_memory(costs: ModelCosts, stage: Stage, view: TeacherView, images: int) -> int:
    """Return what a teacher takes for the images of one call."""
    limit, inputs = stage.teachers[view.teacher].micro_batch, view.inputs(images)
    if view.is_upsampled:
        inputs *= costs.upsamplers[stage.name].cost(view.grid)
        limit = stage.upsampler.micro_batch or limit
    key = view.teacher, view.encoded, min(inputs, limit or inputs)
    if key not in costs.known_peaks:
        teacher = costs.teachers[view.teacher]
        pixels, encode = torch.empty(key[2], len(teacher.spec.mean), *view.encoded), teacher.encode
        costs.known_peaks[key] = peak_memory(lambda: encode(pixels))
    return costs.known_peaks[key]


def _learning_memory(costs: ModelCosts, stage: Stage, item: Pass, images: int) -> int:
    """Return what forward, losses and backward of one pass take."""

    def predict() -> tuple[dict[str, Features], dict[str, list[torch.Tensor]]]:
        with autocast(stage.engine.precision, torch.device("cpu")):
            draws = torch.empty(images, NUM_DRAWS)
            predictions = costs.student(pixels, item.partition.teachers, draws=draws)
            return predictions.features, predictions.inner

    def learn(
        predictions: tuple[dict[str, Features], dict[str, list[torch.Tensor]]],
    ) -> None:
        weights = {f"{name}/{kind}": 1.0 for name in targets for kind in KINDS}
        features, inner = predictions
        asked = weighted_inner(inner, stage.student)
        report = distillation_loss(features, targets, stage.losses, weights, inner=asked)
        report.total.sum().backward()

    pixels = torch.empty(images, stage.data.bands, *item.size)
    targets = {name: costs.target(view, images) for name, view in item.views.items()}
    inputs = images, item.size, stage.engine.precision
    key = *inputs, tuple(item.views.values()), repr(stage.losses)
    if key not in costs.known_peaks:
        costs.known_peaks[key] = max(_peaks(costs, inputs, lambda: peaks_memory(predict, learn)))
    return costs.known_peaks[key]


def _peaks(
    costs: ModelCosts, inputs: Hashable, measure: Callable[[], Sequence[int]]
) -> Sequence[int]:
    """Return what ``measure`` says of the student, measured with few blocks.

    In the forward pass and after it, each by itself, the peak grows by the same with each of the
    student's equal blocks: by what a block keeps. ``inputs`` are equal where that is. So it is what
    all blocks run take, which is tested; small students are measured whole.
    """
    blocks, few = costs.student.student.blocks, costs.few_blocks + 1
    rest = len(blocks) - few
    if rest < 6:
        return measure()
    with costs.with_blocks(blocks[:few]):
        peaks = measure()
    if inputs not in costs.known_growth:
        with costs.with_blocks(blocks[: few + 1]):
            costs.known_growth[inputs] = [
                more - less for more, less in zip(measure(), peaks, strict=True)
            ]
    growth = costs.known_growth[inputs]
    return [peak + rest * each for peak, each in zip(peaks, growth, strict=True)]


def _zero_stage(engine: EngineConfig, devices: int) -> int:
    """Return the ZeRO stage that will run: a single process has none unless it asks for it."""
    assert engine.zero_stage != "auto", "the stage is not resolved"
    return engine.zero_stage if devices > 1 or engine.name == "deepspeed" else 0
