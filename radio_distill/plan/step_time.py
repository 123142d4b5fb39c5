"""How long a step takes on GPUs when all that runs is priced, and what bounds it. All estimated.

Kernels of a process run one after another: products at :data:`PRODUCTS` of the peak, the others at
:data:`STREAMING` of the memory's bandwidth. The host launches them meanwhile, so a step takes the
larger of both, then the exchange of gradients and the optimizer. ``plan``'s hours do not follow
from this but from the utilisation that is assumed; here the launches, the elementwise operators and
the exchange are told apart. Left out: the losses, decoding, evaluation, checkpoints, compilation,
and the overlap of the exchange with the backward pass.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..distill.micro_batches import MicroBatch
from ..stage import Stage
from .cost import ModelCosts, PartitionCost, TeacherCost
from .meter import Work
from .work import other_dtype

PRODUCTS = 0.6
"""Share of the peak that matrix products alone reach. Assumed: 600 of 989 TFLOP/s on an H100."""
STREAMING = 0.8
"""Share of the bandwidth that elementwise kernels reach. Assumed: 2.7 of 3.35 TB/s on an H100."""
LAUNCH = 16e-6
"""Seconds of the host for one operator, autograd included: a pass of ViT-B with spectral matrices
took 43.7 ms of one core of an EPYC Milan, over 2,234 operators without heads and losses and about
2,730 with them; which of them the time holds is not certain, so it is 16 to 20 microseconds."""
NODE, NVLINK, NETWORK = 8, 370e9, 40e9
"""Devices of a node, and bytes a second that a device's all-reduce moves in it and beyond. Assumed:
four fifths of NVLink's 450 GB/s in one direction (H100), and of one 400 Gb/s port a device."""
OPTIMIZER_PASSES = {"lamb": 20}
"""How often an optimizer reads or writes a float32 tensor of the parameters' size. Estimated, not
counted; others, AdamW, take :data:`OTHER_PASSES`."""
OTHER_PASSES = 14
PAGEABLE = 6e9
"""Bytes a second of a copy from memory that is not pinned. Assumed."""
MAPPED, CONVERSION, SLOW_CONVERSION = 2**25, 11e9, 1.2e9
"""Bytes a second of pixels made float32 on one core: 1.1 ms for 16 images of 256 px, 63 ms for 128
of 224 px, since glibc takes from :data:`MAPPED` bytes on fresh pages for each array."""


@dataclass(frozen=True)
class Speed:
    """What a device does in a second."""

    bfloat16: float
    """Operations of matrix products alone; float16 is as bfloat16."""
    float32: float
    streaming: float
    """Bytes of elementwise kernels."""

    def seconds(self, work: Work, dtype: str) -> float:
        """Return how long the device is busy with some work."""
        rate = self.float32 if dtype == "float32" else self.bfloat16
        return work.flops / rate + work.traffic / self.streaming


@dataclass(frozen=True)
class Schedule:
    """What the host does beside launching; the defaults are what training does."""

    waits: bool = False
    """The host waits for the device before the student of each micro-batch."""
    float_copies: bool = False
    """Images are made float32 by the host and copied from memory that is not pinned."""
    launch: float = LAUNCH


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step; ``encode`` and ``learn`` are means over devices, the rest the slowest's.

    The parts do not add up to :attr:`total`, since launches go beside the device's work.
    """

    encode: float
    """Device time of teachers' encoders."""
    learn: float
    """Device time of the student's forward and backward passes, without those of padding."""
    elementwise: float
    """What of these two is memory traffic."""
    device: float
    launches: float
    copies: float
    exchange: float
    optimizer: float
    passes: float
    """From the first pass to the last."""

    @property
    def total(self) -> float:
        return self.passes + self.copies + self.exchange + self.optimizer

    @property
    def useful(self) -> float:
        """Share of a step in which a device, on average, runs teachers or the student."""
        return (self.encode + self.learn) / self.total

    @property
    def bound(self) -> str:
        """What takes most: ``launches`` where the host is slower than the device."""
        if self.launches > self.device:
            return "launches"
        computing = self.encode + self.learn - self.elementwise
        parts = {
            "products": computing,
            "elementwise": self.elementwise,
            "exchange": self.exchange,
            "optimizer": self.optimizer,
            "copies": self.copies,
            "waiting": self.device - self.encode - self.learn,
        }
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class _Rank:
    encode: float = 0
    learn: float = 0
    other: float = 0
    elementwise: float = 0
    launches: float = 0
    copies: float = 0
    waiting: float = 0
    """The passes' time where the host waits in each."""


def step_time(
    costs: ModelCosts,
    stage: Stage,
    measured: Mapping[str, PartitionCost],
    ranks: Sequence[Sequence[MicroBatch]],
    speed: Speed,
    schedule: Schedule = Schedule(),
) -> StepTime:
    """Price one step.

    Args:
        costs: of the recipe's models.
        stage: whose step it is.
        measured: its partitions' costs, by name.
        ranks: the micro-batches of each process.
        speed: of a device.
        schedule: what the host does.
    """
    sums = [_rank(stage, measured, work, speed, schedule) for work in ranks]
    devices = len(sums)
    parameters = 4 * costs.parameters
    link = NVLINK if devices <= NODE else NETWORK
    times = OPTIMIZER_PASSES.get(stage.config.optimizer, OTHER_PASSES)
    device = max(item.encode + item.learn + item.other for item in sums)
    launches = max(item.launches for item in sums)
    return StepTime(
        encode=sum(item.encode for item in sums) / devices,
        learn=sum(item.learn for item in sums) / devices,
        elementwise=sum(item.elementwise for item in sums) / devices,
        device=device,
        launches=launches,
        copies=max(item.copies for item in sums),
        exchange=2 * (devices - 1) / devices * parameters / link,
        optimizer=times * parameters / speed.streaming,
        passes=max(max(item.waiting for item in sums), device, launches),
    )


def _rank(
    stage: Stage,
    measured: Mapping[str, PartitionCost],
    work: Sequence[MicroBatch],
    speed: Speed,
    schedule: Schedule,
) -> _Rank:
    """Add up the passes of one process."""
    encode = learn = other = elementwise = launches = copies = waiting = 0.0
    for micro in work:
        images = micro.stop - micro.start
        seen: set[object] = set()
        for item in micro.passes:
            cost = measured[item.partition.name].passes[item.size]
            device = host = 0.0
            for teacher in () if item.is_padding else cost.teachers:
                if teacher.view in seen and not stage.augmentation.shift:
                    continue
                seen.add(teacher.view)
                calls, each = _calls(stage, teacher, images)
                took = calls * speed.seconds(each, stage.teachers[teacher.view.teacher].dtype)
                beside = teacher.other(images)
                encode, device = encode + took, device + took
                elementwise += calls * each.traffic / speed.streaming
                more = speed.seconds(beside, other_dtype(stage, teacher))
                other, device = other + more, device + more
                host += schedule.launch * (calls * each.kernels + beside.kernels)
            student = cost.student(images)
            took = speed.seconds(student, stage.engine.precision)
            if item.is_padding:
                other += took
            else:
                learn, elementwise = learn + took, elementwise + student.traffic / speed.streaming
            launched = schedule.launch * student.kernels
            launches += host + launched
            if schedule.waits:
                waiting += max(device, host) + max(took, launched)
            if schedule.float_copies:
                sizes = set(cost.rendered.values())
                copies += sum(map(_copy, (12 * images * math.prod(size) for size in sizes)))
    return _Rank(encode, learn, other, elementwise, launches, copies, waiting)


def _copy(size: int) -> float:
    """Return the seconds in which the host makes and copies one view's float32 pixels, in bytes."""
    return size / PAGEABLE + size / (CONVERSION if size < MAPPED else SLOW_CONVERSION)


def _calls(stage: Stage, teacher: TeacherCost, images: int) -> tuple[int, Work]:
    """Return how often an encoder is called, and the work of a mean call."""
    inputs = teacher.view.inputs(images) * teacher.calls
    limit = stage.teachers[teacher.view.teacher].micro_batch
    if teacher.view.is_upsampled:
        limit = stage.upsampler.micro_batch or limit
    calls = math.ceil(inputs / limit) if limit else 1
    return calls, teacher.encode(inputs / calls)
