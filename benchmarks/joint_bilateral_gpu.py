"""Time and peak memory of the joint-bilateral layer's Triton kernels on a GPU, and their bounds.

    python -m benchmarks.joint_bilateral_gpu            # parity, then medians, side by side
    python -m benchmarks.joint_bilateral_gpu --sweep    # times launch settings, and keeps the best
    python -m benchmarks.joint_bilateral_gpu --count    # bytes and FLOPs; needs no GPU

The yardstick is the time to write the output once at the measured copy bandwidth (bytes read and
written over time). ``apply`` is the product alone, ``layer`` also makes the weights out of 32
projected channels; backward goes to all inputs. Medians of CUDA events, L2 flushed in between.
Memory is the peak beyond the inputs.

``--count`` lists what each kernel must move through device memory, what its programs load through
the caches, and the floating-point operations of its products with all padding. A bound is the
larger of bytes over bandwidth and operations over the matrix rate, both from the vendors' data
sheets; it knows nothing of the other instructions.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from math import ceil, prod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from upsamplers.joint_bilateral import triton_kernels
from upsamplers.joint_bilateral.dispatch import apply_kernel, joint_bilateral, range_weights
from upsamplers.joint_bilateral.triton_tiles import (
    DEFAULT,
    TABLE,
    Folding,
    Settings,
    architecture,
    number_type,
    power_of_two,
    write_table,
)

RADIUS, KEYS = 3, 32
TAPS = (2 * RADIUS + 1) ** 2
DATA_SHEETS = {"H200": (4.8e12, 990e12), "A100": (2.0e12, 312e12)}
"""Bytes, and bf16 matrix operations, a second. A product of fp32 is three of TF32, which goes half
as fast as bf16."""


class Case(NamedTuple):
    """A stack of levels, bilinear base."""

    batch: int
    channels: int
    cells: int
    factors: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    """Of all tensors. Training runs float32, as a normalizer gives it."""

    def __str__(self) -> str:
        sides = [self.cells * prod(self.factors[:n]) for n in range(len(self.factors) + 1)]
        name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]
        return f"B{self.batch} C{self.channels} {'→'.join(map(str, sides))}, {name}"

    @property
    def products(self) -> int:
        """bf16 products that one of these numbers takes as long as."""
        return 6 if self.dtype == torch.float32 else 1

    @property
    def bytes(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    def levels(self) -> Iterator[tuple[int, Folding]]:
        """Yield the grid and the folding of each level."""
        for number, factor in enumerate(self.factors):
            yield self.cells * prod(self.factors[:number]), Folding((factor,) * 2, RADIUS, False)

    def output_bytes(self) -> int:
        """Return the bytes of the last level's output."""
        return self.batch * self.channels * (self.cells * prod(self.factors)) ** 2 * self.bytes


CASES = (
    Case(32, 1280, 27, (3,)),
    Case(32, 1280, 27, (3,), torch.float32),
    Case(4, 768, 16, (3,)),
    Case(1, 1024, 27, (2, 2)),
    Case(1, 1280, 27, (3,), torch.float32),
)

SWEPT = CASES[:2]
"""The large map in both types: what is fastest there is launched for all sizes."""
CANDIDATES: tuple[Settings, ...] = tuple(
    {"BLOCK": block, "num_warps": warps, "num_stages": stages}
    for block, warps, stages in product((64, 128, 256), (4, 8), (2, 3))
)


# --- counting ---------------------------------------------------------------------------------


class Work(NamedTuple):
    """What a kernel does, in bytes and operations."""

    kernel: str
    read: float
    written: float
    loaded: float
    """Bytes that programs ask for; what exceeds ``read`` should come out of the caches."""
    operations: float

    def seconds(self, bandwidth: float, rate: float) -> float:
        """Return the lower bound."""
        return max((self.read + self.written) / bandwidth, self.operations / rate)


def forward_work(case: Case, cells: int, folding: Folding) -> list[Work]:
    """Count the kernels of one level, forward."""
    tile, window = folding.tile, folding.window
    pixels = case.batch * (cells * folding.factor[0]) ** 2
    keys = pixels * KEYS * case.bytes
    folded, out = pixels * prod(window) * case.bytes, pixels * case.channels * case.bytes
    low = case.batch * cells**2 * case.channels * case.bytes
    tiles = case.batch * ceil(cells / tile.rows) * ceil(cells / tile.columns)
    around = (
        (tile.rows + window[0] - 1) * (tile.columns + window[1] - 1) * case.channels * case.bytes
    )
    matrix = tile.products(folding.factor) * tile.pixels * tile.cells
    matrix *= case.products
    reach = 4 + 2 * RADIUS  # around a block of 16 pixels
    # Shares of cells in the places of a block, on tensor cores: 32-bit products in three parts.
    spans = [
        (factor + 2) // factor + side for factor, side in zip(folding.factor, window, strict=True)
    ]
    shares = 2 * pixels * power_of_two(reach**2) * power_of_two(prod(spans)) * 3
    return [
        Work(
            "fold_weights",
            keys,
            folded,
            keys * (reach**2 + 16) / 16,
            _scores(case, pixels) + shares,
        ),
        Work(
            "multiply",
            low + folded,
            out,
            tiles * around + folded,
            2 * tiles * matrix * case.channels,
        ),
    ]


def _scores(case: Case, pixels: int) -> int:
    """Return the operations that compare pixels with their surroundings, a block at a time."""
    return 2 * pixels * power_of_two((4 + 2 * RADIUS) ** 2) * KEYS * case.products


def backward_work(case: Case, cells: int, folding: Folding) -> list[Work]:
    """Count the kernels of one level, backward; :mod:`.triton_apply` names their sizes."""
    fold_weights, multiply = forward_work(case, cells, folding)
    taps = fold_weights.read * TAPS // KEYS
    around = fold_weights.loaded
    scores = _scores(case, case.batch * (cells * folding.factor[0]) ** 2)
    weights = Work("weights", fold_weights.read, taps, around, scores)
    fold = Work("fold", taps, fold_weights.written, taps, 0)
    out, low, wide, logits = (
        multiply.written,
        multiply.read - fold.written,
        2 * fold.written,
        2 * fold.read,
    )
    (factor, _), (window, _), strip = folding.factor, folding.window, folding.strip
    strips, across = ceil(cells / strip), (strip + window - 1) * factor
    rows = sum(
        min(cells, top + 16 + window // 2) - max(0, top - window // 2)
        for top in range(0, cells, 16)
    )
    given = out * rows * strips * across / (cells**2 * factor)
    weighed = fold.written * rows / cells * ceil(case.channels / 256)  # once a block of channels
    padded = case.batch * strips * rows * factor * ceil(across / 32) * 32
    sums = 2 * padded * power_of_two(window * strip, 16) * case.channels * case.products
    return [
        weights,
        fold,
        Work("grad_low", out + fold.written, low, given + weighed, sums),
        Work(
            "grad_folded",
            low + out,
            wide,
            multiply.loaded - fold.written + out,
            multiply.operations,
        ),
        Work("unfold", wide, fold.read, wide, 0),
        Work("grad_logits", 2 * fold.read, logits, 2 * fold.read, 0),
        Work(
            "grad_projected",
            logits + weights.read,
            weights.read,
            2 * logits + weights.loaded,
            3 * weights.operations,
        ),
    ]


def count(case: Case) -> None:
    """Print the work of each kernel of a case, and the bounds of what the targets speak of."""
    columns = ["kernel", "read MB", "written MB", "loaded MB", "GFLOP"]
    row(f"{case}", *columns[1:], *(f"bound {gpu} µs" for gpu in DATA_SHEETS))
    row(*["---"] + ["---:"] * (len(columns) - 1 + len(DATA_SHEETS)))
    for title, works in (("forward", forward_work), ("backward", backward_work)):
        total = [0.0] * len(DATA_SHEETS)
        for cells, folding in case.levels():
            for work in works(case, cells, folding):
                bounds = [work.seconds(*sheet) for sheet in DATA_SHEETS.values()]
                total = [old + new for old, new in zip(total, bounds, strict=True)]
                numbers = (work.read, work.written, work.loaded, work.operations / 1e3)
                label = f"{work.kernel} →{cells * folding.factor[0]}"
                row(
                    label, *(f"{n / 1e6:.1f}" for n in numbers), *(f"{b * 1e6:.1f}" for b in bounds)
                )
        write = [case.output_bytes() / bandwidth for bandwidth, _ in DATA_SHEETS.values()]
        shown = [f"{t * 1e6:.0f} = {t / w:.2f}x write" for t, w in zip(total, write, strict=True)]
        row(f"**layer, {title}**", "", "", "", "", *shown)
    print()


# --- measuring --------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What a case is run on."""

    low: Tensor
    projected: list[Tensor]
    kernels: list[Tensor]
    grad: Tensor


def inputs(case: Case, device: str = "cuda") -> Inputs:
    """Make normal features and projections, and the weights of each level."""

    def make(*shape: int) -> Tensor:
        random = torch.randn(*shape, device=device, dtype=case.dtype)
        return random.to(memory_format=torch.channels_last)

    sides = [cells * folding.factor[0] for cells, folding in case.levels()]
    projected = [make(case.batch, KEYS, side, side).mul_(0.4) for side in sides]
    kernels = [range_weights(keys, 1.0, 1.0, RADIUS, "triton") for keys in projected]
    low = make(case.batch, case.channels, case.cells, case.cells)
    return Inputs(low, projected, kernels, make(case.batch, case.channels, sides[-1], sides[-1]))


def apply(given: Inputs, how: str) -> Tensor:
    """Run all levels with weights that are there already."""
    low = given.low
    for kernel in given.kernels:
        if how == "bilinear":
            low = F.interpolate(low, kernel.shape[-2:], mode="bilinear", align_corners=False)
        else:
            low = apply_kernel(low, kernel, "bilinear", how)
    return low


def layer(given: Inputs, how: str) -> Tensor:
    """Run all levels, weights included."""
    low = given.low
    for projected in given.projected:
        low = joint_bilateral(low, projected, 1.0, 1.0, RADIUS, "bilinear", how)
    return low


def leaves(given: Inputs, function: Callable[[Inputs, str], Tensor], how: str) -> list[Tensor]:
    """Return the inputs that a backward pass goes to, as leaves."""
    others = given.projected if function is layer else given.kernels
    return [given.low] if how == "bilinear" else [given.low, *others]


def check(case: Case) -> None:
    """Raise where Triton and the folded form differ, on the case's first image."""
    given = inputs(case._replace(batch=1))
    results = []
    for how in ("triton", "folded"):
        tensors = [tensor.requires_grad_() for tensor in leaves(given, layer, how)]
        out = layer(given, how)
        results.append([out, *torch.autograd.grad(out, tensors, given.grad)])
    for ours, reference in zip(*results, strict=True):
        error = (ours.float() - reference.float()).abs().max() / reference.float().abs().max()
        if not error < (3e-2 if case.bytes == 2 else 1e-4):
            sys.exit(f"{case}: Triton and folded differ by {error:.1e} of the largest value")


def copy_bandwidth() -> float:
    """Return the bytes a second, read and written, of a copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def seconds(function: Callable[[], object]) -> float:
    """Return the median time of a call."""
    from triton.testing import do_bench

    return do_bench(function, quantiles=[0.5]) / 1e3


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the peak of one call beyond what is allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(case: Case, bandwidth: float) -> None:
    """Print times and memory of a case, form by form."""
    write = case.output_bytes() / bandwidth
    row(f"{case}", "forward µs", "x write", "backward µs", "x write", "peak MiB, both")
    row("---", *["---:"] * 5)
    row("write the output once", f"{write * 1e6:.0f}", "1.00", "", "", "")
    for function, how in [*product((apply, layer), ("triton", "folded")), (apply, "bilinear")]:
        given = inputs(case)
        forward = seconds(lambda: function(given, how))  # noqa: B023 - called at once
        tensors = [tensor.requires_grad_() for tensor in leaves(given, function, how)]

        def step(given: Inputs = given, tensors: list[Tensor] = tensors) -> object:
            return torch.autograd.grad(function(given, how), tensors, given.grad)  # noqa: B023

        peak, out = peak_bytes(step), function(given, how)
        backward = seconds(
            lambda: torch.autograd.grad(out, tensors, given.grad, retain_graph=True)  # noqa: B023
        )
        times = (
            f"{x:.{d}f}" for t in (forward, backward) for x, d in ((t * 1e6, 0), (t / write, 2))
        )
        row(f"{how}, {function.__name__}", *times, f"{peak / 2**20:.0f}")
    print()


def sweep(
    case: Case,
    device: str = "cuda",
    choices: Iterable[Settings] = CANDIDATES,
    time: Callable[[Callable[[], object]], float] = seconds,
    table: Path = TABLE,
) -> None:
    """Time the products of a case's first level under launch settings, and note the fastest.

    Prints each; the table gets the fastest of each kernel for the device's architecture and the
    case's type. Settings that ask for more than the device has are passed over.
    """
    from triton import OutOfResources

    from upsamplers.joint_bilateral import triton_apply, triton_fold

    given, (_, folding) = (
        inputs(case._replace(factors=case.factors[:1]), device),
        next(case.levels()),
    )
    low, grad = (t.permute(0, 2, 3, 1).contiguous() for t in (given.low, given.grad))
    folded = triton_fold.fold(given.kernels[0].contiguous(), folding, low.dtype)
    calls: dict[str, Callable[[Settings], Tensor]] = {
        "multiply": lambda settings: triton_apply.multiply(low, folded, folding, settings),
        "grad_folded": lambda settings: triton_apply.grad_folded(low, grad, folding, settings),
        "grad_low": lambda settings: triton_apply.grad_low(folded, grad, folding, settings),
    }
    row(f"{case}", "channels", "warps", "stages", "µs")
    row("---", *["---:"] * 4)
    fastest = {}
    for name, call in calls.items():
        times = []
        for settings in choices:
            try:
                times.append((time(partial(call, settings)), settings))
            except OutOfResources:
                continue
            mark = " (default)" if settings == DEFAULT[name] else ""
            row(name + mark, *settings.values(), f"{times[-1][0] * 1e6:.0f}")
        fastest[name] = min(times, key=lambda item: item[0])[1]
    write_table(architecture(low.device), number_type(case.dtype), fastest, table)
    print(f"\n{table}: {fastest}\n")


def row(*cells: object) -> None:
    """Print a row of a Markdown table."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def main() -> None:
    """Run what the arguments ask for, on every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--count", action="store_true", help="count bytes and FLOPs; needs no GPU")
    choice.add_argument(
        "--sweep", action="store_true", help="time launch settings and write the fastest, by type"
    )
    parser.add_argument(
        "--table", type=Path, default=TABLE, help="written by --sweep; default: what kernels read"
    )
    arguments = parser.parse_args()
    if arguments.count:
        for case in CASES:
            count(case)
        return
    if not torch.cuda.is_available() or not triton_kernels.is_available(torch.device("cuda")):
        sys.exit("no NVIDIA GPU from Ampere on with Triton here; --count works without")
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, ", end="")
    print(f"copies at {bandwidth / 1e12:.2f} TB/s\n")
    for case in SWEPT if arguments.sweep else ():
        sweep(case, table=arguments.table)
    for case in () if arguments.sweep else CASES:
        check(case)
        measure(case, bandwidth)


if __name__ == "__main__":
    main()
