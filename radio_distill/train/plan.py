"""What a stage costs on given devices: operations, memory, time; found without weights or data.

The images of a step are dealt to devices as the trainer deals them, and a step takes as long as its
busiest device. Time is operations / (peak * utilisation): the utilisation is an assumption, and
every figure of time stands and falls with it. Left out: decoding, communication, evaluation,
checkpoints.

Memory of one device, for P parameters of student and heads, W devices, ZeRO stage z:

    weights    4 P, under z = 3 divided by W; from z = 1 on also DeepSpeed's master copy, 4 P / W
    gradients  4 P, from z = 2 on divided by W
    optimizer  8 P (two moments), from z = 1 on divided by W
    teachers   every teacher of the recipe, matrices in its dtype: each device holds all of them
    step       what the largest micro-batch takes beside these, see :mod:`.costs`

Left out of it: CUDA's own share, communication buffers, fragmentation (:data:`USABLE` leaves room
for them), and the parameters that ZeRO 3 gathers for a moment.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config import EngineConfig, Recipe, StageConfig
from ..partitions import MicroBatch, Partition, images_per_step, partitions_of, share_out
from .costs import ModelCosts, PartitionCost

GIB = 2**30
UTILISATION = 0.35
"""Share of the peak that a step reaches. Assumed: transformers are trained at 0.3 to 0.5."""
USABLE = 0.9
"""Share of a device's memory that tensors may fill. Assumed."""


@dataclass(frozen=True)
class DeviceType:
    """A kind of device: dense peaks in TFLOP/s, and the memory that torch sees, in GiB."""

    bfloat16: float
    float32: float
    memory: float

    def flops_per_second(self, dtype: str) -> float:
        """Return the peak of matrix products in a type of number; float16 is as bfloat16."""
        return 1e12 * (self.float32 if dtype == "float32" else self.bfloat16)


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
    teachers: float = 0
    step: float = 0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.teachers + self.step

    def fits(self, device: DeviceType) -> bool:
        """Return whether it leaves the room that :data:`USABLE` asks for."""
        return self.total <= USABLE * device.memory * GIB


@dataclass(frozen=True)
class StagePlan:
    """What a stage costs; operations are for one step on all devices together."""

    name: str
    steps: int
    devices: int
    partitions: tuple[PartitionCost, ...]
    images: int
    tokens: int
    student_flops: int
    teacher_flops: int
    memory: Memory
    step_seconds: float
    """Of the busiest device, which the others wait for."""
    busy: float
    """Mean work of the devices over that of the busiest."""
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
) -> StagePlan:
    """Plan one stage.

    Args:
        costs: of the recipe's models.
        name: of the stage.
        devices: how many, one process each.
        device: their kind.
        teacher_bytes: weights of all teachers, which every device holds.
        utilisation: share of the peak that is reached.
    """
    recipe, stage = costs.recipe, costs.recipe.stages[name]
    partitions = partitions_of(stage)
    measured = {item.name: costs.partition(name, item) for item in partitions}
    ranks = share_out(partitions, devices, recipe.engine.micro_batch)
    seconds = [_seconds(batches, measured, device, recipe) / utilisation for batches in ranks]
    sums = [(cost, cost.partition.batch_size) for cost in measured.values()]
    return StagePlan(
        name=name,
        steps=stage.steps,
        devices=devices,
        partitions=tuple(measured.values()),
        images=images_per_step(stage),
        tokens=sum(cost.tokens * images for cost, images in sums),
        student_flops=sum(cost.student_flops * images for cost, images in sums),
        teacher_flops=sum(cost.teacher_flops * images for cost, images in sums),
        memory=replace(
            state_memory(costs.parameters, _zero_stage(recipe.engine, devices), devices),
            teachers=teacher_bytes,
            step=max(costs.step_memory(name, *largest) for largest in _largest(ranks)),
        ),
        step_seconds=max(seconds),
        busy=sum(seconds) / len(seconds) / max(seconds),
        statistics_seconds=_statistics_seconds(costs, stage, device) / devices / utilisation,
    )


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
    return engine.zero_stage if devices > 1 or engine.name == "deepspeed" else 0


def _largest(ranks: Sequence[Sequence[MicroBatch]]) -> list[tuple[Partition, int]]:
    """Return each partition with the most images that a micro-batch of it has."""
    largest: dict[str, tuple[Partition, int]] = {}
    for micro in (micro for batches in ranks for micro in batches):
        images, name = micro.stop - micro.start, micro.partition.name
        if name not in largest or images > largest[name][1]:
            largest[name] = micro.partition, images
    return list(largest.values())


def _seconds(
    batches: Sequence[MicroBatch],
    measured: dict[str, PartitionCost],
    device: DeviceType,
    recipe: Recipe,
) -> float:
    """Return the time that a device needs for its micro-batches of one step, at its peak."""
    seconds = 0.0
    for micro in batches:
        cost, images = measured[micro.partition.name], micro.stop - micro.start
        student = cost.student_flops / device.flops_per_second(recipe.engine.precision)
        seconds += images * student
        for teacher in cost.teachers:
            dtype = recipe.teachers[teacher.name].dtype
            seconds += images * teacher.encode_flops / device.flops_per_second(dtype)
            seconds += images * teacher.other_flops / device.flops_per_second("float32")
    return seconds


def _statistics_seconds(costs: ModelCosts, stage: StageConfig, device: DeviceType) -> float:
    """Return the time of one device at its peak; the float64 sums themselves are left out."""
    recipe, seconds = costs.recipe, 0.0
    for name, config in recipe.teachers.items():
        first = next((item for item in stage.partitions if name in item.teachers), None)
        if first is not None:
            flops = costs.encode_flops(name, costs.input_size(first, name))
            seconds += recipe.normalizer.images * flops / device.flops_per_second(config.dtype)
    return seconds
