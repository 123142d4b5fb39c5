"""What a stage costs on given devices: operations, memory, time; found without weights or data.

The images of a step are dealt to devices as the trainer deals them, and a step takes as long as its
busiest device, which :mod:`.step_time` finds. Where sizes are drawn, a few steps are looked at that
show every size of a partition equally often. Time is operations / (peak * utilisation) of the mean
device, over the share that it is busy: the utilisation is an assumption, and every figure of time
stands and falls with it. A step of small models takes what the host needs to launch their operators
and to copy their images, if that is longer. Left out: communication, evaluation, checkpoints.
Decoding runs beside the devices; what it asks of the processors, :attr:`StagePlan.decoding_cores`,
is told apart from the time.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..config import share_of
from ..distill.micro_batches import MicroBatch, assign_micro_batches
from ..stage import Stage
from ..types import Size
from .cost import ModelCosts, PartitionCost, PassCost, TeacherCost
from .memory import (
    Memory,
    resident_memory,
    step_memory,
    with_micro_batches,
)
from .meter import Speed
from .step_time import LAUNCH, StepTime, mean, step_time
from .work import other_dtype, with_work

UTILISATION = 0.35
"""Share of the peak that a step reaches. Assumed: transformers are trained at 0.3 to 0.5."""
PRODUCTS, FLOAT32_PRODUCTS = 0.6, 0.75
"""Share of the peak that matrix products alone reach. Assumed: 590 and 50 TFLOP/s on an H100."""
STREAMING, LINK = 0.8, 0.82
"""Share of the bandwidth that elementwise kernels and all-reduces reach. Assumed: 2.7 TB/s and
370 GB/s on an H100."""
MOST_DRAWS = 60
"""Steps that are looked at where sizes are drawn."""
DECODE_SECONDS, RENDER_SECONDS = 2.7e-3, 1.7e-9
"""Of one core, for a photograph of 640x427 px and for each pixel that is rendered of it, as
``python -m benchmarks.decoding`` measured on 48 photographs of COCO."""


@dataclass(frozen=True)
class DeviceType:
    """A kind of device: dense peaks in TFLOP/s, and the memory that torch sees, in GiB.

    What bounds a step beside products has: TB/s of the memory and, in one direction, GB/s of the
    link to the other devices of a node.
    """

    bfloat16: float
    float32: float
    memory: float
    bandwidth: float = 1.0
    link: float = 25
    is_host: bool = False

    @property
    def speed(self) -> Speed:
        """What its kernels do in a second."""
        return Speed(
            PRODUCTS * 1e12 * self.bfloat16,
            FLOAT32_PRODUCTS * 1e12 * self.float32,
            STREAMING * 1e12 * self.bandwidth,
            LINK * 1e9 * self.link,
            LAUNCH if self.is_host else 0,
        )

    def flops_per_second(self, dtype: str) -> float:
        """Return the peak of matrix products in a type of number; float16 is as bfloat16."""
        return 1e12 * (self.float32 if dtype == "float32" else self.bfloat16)

    @property
    def native_dtype(self) -> Literal["float32", "bfloat16"]:
        """The type that ``auto`` means on it."""
        return "bfloat16" if self.bfloat16 > self.float32 else "float32"


DEVICES = {
    # NVIDIA A100 data sheet, SXM; float32 without TF32, which torch does not use unless told to
    "a100-40": DeviceType(312, 19.5, 39, 1.555, 300),
    "a100-80": DeviceType(312, 19.5, 79, 2.039, 300),
    # NVIDIA H100 and H200 data sheets, SXM; half of the peaks printed there, which are for sparsity
    "h100": DeviceType(989, 67, 79, 3.35, 450),
    "h200": DeviceType(989, 67, 139, 4.8, 450),
    # NVIDIA Ada architecture white paper: bfloat16 summed in float32, without sparsity; PCIe 4
    "rtx4090": DeviceType(165, 82.6, 23, 1.008, 32),
    # Two cores at 3 GHz with 32 float32 and 64 bfloat16 operations a cycle (AMD Zen 4); 8 GiB free;
    # bandwidth and the exchange of processes through memory are assumed
    "cpu": DeviceType(0.38, 0.19, 8, 0.04, 5, is_host=True),
}


def dealing_speed(is_gpu: bool) -> Speed:
    """Return the speed by which work is dealt: all GPUs count as one kind, so that a run is dealt
    on each as it was planned."""
    return DEVICES["h100" if is_gpu else "cpu"].speed


@dataclass(frozen=True)
class StagePlan:
    """The costs of a stage; tokens and operations are the mean step's, on all devices together."""

    stage: Stage
    devices: int
    partitions: tuple[PartitionCost, ...]
    tokens: float
    student_flops: float
    teacher_flops: float
    memory: Memory
    step_seconds: float
    """Of the busiest device, which the others wait for, or of a host that is slower; the mean over
    the sizes that are drawn."""
    busy: float
    """Mean work of the devices over that of the busiest."""
    decoding_cores: float
    """Cores that the busiest device keeps busy with decoding, or it waits for its images."""
    parts: StepTime
    """Where the mean step's time is expected to go, at rates of its own: :mod:`.step_time`."""
    statistics_seconds: float
    """What estimating the teachers' statistics takes before the first step."""

    @property
    def hours(self) -> float:
        return (self.statistics_seconds + self.stage.steps * self.step_seconds) / 3600

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
    stage = costs.stages[name]
    measured = {}
    for item in stage.partitions:
        measured[item.name] = costs.partition(stage, item)
        progress()
    is_gpu = device is not DEVICES["cpu"]
    stage = with_work(stage, costs, dealing_speed(is_gpu))
    resident = resident_memory(costs, stage, devices, teacher_bytes)
    if with_memory and is_gpu:
        stage = with_micro_batches(stage, costs, resident, device.memory)
    steps = [assign_micro_batches(stage, sizes, devices) for sizes in _draws(stage)]
    parts = mean([step_time(costs, stage, measured, ranks, device.speed) for ranks in steps])
    decoding = sum(
        max(sum(_decoding_seconds(micro, measured) for micro in work) for work in ranks)
        for ranks in steps
    )
    every = [micro for ranks in steps for work in ranks for micro in work]
    at_peak = sum(_seconds(stage, micro, measured, device) for micro in every)
    computing = at_peak / len(steps) / devices / parts.busy / utilisation
    step_seconds = max(computing, parts.launches, parts.copies)
    step_bytes = 0.0
    for micro in _largest(every) if with_memory else ():
        images = micro.stop - micro.start
        step_bytes = max(step_bytes, step_memory(costs, stage, micro.passes, images))
        progress()
    sums = [(cost, cost.partition.batch_size) for cost in measured.values()]
    return StagePlan(
        stage=stage,
        devices=devices,
        partitions=tuple(measured.values()),
        tokens=sum(cost.tokens * images for cost, images in sums),
        student_flops=sum(cost.student_flops * images for cost, images in sums),
        teacher_flops=sum(_teacher_flops(stage, micro, measured) for micro in every) / len(steps),
        memory=replace(resident, step=step_bytes),
        step_seconds=step_seconds,
        busy=parts.busy,
        decoding_cores=decoding / len(steps) / step_seconds,
        parts=parts,
        statistics_seconds=_statistics_seconds(costs, stage, device) / devices / utilisation,
    )


def measurements(stage: Stage, with_memory: bool = True) -> int:
    """Return how many measurements planning a stage takes: its passes, and what shares images."""
    groups = sum(not partition.images_of for partition in stage.partitions)
    return len(stage.partitions) + (groups if with_memory else 0)


def _draws(stage: Stage) -> list[dict[str, Size]]:
    """Return sizes of all partitions in some steps, each size of a partition equally often."""
    count = min(math.lcm(*(len(item.sizes) for item in stage.partitions)), MOST_DRAWS)
    return [
        {item.name: item.sizes[number % len(item.sizes)] for item in stage.partitions}
        for number in range(count)
    ]


def _largest(work: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Return, for each set of partitions that share images, the micro-batch with most pixels."""
    largest: dict[str, tuple[int, MicroBatch]] = {}
    for micro in work:
        name, pixels = micro.passes[0].partition.name, math.prod(micro.size)
        pixels *= micro.stop - micro.start
        if name not in largest or pixels > largest[name][0]:
            largest[name] = pixels, micro
    return [micro for _, micro in largest.values()]


def _passes(micro: MicroBatch, measured: Mapping[str, PartitionCost]) -> list[PassCost]:
    return [measured[item.partition.name].passes[item.size] for item in micro.passes]


def _seconds(
    stage: Stage, micro: MicroBatch, measured: Mapping[str, PartitionCost], device: DeviceType
) -> float:
    """Return the time that a device needs for a micro-batch, at its peak."""
    is_padding = micro.passes[0].is_padding
    if is_padding and stage.engine.zero_stage != 3:
        return 0
    images, passes = micro.stop - micro.start, _passes(micro, measured)
    flops = images * sum(cost.student_flops for cost in passes)
    seconds = flops / device.flops_per_second(stage.engine.precision)
    for teacher in () if is_padding else _teachers(stage, passes):
        flops = teacher.view.inputs(images) * teacher.encode_flops
        dtype = stage.teachers[teacher.view.teacher].dtype
        seconds += flops / device.flops_per_second(dtype)
        peak = device.flops_per_second(other_dtype(stage, teacher))
        seconds += images * teacher.other_flops / peak
    return seconds


def _decoding_seconds(micro: MicroBatch, measured: Mapping[str, PartitionCost]) -> float:
    """Return the time of one core for the views of a micro-batch, each size once."""
    passes = _passes(micro, measured)
    sizes = {size for cost in passes for size in cost.rendered.values()}
    pixels = sum(map(math.prod, sizes))
    return (micro.stop - micro.start) * (DECODE_SECONDS + RENDER_SECONDS * pixels)


def _teacher_flops(stage: Stage, micro: MicroBatch, measured: Mapping[str, PartitionCost]) -> float:
    """Return what all teachers do for a micro-batch on full canvases; nothing in padding passes."""
    if not any(item.image_weight for item in micro.passes):
        return 0
    flops = sum(teacher.flops for teacher in _teachers(stage, _passes(micro, measured)))
    return (micro.stop - micro.start) * flops


def _teachers(stage: Stage, passes: Sequence[PassCost]) -> list[TeacherCost]:
    """Return the teachers that run: once where partitions share what they see."""
    every = [teacher for cost in passes for teacher in cost.teachers]
    if stage.augmentation.shift:
        return every
    return list({teacher.view: teacher for teacher in every}.values())


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
