"""What the joint-bilateral kernels take on GPUs, by compiling them; no GPU is needed.

For each launch of a forward and a backward pass of one level: registers of a thread, bytes that
spill, shared memory, and how many programs a multiprocessor holds, of the warps that it could hold.
The same for sm_80 (A100) and sm_90 (H100, H200), in the types that training and evaluation run.

    python -m benchmarks.joint_bilateral_compiled [--channels 1280 --cells 27 --factor 3]
"""

import argparse
import re
import subprocess
import tempfile
from contextlib import ExitStack
from math import prod
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

REGISTERS, WARPS = 65_536, 64
"""Of a multiprocessor; the CUDA programming guide's table of technical specifications."""
SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024}
RESERVED = 1024
"""Bytes of shared memory that the system takes for each program."""
_POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


class Launch(NamedTuple):
    """A kernel, as it would have been launched."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launches.append(Launch(self.kernel, grid, args, kwargs))


def launches(
    dtype: torch.dtype, batch: int, channels: int, cells: int, factor: int = 3, radius: int = 3
) -> list[Launch]:
    """Return every launch of both forms of the layer: weights and filter apart, and at once."""
    from upsamplers.joint_bilateral import (
        triton_apply,
        triton_fold,
        triton_kernels,
        triton_range,
    )

    seen: list[Launch] = []
    low = torch.zeros(batch, channels, cells, cells, dtype=dtype, requires_grad=True)
    fine = cells * factor
    projected = torch.zeros(batch, 32, fine, fine, dtype=dtype, requires_grad=True)
    scalar = torch.ones((), requires_grad=True)
    with ExitStack() as stack:
        for module in (triton_apply, triton_fold, triton_range):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                recorder = _Recorder(getattr(module, name), seen)
                stack.enter_context(patch.object(module, name, recorder))
        kernel = triton_kernels.range_weights(projected, scalar, scalar, radius)
        triton_kernels.apply_kernel(low, kernel).sum().backward()
        triton_kernels.joint_bilateral(low, projected, scalar, scalar, radius, "bilinear")
    return seen


def compiled(launch: Launch, capability: int) -> Any:
    """Compile a launch for a GPU of this compute capability, 80 or 90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    types, constants, alignments = {}, {}, {}
    for number, name in enumerate(launch.kernel.arg_names):
        value = named[name]
        if launch.kernel.params[number].is_constexpr:
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = _POINTERS[value.dtype]
            alignments[(number,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "i32"
    names = ("num_warps", "num_stages", "maxnreg")
    options = {name: named[name] for name in names if name in named}
    source = ASTSource(launch.kernel, types, constants, alignments)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(cubin: bytes) -> tuple[int, int]:
    """Return registers of a thread and bytes of its stack, which holds what spills."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (re.search(rf"{word}:(\d+)", text) for word in ("REG", "STACK"))
    assert registers is not None, text
    assert stack is not None, text
    return int(registers[1]), int(stack[1])


def programs(registers: int, warps: int, shared: int, capability: int) -> int:
    """Return how many programs of some warps one multiprocessor holds."""
    of_a_warp = -(-registers * 32 // 256) * 256  # registers are given in units of 256
    by_memory = SHARED_MEMORY[capability] // (shared + RESERVED)
    return min(REGISTERS // (of_a_warp * warps), by_memory, WARPS // warps, 32)


def main() -> None:
    """Print one table for each GPU and type."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("batch", 32), ("channels", 1280), ("cells", 27), ("factor", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    case = vars(parser.parse_args())
    for capability in SHARED_MEMORY:
        for dtype in (torch.bfloat16, torch.float32):
            shown = ", ".join(f"{name} {value}" for name, value in case.items())
            print(f"\nsm_{capability}, {str(dtype).removeprefix('torch.')}; {shown}\n")
            print("| kernel | programs | warps | registers | stack, B | shared, KiB |", end="")
            print(" programs of a multiprocessor | warps, of 64 |\n|" + " --- |" * 8)
            done = set()
            for launch in launches(dtype, **case):
                if launch.kernel.__name__ in done:
                    continue
                done.add(launch.kernel.__name__)
                code = compiled(launch, capability)
                registers, stack = resources(code.asm["cubin"])
                warps, shared = code.metadata.num_warps, code.metadata.shared
                held = programs(registers, warps, shared, capability)
                grid = prod(launch.grid)
                name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
                row = (name, grid, warps, registers, stack, f"{shared / 1024:.1f}", held)
                print("|", " | ".join(map(str, row)), f"| {held * warps} |", flush=True)


if __name__ == "__main__":
    main()
