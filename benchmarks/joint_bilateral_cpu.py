"""Time and peak memory of the joint-bilateral layer on a CPU, side by side in one run.

Forms of the same layer (equal outputs and gradients), one level or two of FeatUp's or FeatSharp's:

* ``unfold``: the window of every target pixel written out, as FeatUp's users do without CUDA;
* ``shifts``: one shifted multiply-add for each of the 49 taps;
* ``folded``: this project's, in fp32 and in bf16;
* ``bilinear``: ``F.interpolate``, for scale, on maps in channels-first and channels-last layout.

All forms share the projection and the fix-up of the kernel; ``unfold`` and ``shifts`` differ in how
the kernel is applied, and both weigh neighbours with FeatUp's own unfold of the projected guidance.
Forward is without gradient; forward+backward goes to the low-resolution features and to all
parameters. Repeats are interleaved. On one thread time is CPU time of the process, which neighbours
on the machine disturb least; on several it is wall time. Memory is what one first step adds to the
peak of a fresh process (Linux).

    python -m benchmarks.joint_bilateral_cpu [--variant featsharp] [--cases 0 1] [--threads 2]
"""

import argparse
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upsamplers.joint_bilateral import layer
from upsamplers.joint_bilateral.layer import JointBilateralLevel

CASES = ((4, 768, 16, (3,)), (1, 384, 14, (2,)), (1, 1024, 27, (2, 2)))
FORMS = ("bilinear", "bilinear, channels last", "unfold", "shifts", "folded", "folded, bf16")


def apply_by_shifts(low: Tensor, kernel: Tensor, base: str, _: str) -> Tensor:
    """Interpolate, pad, and add up 49 shifted products."""
    height, width = kernel.shape[-2:]
    fine = F.interpolate(low, (height, width), mode=base, align_corners=False)
    radius = (round(kernel.shape[1] ** 0.5) - 1) // 2
    padded = F.pad(fine, (radius,) * 4, mode="reflect")
    out = torch.zeros_like(fine)
    for tap in range(kernel.shape[1]):
        row, column = divmod(tap, 2 * radius + 1)
        out += padded[:, :, row : row + height, column : column + width] * kernel[:, tap, None]
    return out


class Interpolate(nn.Module):
    """One level of nothing but interpolation."""

    def forward(self, low: Tensor, guidance: Tensor) -> Tensor:
        return F.interpolate(low, guidance.shape[-2:], mode="bilinear", align_corners=False)


class Setup:
    """One form of one case: levels, features, the guidance of each level, a gradient."""

    def __init__(self, form: str, case: tuple[Any, ...], variant: Any) -> None:
        batch, channels, cells, factors = case
        torch.manual_seed(0)
        self.form = form
        how = "folded" if form.startswith("folded") else "reference"
        bilinear = form.startswith("bilinear")
        self.levels = nn.ModuleList(
            Interpolate() if bilinear else JointBilateralLevel(variant, implementation=how).eval()
            for _ in factors
        )
        low = torch.randn(batch, channels, cells, cells)
        if form not in ("bilinear", "unfold", "shifts"):
            low = low.contiguous(memory_format=torch.channels_last)
        dtype = torch.bfloat16 if form.endswith("bf16") else torch.float32
        self.levels.to(dtype)
        self.low, self.guidances = low.to(dtype).requires_grad_(), []
        for factor in factors:
            cells *= factor
            self.guidances.append(torch.rand(batch, 3, cells, cells, dtype=dtype))
        self.gradient = torch.randn(batch, channels, cells, cells, dtype=dtype)
        if low.is_contiguous(memory_format=torch.channels_last):
            self.gradient = self.gradient.contiguous(memory_format=torch.channels_last)

    def upsample(self) -> Tensor:
        fine = self.low
        with self.applied():
            for level, guidance in zip(self.levels, self.guidances, strict=True):
                fine = level(fine, guidance)
        return fine

    @contextmanager
    def applied(self) -> Iterator[None]:
        if self.form == "shifts":
            with patch.object(layer, "apply_kernel", apply_by_shifts):
                yield
        else:
            yield

    def forward(self) -> None:
        with torch.no_grad():
            self.upsample()

    def backward(self) -> None:
        self.low.grad = None
        self.levels.zero_grad()
        self.upsample().backward(self.gradient)


def peak() -> int:
    """Return the highest resident memory of this process so far, in KiB."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", status)
    assert found, "this system does not tell a process its peak memory"
    return int(found[1])


def added_memory(form: str, case: tuple[Any, ...], variant: str, step: str, pipe: Any) -> None:
    """Send how many KiB the first step adds to the peak of this process."""
    torch.set_num_threads(1)
    setup = Setup(form, case, variant)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    getattr(setup, step)()
    pipe.send(peak() - before)


def memory(*arguments: Any) -> float:
    """Return :func:`added_memory` in MiB, from a fresh process."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=added_memory, args=(*arguments, send))
    process.start()
    send.close()
    kib = receive.recv()
    process.join()
    return kib / 1024


def times(setups: list[Setup], step: str, repeats: int, clock: Callable[[], float]) -> list[float]:
    """Return the median of each form's seconds, the forms taking turns."""
    taken: list[list[float]] = [[] for _ in setups]
    for turn in range(repeats + 1):
        for setup, seconds in zip(setups, taken, strict=True):
            start = clock()
            getattr(setup, step)()
            if turn:  # the first turn warms up
                seconds.append(clock() - start)
    return [median(seconds) for seconds in taken]


def processor() -> str:
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else "unknown processor"


def check(setups: dict[str, Setup]) -> None:
    """Assert that the forms are the same function, gradients and all."""
    results = {}
    for form in ("unfold", "shifts", "folded"):
        setups[form].backward()
        learned = (setups[form].low, *setups[form].levels.parameters())
        gradients = [p.grad for p in learned if p.grad is not None]
        assert len(gradients) == len(learned)
        results[form] = [setups[form].upsample().detach(), *gradients]
    for form in ("shifts", "folded"):
        for ours, theirs in zip(results[form], results["unfold"], strict=True):
            error = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-3)
            assert error < 1e-3, f"{form} is off by {error:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", choices=("featup", "featsharp"), default="featup")
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    kind = "CPU time" if options.threads == 1 else "wall time"
    print(f"{processor()}, torch {torch.__version__}, {options.threads} thread(s), {kind},")
    print(f"{options.variant} levels, medians of {options.repeats}; ratios: forward+backward.\n")
    print("| case | form | forward ms | MiB | both ms | MiB | unfold / it | shifts / it |")
    print("| --- | --- | --: | --: | --: | --: | --: | --: |")
    for number in options.cases:
        report(CASES[number], options.variant, options.repeats, clock)


def report(case: tuple[Any, ...], variant: str, repeats: int, clock: Callable[[], float]) -> None:
    """Print the rows of one case; ratios are of forward+backward times."""
    batch, channels, cells, factors = case
    setups = {form: Setup(form, case, variant) for form in FORMS}
    check(setups)
    forward = dict(zip(FORMS, times([*setups.values()], "forward", repeats, clock), strict=True))
    both = dict(zip(FORMS, times([*setups.values()], "backward", repeats, clock), strict=True))
    sizes = [cells]
    for factor in factors:
        sizes.append(sizes[-1] * factor)
    name = f"B{batch} C{channels} {' to '.join(map(str, sizes))}"
    for form in FORMS:
        memories = [memory(form, case, variant, step) for step in ("forward", "backward")]
        print(
            f"| {name} | {form} | {forward[form] * 1e3:.1f} | {memories[0]:.0f} "
            f"| {both[form] * 1e3:.1f} | {memories[1]:.0f} "
            f"| {both['unfold'] / both[form]:.1f} | {both['shifts'] / both[form]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
