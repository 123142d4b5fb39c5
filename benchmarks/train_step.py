"""Where the time of a training step goes: each phase alone, the whole step, and what it did.

The models of a recipe get random weights and see noise, so neither data nor files are needed, and
any device will do. For each number of images a pass, the table tells:

* each phase alone: the device is waited for before and after it, so phases do not overlap (on a
  CPU all times are CPU time for each thread);
* whole steps as the trainer runs them, without waiting; "useful" is the time of teachers and of the
  student's forward and backward pass, alone, over the whole step. Overlap can bring it above 100 %;
* matrix operations, counted on a real step, over time and peak (MFU). The peak is the data sheet's
  for the student's number type where the device is known, and the best of some large matrix
  products, measured here;
* kernels a step (operators on a CPU), how often the host waited for the device, and peak memory (of
  the device; on a CPU of the process).

    python -m benchmarks.train_step phi_s_b --stage stage1 --partition dfn_clip --images 16 128
    python -m benchmarks.train_step demo --engine deepspeed --zero 2
    python -m benchmarks.train_step demo --compile

Every field of the recipe can be set, as in ``radio-distill train``. A fitted upsampler gets random
weights too. The loader is left out: images lie in memory.
"""

import argparse
import resource
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.synthetic import build_task, one_partition
from radio_distill.config import Recipe
from radio_distill.distill.task import Distillation
from radio_distill.plan.meter import measure_work
from radio_distill.plan.time import DEVICES
from radio_distill.report.tables import Cell, Column, Table, print_tables
from radio_distill.system.distributed import World, choose_device
from radio_distill.train.health import NonFiniteGuard, agree
from radio_distill.types import ImageBatch
from stages.arguments import add_recipe_argument, run_script
from stages.recipes import load_recipe

TAKES_FIELDS = True
TARGETS, FORWARD, BACKWARD = "teachers: targets", "student: forward", "student: backward"
UPDATE, REST = "update", "all else: views, loss, agreement"
PHASES = (TARGETS, FORWARD, BACKWARD, UPDATE)
USEFUL = (TARGETS, FORWARD, BACKWARD)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_argument(parser)
    parser.add_argument("--stage", default="stage1", metavar="NAME")
    parser.add_argument("--partition", default="", metavar="NAME", help="default: the first")
    parser.add_argument("--images", type=int, nargs="+", default=[16], metavar="N")
    parser.add_argument("--passes", type=int, default=2, metavar="N", help="of a step (default: 2)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="timed (default: 5)")
    parser.add_argument("--engine", default="single", choices=("single", "deepspeed"))
    parser.add_argument("--zero", type=int, default=None, choices=(0, 1, 2, 3), metavar="STAGE")
    parser.add_argument("--compile", action="store_true", help="as engine.compile: true")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def run(arguments: argparse.Namespace) -> int:
    recipe = with_engine(
        load_recipe(arguments.recipe, arguments.fields),
        arguments.device,
        arguments.engine,
        arguments.zero,
        arguments.compile,
    )
    options = arguments.stage, arguments.partition
    results = [
        measure(recipe, *options, images, arguments.passes, arguments.steps)
        for images in arguments.images
    ]
    print_tables([table(results)])
    return 0


def with_engine(
    recipe: Recipe,
    device: str,
    name: str = "single",
    zero: int | None = None,
    compiled: bool = False,
) -> Recipe:
    """Return a recipe with this engine."""
    values: dict[str, Any] = {"name": name, "device": device, "compile": compiled}
    if zero is not None:
        values["zero_stage"] = zero
    return replace(recipe, engine=replace(recipe.engine, **values))


@dataclass(frozen=True)
class StepTiming:
    """What was measured of one number of images a pass."""

    title: str
    images: int
    """Of a pass."""
    passes: int
    phases: dict[str, float]
    """Seconds of a step, each phase alone; those named ``  of these`` are parts of the first."""
    step: float
    """Seconds of a whole step, without waiting in between."""
    flops: float
    peaks: dict[str, float]
    """Operations a second, by where the number comes from."""
    launches: int
    kind: str
    """Of what was counted: kernels or operators."""
    waits: int
    memory: float
    """Bytes."""

    @property
    def useful(self) -> float:
        """Time of teachers and student alone over that of the whole step."""
        return sum(self.phases[name] for name in USEFUL) / self.step

    @property
    def images_per_second(self) -> float:
        return self.images * self.passes / self.step

    def rows(self) -> dict[str, str]:
        """Return what is shown, by its name."""
        rows = {f"{name}, ms": f"{seconds * 1e3:.1f}" for name, seconds in self.phases.items()}
        rows["whole step, ms"] = f"{self.step * 1e3:.1f}"
        rows["useful: teachers and student"] = f"{self.useful:.0%}"
        rows["images/s"] = f"{self.images_per_second:.4g}"
        rows["TFLOP a step, counted"] = f"{self.flops / 1e12:.4g}"
        for source, peak in self.peaks.items():
            share = self.flops / self.step / peak
            rows[f"MFU, of {peak / 1e12:.3g} TFLOP/s {source}"] = f"{share:.0%}"
        rows[f"{self.kind} a step"] = str(self.launches)
        rows["host waits for the device a step"] = str(self.waits)
        rows["peak memory, GiB"] = f"{self.memory / 2**30:.2f}"
        return rows


def table(results: Sequence[StepTiming]) -> Table:
    """Lay out what was measured, one column for each number of images."""
    rows = [result.rows() for result in results]
    columns = [
        Column("A step"),
        *(Column(f"{item.passes} x {item.images} images") for item in results),
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    cells: list[tuple[Cell, ...]] = [(name, *(row.get(name, "") for row in rows)) for name in names]
    return Table(results[0].title, tuple(columns), tuple(cells))


def measure(
    recipe: Recipe, stage: str, partition: str, images: int, passes: int = 2, steps: int = 5
) -> StepTiming:
    """Measure steps of one partition.

    Args:
        recipe: with the engine that is wanted.
        stage: one of its stages.
        partition: one of the stage's; empty for the first.
        images: of one pass.
        passes: of one step.
        steps: whole ones that are timed; the median counts.
    """
    is_tf32 = recipe.engine.float32_matmul == "tf32"
    device = choose_device(recipe.engine.device, World(), is_tf32)
    alone = one_partition(recipe, stage, partition, images, passes, recipe.engine)
    task = build_task(alone, stage, device)
    batches = next(task.batches(0))
    clock = Clock(device)
    stepping = Stepping(task, batches)
    for _ in range(2):  # allocate, compile, choose kernels
        stepping()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    phases = phases_alone(stepping, clock, max(2, steps // 2))
    seconds = [clock.time(stepping) for _ in range(steps)]
    memory = peak_memory(device)
    launches, kind = count_launches(stepping, device)
    part = task.stage.partitions[0]
    title = (
        f"{recipe.name} {stage}/{part.name}, {device_name(device)}, torch {torch.__version__}, "
        f"{engine_text(task)}"
    )
    return StepTiming(
        title, images, passes, phases, statistics.median(seconds), step_flops(stepping, device),
        peaks(device, task.stage.engine.precision), launches, kind, count_waits(stepping), memory,
    )  # fmt: skip


class Stepping:
    """Takes one step after the other, as the trainer does, on the same images."""

    def __init__(self, task: Distillation, batches: Sequence[ImageBatch]):
        self.task, self._batches = task, batches
        self.number = 0

    def __call__(self) -> None:
        """Take a step; raises AssertionError where a number is not finite."""
        task, guard = self.task, NonFiniteGuard()
        agreement = task.forward_backward(self.number, self._batches, guard, agree)
        is_taken = task.engine.step(task.learning_rates(self.number))
        is_taken = is_taken and not agreement.read().is_bad
        task.end_step(is_taken)
        assert is_taken, f"step {self.number} is not finite: {guard.causes()}"
        self.number += 1


class Clock:
    """Seconds at which a device has done all that it was given.

    On a CPU it is the CPU time for each thread, so that what else the machine does takes no part.
    """

    def __init__(self, device: torch.device):
        self._is_gpu = device.type == "cuda"

    def __call__(self) -> float:
        """Wait for the device, and return the time."""
        if not self._is_gpu:
            return time.process_time() / torch.get_num_threads()
        torch.cuda.synchronize()
        return time.perf_counter()

    def time(self, function: Callable[[], object]) -> float:
        """Return the seconds of a call, waited for."""
        begin = self()
        function()
        return self() - begin


def phases_alone(stepping: Stepping, read: Callable[[], float], steps: int) -> dict[str, float]:
    """Return how much a meter advances in each phase of a step, and in the rest; the mean."""
    spent: dict[str, float] = defaultdict(float)
    with reading(stepping.task, read, spent):
        begin = read()
        for _ in range(steps):
            stepping()
        whole = read() - begin
    means = {name: value / steps for name, value in spent.items()}
    means[REST] = whole / steps - sum(means[name] for name in PHASES)
    parts = sorted(name for name in means if name.startswith("  "))
    return {name: means[name] for name in (TARGETS, *parts, *PHASES[1:], REST)}


@contextmanager
def reading(
    task: Distillation, read: Callable[[], float], spent: dict[str, float]
) -> Iterator[None]:
    """Add up how much a meter advances in the calls that a step is made of."""

    def metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            begin = read()
            result = function(*arguments, **settings)
            spent[name] += read() - begin
            return result

        return call

    engine, targets = task.engine, task.targets
    with ExitStack() as stack:
        for name, method in ((FORWARD, "forward"), (BACKWARD, "backward"), (UPDATE, "step")):
            call = metered(name, getattr(engine, method))
            stack.enter_context(mock.patch.object(engine, method, call))
        call = metered(TARGETS, type(targets).__call__)
        stack.enter_context(mock.patch.object(type(targets), "__call__", call))
        for name, teacher in targets.teachers.items():
            call = metered(f"  of these {name}'s encoder", teacher.encode)
            stack.enter_context(mock.patch.object(teacher, "encode", call))
        yield


def step_flops(stepping: Stepping, device: torch.device) -> int:
    """Return the matrix operations of a step, of student and teachers."""
    # Compiled blocks are out of sight of counters, and torch would leave them eager ever after.
    with torch.compiler.set_stance("force_eager"):
        if device.type == "cpu":  # whose fused attention the counter does not know
            return int(measure_work(stepping).flops)
        with FlopCounterMode(display=False) as counter:
            stepping()
        return int(counter.get_total_flops())


def peaks(device: torch.device, dtype: str) -> dict[str, float]:
    """Return the operations a second that a device can do in a number type."""
    name = device_name(device).lower()
    found = {}
    for key, kind in DEVICES.items():
        if device.type == "cuda" and key.partition("-")[0] in name:
            found["of the data sheet"] = kind.flops_per_second(dtype)
    found["measured"] = measured_peak(device, getattr(torch, dtype))
    return found


@lru_cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of the best of five large matrix products."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    clock = Clock(device)
    return 2.0 * side**3 / min(clock.time(lambda: left @ right) for _ in range(6))


class _Operators(TorchDispatchMode):
    """Counts the operators that are dispatched, views left out, and reads of single numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.reads = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), settings: Any = None
    ) -> Any:
        self.count += not function.is_view
        is_read = function is torch.ops.aten._local_scalar_dense.default
        self.reads += is_read and not _in_optimizer()
        return function(*arguments, **(settings or {}))


def _in_optimizer() -> bool:
    """Tell whether torch's optimizer asks, whose counts of steps are on the host everywhere."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and "/torch/optim/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


def count_launches(stepping: Stepping, device: torch.device) -> tuple[int, str]:
    """Return the kernels of a step, copies included; on a CPU the operators that are no views."""
    if device.type == "cpu":
        with _Operators() as operators:
            stepping()
        return operators.count, "operators"
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        stepping()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_device for event in profiler.events()), "kernels"


def count_waits(stepping: Stepping) -> int:
    """Return how often the host waits for the device in a step.

    On a GPU torch tells of copies that wait; on a CPU, where nothing waits, reads of numbers and
    lists are counted, which would wait on a GPU. Calls of ``synchronize`` count on both.
    """
    calls = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            calls.append(function.__name__)
            return function(*arguments, **settings)

        return call

    with ExitStack() as stack:
        if stepping.task.engine.device.type == "cpu":
            if "deepspeed" in sys.modules:
                from deepspeed.accelerator import get_accelerator

                kind = type(get_accelerator())
                stack.enter_context(
                    mock.patch.object(kind, "synchronize", noting(kind.synchronize))
                )
            to_list = noting(torch.Tensor.tolist)
            stack.enter_context(mock.patch.object(torch.Tensor, "tolist", to_list))
            operators = stack.enter_context(_Operators())
            stepping()
            return len(calls) + operators.reads
        wait = noting(torch.cuda.synchronize)
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", wait))
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        stepping()
        return len(calls) + sum("synchroniz" in str(item.message) for item in caught)


def peak_memory(device: torch.device) -> float:
    """Return the most bytes that were in use: on the device, or of this process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def device_name(device: torch.device) -> str:
    """Return a GPU's name, or the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.get_num_threads()} threads"


def engine_text(task: Distillation) -> str:
    """Say which engine a task has."""
    config = task.stage.engine
    zero = f" ZeRO {config.zero_stage}" if config.name == "deepspeed" else ""
    return f"{config.name}{zero}, {config.precision}{', compiled' if config.compile else ''}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run as a script; returns the exit status."""
    return run_script(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main())
