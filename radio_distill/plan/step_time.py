"""How long a step takes on GPUs when all that runs is priced, and what bounds it. All estimated.

Kernels of a process run one after another: products at a share of the peak, the others at a share
of the memory's bandwidth (:class:`.meter.Speed`); of those inside compiled blocks, the share that
is left (:mod:`.work`). The host launches them meanwhile and copies the next
images, so a step takes the largest of the three, then the exchange of gradients, the optimizer and
the one synchronisation; where the device is the host, launches are part of its work. ``plan``'s
hours do not follow from this but from the utilisation that is assumed, save where the host is
slower. Left out: the losses, decoding, evaluation, checkpoints, compilation, and the overlap of the
exchange with the backward pass.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from ..distill.micro_batches import MicroBatch
from ..stage import Stage
from .cost import ModelCosts, PartitionCost, TeacherCost
from .meter import Speed, Work
from .work import of_encoder, of_student, other_dtype

LAUNCH = 16e-6
"""Seconds of the host for one operator, autograd included: a pass of ViT-B with spectral matrices
took 43.7 ms of one core of an EPYC Milan, over 2,234 operators without heads and losses and about
2,730 with them; which of them the time holds is not certain, so it is 16 to 20 microseconds."""
REFILL = 10
"""Operators that the host launches before the device has work again, after it has waited for it at
the end of a step. Assumed."""
NODE, NETWORK = 8, 40e9
"""Devices of a node, and bytes a second that a device's all-reduce moves beyond it. Assumed: four
fifths of one 400 Gb/s port a device."""
PINNED = 25e9
"""Bytes a second of a copy from pinned memory. Assumed: four fifths of PCIe 4."""
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
    other: float
    """Device time of upsamplers, normalizers, padding and the derivation of spectral matrices; a
    mean over devices too."""
    elementwise: float
    """What of encoding and learning is memory traffic."""
    device: float
    launches: float
    copies: float
    exchange: float
    optimizer: float
    waits: float
    passes: float
    """From the first pass to the last."""
    floats: float = 0
    """Copies that nothing else goes beside; else 0."""

    @property
    def total(self) -> float:
        return self.passes + self.floats + self.exchange + self.optimizer + self.waits

    @property
    def waiting(self) -> float:
        """Device time that the mean device waits for the busiest."""
        return max(self.device - self.encode - self.learn - self.other, 0)  # rounding

    @property
    def busy(self) -> float:
        """Mean work of the devices over that of the busiest."""
        return (self.encode + self.learn + self.other) / self.device

    @property
    def useful(self) -> float:
        """Share of a step in which a device, on average, runs teachers or the student."""
        return (self.encode + self.learn) / self.total

    @property
    def bound(self) -> str:
        """What takes most: ``launches`` or ``copies`` where the host is slower than the device."""
        if max(self.launches, self.copies) > self.device:
            return "launches" if self.launches > self.copies else "copies"
        computing = self.encode + self.learn - self.elementwise
        parts = {
            "products": computing,
            "elementwise": self.elementwise,
            "exchange": self.exchange,
            "optimizer": self.optimizer,
            "copies": self.floats,
            "waiting": self.waiting,
            "other": self.other,
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
    floats: float = 0
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
    sums = [_rank(costs, stage, measured, work, speed, schedule) for work in ranks]
    devices = len(sums)
    parameters = 4 * costs.parameters
    link = speed.link if devices <= NODE else min(speed.link, NETWORK)
    times = OPTIMIZER_PASSES.get(stage.config.optimizer, OTHER_PASSES)
    device = max(item.encode + item.learn + item.other for item in sums)
    launches = 0 if speed.is_host else max(item.launches for item in sums)
    copies = 0 if speed.is_host else max(item.copies for item in sums)
    return StepTime(
        encode=sum(item.encode for item in sums) / devices,
        learn=sum(item.learn for item in sums) / devices,
        other=sum(item.other for item in sums) / devices,
        elementwise=sum(item.elementwise for item in sums) / devices,
        device=device,
        launches=launches,
        copies=copies,
        exchange=2 * (devices - 1) / devices * parameters / link,
        optimizer=times * parameters / speed.streaming,
        waits=0 if speed.is_host else REFILL * schedule.launch,
        passes=max(max(item.waiting for item in sums), device, launches, copies),
        floats=max(item.floats for item in sums),
    )


def mean(times: Sequence[StepTime]) -> StepTime:
    """Return the mean step of several that draw different sizes."""
    names = [item.name for item in fields(StepTime)]
    return StepTime(
        **{name: sum(getattr(item, name) for item in times) / len(times) for name in names}
    )


def _rank(
    costs: ModelCosts,
    stage: Stage,
    measured: Mapping[str, PartitionCost],
    work: Sequence[MicroBatch],
    speed: Speed,
    schedule: Schedule,
) -> _Rank:
    """Add up the passes of one process."""
    encode = learn = elementwise = copies = floats = waiting = 0.0
    other = speed.seconds(costs.matrices, "float32")
    launches = schedule.launch * costs.matrices.kernels
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
            if item.is_padding and stage.engine.zero_stage != 3:
                continue  # zeros for each weight, without a model
            student = of_student(stage, cost.student(images))
            took = speed.seconds(student, stage.engine.precision)
            if item.is_padding:
                other += took
            else:
                learn, elementwise = learn + took, elementwise + student.traffic / speed.streaming
            launched = schedule.launch * student.kernels
            launches += host + launched
            if schedule.waits:
                waiting += max(device, host) + max(took, launched)
            numbers = stage.data.bands * images
            pixels = [numbers * math.prod(size) for size in set(cost.rendered.values())]
            if schedule.float_copies:
                floats += sum(_float_copy(4 * size) for size in pixels)
            else:
                copies += sum(pixels) / PINNED
    return _Rank(encode, learn, other, elementwise, launches, copies, floats, waiting)


def _float_copy(size: int) -> float:
    """Return the seconds in which the host makes and copies one view's float32 pixels, in bytes."""
    return size / PAGEABLE + size / (CONVERSION if size < MAPPED else SLOW_CONVERSION)


def _calls(stage: Stage, teacher: TeacherCost, images: int) -> tuple[int, Work]:
    """Return how often an encoder is called, and the work of a mean call."""
    inputs = teacher.view.inputs(images) * teacher.calls
    limit = stage.teachers[teacher.view.teacher].micro_batch
    if teacher.view.is_upsampled:
        limit = stage.upsampler.micro_batch or limit
    calls = math.ceil(inputs / limit) if limit else 1
    return calls, of_encoder(stage, teacher.encode(inputs / calls))
