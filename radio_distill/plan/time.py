"""What a stage costs on given devices: operations, memory, time; found without weights or data.

The images of a step are dealt to devices as the trainer deals them, and a step takes as long as its
busiest device; where sizes are drawn, the time is the mean over the draws. Time is operations /
(peak * utilisation): the utilisation is an assumption, and every figure of time stands and falls
with it. Left out: communication, evaluation, checkpoints. Decoding runs beside the devices; what it
asks of the processors, :attr:`StagePlan.decoding_cores`, is told apart from the time.

Memory of one device, for P parameters of student and heads, W devices, ZeRO stage z:

    weights    4 P, under z = 3 divided by W; from z = 1 on also DeepSpeed's master copy, 4 P / W
    gradients  4 P, from z = 2 on divided by W
    optimizer  8 P (two moments), from z = 1 on divided by W
    average    4 P for the averaged student: of the first device, of all where it teaches (MESA)
    teachers   every teacher of the recipe, matrices in its dtype: each device holds all of them
    step       what the largest micro-batch takes beside these, see :mod:`.costs`

Left out of it: CUDA's own share, communication buffers, fragmentation (:data:`USABLE` leaves room
for them), and the parameters that ZeRO 3 gathers for a moment.
"""

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..config import EngineConfig, StageConfig, share_of
from ..distill.micro_batches import MicroBatch, assign_micro_batches
from ..stage import Partition, Stage
from ..types import Size
from .cost import ModelCosts, PartitionCost, TeacherCost

GIB = 2**30
UTILISATION = 0.35
"""Share of the peak that a step reaches. Assumed: transformers are trained at 0.3 to 0.5."""
USABLE = 0.9
"""Share of a device's memory that tensors may fill. Assumed."""
DECODE_SECONDS, RENDER_SECONDS = 3.7e-3, 14e-9
"""Of one core, for a photograph of 640x427 px and for each pixel that is rendered of it, as
``python -m benchmarks.decoding`` measured on 48 photographs of COCO."""
MOST_DRAWS = 500
"""Draws of sizes that are looked at where there are more; each is as likely as the others."""


@dataclass(frozen=True)
class DeviceType:
    """A kind of device: dense peaks in TFLOP/s, and the memory that torch sees, in GiB."""

    bfloat16: float
    float32: float
    memory: float

    def flops_per_second(self, dtype: str) -> float:
        """Return the peak of matrix products in a type of number; float16 is as bfloat16."""
        return 1e12 * (self.float32 if dtype == "float32" else self.bfloat16)

    @property
    def native_dtype(self) -> Literal["float32", "bfloat16"]:
        """What ``auto`` means on it."""
        return "bfloat16" if self.bfloat16 > self.float32 else "float32"


DEVICES = {
    # NVIDIA A100 data sheet, SXM; float32 without TF32, which torch does not use unless told to
    "a100-40": DeviceType(312, 19.5, 39),
    "a100-80": DeviceType(312, 19.5, 79),
    # NVIDIA H100 and H200 data sheets, SXM; half of the peaks printed there, which are for sparsity
    "h100": DeviceType(989, 67, 79),
    "h200": DeviceType(989, 67, 139),
    # NVIDIA Ada architecture white paper: bfloat16 summed in float32, without sparsity
    "rtx4090": DeviceType(165, 82.6, 23),
    # Two cores at 3 GHz with 32 float32 and 64 bfloat16 operations a cycle (AMD Zen 4); 8 GiB free
    "cpu": DeviceType(0.38, 0.19, 8),
}


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

    def fits(self, device: DeviceType) -> bool:
        """Return whether it leaves the room that :data:`USABLE` asks for."""
        return self.total <= USABLE * device.memory * GIB


@dataclass(frozen=True)
class StagePlan:
    """What a stage costs; tokens and operations are the mean step's, on all devices together."""

    name: str
    steps: int
    devices: int
    partitions: tuple[PartitionCost, ...]
    images: int
    tokens: float
    student_flops: float
    teacher_flops: float
    memory: Memory
    step_seconds: float
    """Of the busiest device, which the others wait for; the mean over the sizes that are drawn."""
    busy: float
    """Mean work of the devices over that of the busiest."""
    decoding_cores: float
    """Cores that the busiest device keeps busy with decoding, or it waits for its images."""
    statistics_seconds: float
    """What estimating the teachers' statistics takes before the first step."""

    @property
    def hours(self) -> float:
        return (self.statistics_seconds + self.steps * self.step_seconds) / 3600

    @property
    def device_hours(self) -> float:
        return self.hours * self.devices


def plan_stage(
    costs: ModelCosts,
    name: str,
    devices: int,
    device: DeviceType,
    teacher_bytes: int,
    utilisation: float = UTILISATION,
    with_memory: bool = True,
    progress: Callable[[], None] = lambda: None,
) -> StagePlan:
    """Plan one stage.

    Args:
        costs: of the recipe's models.
        name: of the stage.
        devices: how many, one process each.
        device: their kind.
        teacher_bytes: weights of all teachers, which every device holds.
        utilisation: share of the peak that is reached.
        with_memory: measure what a step takes, which is most of the work; else it counts as 0.
        progress: called as often as :func:`measurements` says.
    """
    stage = costs.stage(name)
    partitions = stage.partitions
    measured = {}
    for item in partitions:
        measured[item.name] = costs.partition(stage, item)
        progress()
    steps = [
        assign_micro_batches(partitions, sizes, devices, stage.engine.micro_batch)
        for sizes in _draws(partitions)
    ]
    seconds = [
        [_seconds(work, measured, device, stage) / utilisation for work in ranks] for ranks in steps
    ]
    waits = [max(ranks) for ranks in seconds]

    def decoding(work: Sequence[MicroBatch]) -> float:
        return sum(_decoding_seconds(micro, measured) for micro in work)

    sums = [(cost, cost.partition.batch_size) for cost in measured.values()]
    largest = _largest([micro for ranks in steps for work in ranks for micro in work])
    step_memory = []
    for micro in largest if with_memory else ():
        step_memory.append(costs.step_memory(stage, micro.passes, micro.stop - micro.start))
        progress()
    return StagePlan(
        name=name,
        steps=stage.steps,
        devices=devices,
        partitions=tuple(measured.values()),
        images=stage.images_per_step,
        tokens=sum(cost.tokens * images for cost, images in sums),
        student_flops=sum(cost.student_flops * images for cost, images in sums),
        teacher_flops=sum(_teacher_flops(ranks, measured, stage) for ranks in steps) / len(steps),
        memory=replace(
            state_memory(costs.parameters, _zero_stage(stage.engine, devices), devices),
            average=4 * costs.parameters if stage.config.ema_decay else 0,
            teachers=teacher_bytes,
            step=max(step_memory, default=0),
        ),
        step_seconds=sum(waits) / len(waits),
        busy=sum(map(sum, seconds)) / devices / sum(waits),
        decoding_cores=sum(max(map(decoding, ranks)) for ranks in steps) / sum(waits),
        statistics_seconds=_statistics_seconds(costs, stage, device) / devices / utilisation,
    )


def measurements(stage: StageConfig, with_memory: bool = True) -> int:
    """Return how many measurements planning a stage takes: its passes, and what shares images."""
    groups = sum(not partition.images_of for partition in stage.partitions)
    return len(stage.partitions) + (groups if with_memory else 0)


def _draws(partitions: Sequence[Partition]) -> list[dict[str, Size]]:
    """Return the sizes of each partition that steps may draw, at most :data:`MOST_DRAWS` times."""
    names, choices = [item.name for item in partitions], [item.sizes for item in partitions]
    if math.prod(map(len, choices)) <= MOST_DRAWS:
        combinations = list(itertools.product(*choices))
    else:
        generator = random.Random(0)
        combinations = [
            tuple(generator.choice(sizes) for sizes in choices) for _ in range(MOST_DRAWS)
        ]
    return [dict(zip(names, sizes, strict=True)) for sizes in combinations]


def state_memory(parameters: int, zero_stage: int, devices: int) -> Memory:
    """Return the bytes of float32 weights, gradients and moments on one of some devices."""
    whole, part = 4 * parameters, 4 * parameters / devices
    return Memory(
        weights=(part if zero_stage == 3 else whole) + (part if zero_stage else 0),
        gradients=part if zero_stage >= 2 else whole,
        optimizer=2 * (part if zero_stage else whole),
    )


def _zero_stage(engine: EngineConfig, devices: int) -> int:
    """Return the ZeRO stage that will run: a single process has none unless it asks for it."""
    assert engine.zero_stage != "auto", "the recipe is not resolved"
    return engine.zero_stage if devices > 1 or engine.name == "deepspeed" else 0


def _largest(work: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Return, for each set of partitions that share images, the micro-batch with most pixels."""
    largest: dict[str, MicroBatch] = {}
    for micro in work:
        name = micro.passes[0].partition.name
        if name not in largest or _pixels(micro) > _pixels(largest[name]):
            largest[name] = micro
    return list(largest.values())


def _pixels(micro: MicroBatch) -> int:
    return (micro.stop - micro.start) * max(math.prod(item.size) for item in micro.passes)


def _seconds(
    work: Sequence[MicroBatch],
    measured: Mapping[str, PartitionCost],
    device: DeviceType,
    stage: Stage,
) -> float:
    """Return the time that a device needs for its micro-batches of one step, at its peak."""
    seconds = 0.0
    for micro in work:
        images = micro.stop - micro.start
        for item in micro.passes:
            flops = images * measured[item.partition.name].passes[item.size].student_flops
            seconds += flops / device.flops_per_second(stage.engine.precision)
        for teacher in _teachers(micro, measured, stage):
            flops = teacher.view.inputs(images) * teacher.encode_flops
            dtype = stage.teachers[teacher.view.teacher].dtype
            seconds += flops / device.flops_per_second(dtype)
            seconds += images * teacher.other_flops / device.flops_per_second("float32")
    return seconds


def _decoding_seconds(micro: MicroBatch, measured: Mapping[str, PartitionCost]) -> float:
    """Return the time of one core for the views of a micro-batch, each size once."""
    sizes = {
        size
        for item in micro.passes
        for size in measured[item.partition.name].passes[item.size].rendered.values()
    }
    pixels = sum(math.prod(size) for size in sizes)
    return (micro.stop - micro.start) * (DECODE_SECONDS + RENDER_SECONDS * pixels)


def _teacher_flops(
    ranks: Sequence[Sequence[MicroBatch]], measured: Mapping[str, PartitionCost], stage: Stage
) -> float:
    """Return what all teachers do in one step, without the images that only keep pace."""
    return sum(
        (micro.stop - micro.start) * teacher.flops
        for micro in itertools.chain(*ranks)
        if any(item.image_weight for item in micro.passes)
        for teacher in _teachers(micro, measured, stage)
    )


def _teachers(
    micro: MicroBatch, measured: Mapping[str, PartitionCost], stage: Stage
) -> list[TeacherCost]:
    """Return the teachers that run for a micro-batch: once where partitions share what they see."""
    every = [
        teacher
        for item in micro.passes
        for teacher in measured[item.partition.name].passes[item.size].teachers
    ]
    shifted = bool(stage.augmentation.shift)
    return every if shifted else list({teacher.view: teacher for teacher in every}.values())


def _statistics_seconds(costs: ModelCosts, stage: Stage, device: DeviceType) -> float:
    """Return the time of one device at its peak; the float64 sums themselves are left out."""
    seconds = 0.0
    images = share_of(stage.normalizer.images, stage.steps * stage.images_per_step)
    for teacher, config in stage.teachers.items():
        first = stage.statistics_partition(teacher)
        if first is not None:
            flops = costs.own_grid_flops(first, teacher)
            seconds += images * flops / device.flops_per_second(config.dtype)
    return seconds
