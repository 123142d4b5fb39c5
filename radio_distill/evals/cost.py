"""How long a suite takes with an encoder on a device: counted and estimated, nothing is run.

Counts follow from protocols and from how many images the data sets have: those that are named, or
those that were published. The encoder's passes and the heads' steps are measured on tensors without
data and priced at the rates of :mod:`..plan.step_time`: probes on a GPU encode in bfloat16, all
else is float32. Left out: losses and metrics, text towers, SAM's decoder, the teachers that
fidelity compares with, and the augmentation of images.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import EvaluationConfig
from ..data.folder import labelled_images, list_images
from ..errors import DataError
from ..plan.cost import BatchWork, WorkBySize
from ..plan.meter import Work, measure_work
from ..plan.step_time import LAUNCH, OTHER_PASSES
from ..plan.time import DECODE_SECONDS, RENDER_SECONDS, DeviceType
from ..types import Size, Suite
from .datasets import DATASETS
from .demand import Demand
from .encoder import Encoder
from .masks import find_pairs
from .protocol import DATA
from .run import BENCHMARKS, make
from .suites import with_suite
from .trained import TrainedBenchmark

_CORES = 2
"""Of ``plan.time.DEVICES["cpu"]``, which read images too."""


@dataclass(frozen=True)
class Counted:
    """A benchmark, and what it asks of an encoder."""

    benchmark: Any
    demand: Demand
    is_named: bool
    """Whether its images were counted, or else are those of the published set."""


@dataclass(frozen=True)
class Price:
    """What a benchmark takes with one encoder on one device."""

    demand: Demand
    """At sizes that the encoder takes."""
    flops: float
    """Of the encoder."""
    seconds: float
    """Of the device."""
    reading: float
    """Of one core that decodes the images."""


def counted(
    config: EvaluationConfig, suite: Suite, among: Collection[str] = ()
) -> tuple[dict[str, Counted], dict[str, str]]:
    """Count what the benchmarks of a suite ask, and say why each that is left out is.

    A data set that ``config`` does not name, or that cannot be read, is taken to be whole.
    ``among`` and errors are as for :func:`.suites.with_suite`.
    """
    named = {name: name for name in DATASETS.names()} | config.data
    asked, left_out = with_suite(replace(config, data=named), suite, among)
    found = {}
    for name in asked.benchmarks:
        benchmark: Any = make(name, asked)
        if not hasattr(benchmark, "demand"):
            left_out[name] = "does not say what it asks"
            continue
        try:
            parts, is_named = parts_of(name, config)
        except DataError as error:
            left_out[name] = str(error)
            continue
        demand = benchmark.demand(parts, asked.limit or None)
        if demand.num_passes:
            found[name] = Counted(benchmark, demand, is_named)
    return found, left_out


def parts_of(name: str, config: EvaluationConfig) -> tuple[Mapping[str, int], bool]:
    """Return how many items each part of a benchmark's data has, and whether they were counted.

    Raises:
        DataError: a folder of one's own that cannot be read.
    """
    sources = set(BENCHMARKS.get(name).sources.values())
    for dataset in (it.removeprefix(DATA) for it in sources if it.startswith(DATA)):
        kind = DATASETS.get(dataset)
        if dataset in config.data:
            try:
                return kind(config.data[dataset]).check().counts, True
            except DataError:
                pass
        return kind.published, False
    if "labels" in sources:
        labelled = labelled_images(config.labels)
        return {"train": len(labelled.train), "val": len(labelled.val)}, True
    if "segmentation" in sources:
        splits = ("train", "val")
        return {split: len(find_pairs(config.segmentation, split)) for split in splits}, True
    return {"images": len(list_images(config.images)) if "images" in sources else 1}, True


def priced(
    benchmarks: Mapping[str, Counted], encoder: Encoder, device: DeviceType
) -> dict[str, Price]:
    """Price benchmarks with an encoder that is made of fake tensors, under whose mode it is called.

    Args:
        benchmarks: by name.
        encoder: what is scored.
        device: one of its kind does all.
    """
    demands = {name: _fitted(one.demand, encoder) for name, one in benchmarks.items()}
    sizes = [size for demand in demands.values() for size in demand.passes]
    prices = _Prices(encoder, device, sizes)
    return {
        name: Price(demand, *prices.of(benchmarks[name].benchmark, demand))
        for name, demand in demands.items()
    }


def _fitted(demand: Demand, encoder: Encoder) -> Demand:
    """Return the demand at the sizes that an encoder takes."""
    passes: dict[Size, int] = {}
    for size, count in demand.passes.items():
        taken = encoder.nearest_size(size)
        passes[taken] = passes.get(taken, 0) + count
    return replace(demand, passes=passes)


class _Prices:
    """What an encoder's passes, and what follows them, take on a device.

    Args:
        encoder: without data.
        device: its kind.
        sizes: that will be asked for.
    """

    def __init__(self, encoder: Encoder, device: DeviceType, sizes: Sequence[Size]):
        self._encoder, self._device = encoder, device
        self._work = WorkBySize(
            lambda size, images: measure_work(lambda: self._encode(size, images)), sizes
        )
        example = self._encode(sizes[0], 1)
        self._channels = example.shape[1]
        self._cell = sizes[0][0] // example.shape[2]

    def of(self, benchmark: Any, demand: Demand) -> tuple[float, float, float]:
        """Return the encoder's operations, the device's seconds, and those of a core to read."""
        is_probe = isinstance(benchmark, TrainedBenchmark)
        dtype = self._device.native_dtype if is_probe and not self._device.is_host else "float32"
        flops, seconds = 0.0, self._comparing(demand)
        reading = (demand.reads or demand.images) * DECODE_SECONDS
        for size, count in demand.passes.items():
            work = self._work(size)
            flops += count * work.one.flops
            seconds += count / demand.batch * self._seconds(work(demand.batch), dtype)
            reading += count * RENDER_SECONDS * size[0] * size[1]
        if isinstance(benchmark, TrainedBenchmark):
            seconds += self._heads(benchmark, demand)
        if self._device.is_host:
            seconds += reading / _CORES
        return flops, seconds, reading

    def _encode(self, size: Size, images: int) -> Tensor:
        with torch.no_grad():  # inference mode would hide the products of linear layers
            return self._encoder.encode(torch.empty(images, 3, *size)).spatial

    def _maps(self, size: Size, layers: int) -> list[Tensor]:
        rows, columns = (side // self._cell for side in self._encoder.nearest_size(size))
        return [torch.empty(1, self._channels, rows, columns) for _ in range(layers)]

    def _heads(self, benchmark: TrainedBenchmark, demand: Demand) -> float:
        """Return how long it takes to train the heads, and to ask them, once there are maps."""
        heads = nn.ModuleDict(benchmark.heads([self._channels] * benchmark.layers))

        def work(size: Size, learns: bool) -> Work:
            maps = self._maps(size, benchmark.layers)

            def run() -> None:
                outputs = [head(maps) for head in heads.values()]
                resized = [
                    F.interpolate(it, size, mode="bilinear") if it.ndim == 4 else it  # boxes
                    for it in outputs
                ]
                if learns:
                    torch.stack([output.sum() for output in resized]).sum().backward()

            with torch.set_grad_enabled(learns):
                return measure_work(run)

        step = BatchWork(work(benchmark.crop, learns=True))(benchmark.images_per_step)
        parameters = 4 * sum(parameter.numel() for parameter in heads.parameters())
        update = OTHER_PASSES * parameters / self._device.speed.streaming
        seconds = benchmark.steps * (self._seconds(step, "float32") + update)
        heads.eval()
        for size, times in benchmark.test_views().items():
            tested = self._seconds(work(size, learns=False), "float32")
            seconds += times * demand.tested * tested
        return seconds

    def _comparing(self, demand: Demand) -> float:
        work = Work(2 * self._channels * demand.products, 8 * demand.products)
        return self._device.speed.seconds(work, "float32")

    def _seconds(self, work: Work, dtype: str) -> float:
        """Return how long a pass takes; where the device is no host, one launches beside it."""
        host = 0 if self._device.is_host else work.kernels * LAUNCH
        return max(self._device.speed.seconds(work, dtype), host)
