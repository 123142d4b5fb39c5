"""The Triton kernels without a GPU: in the interpreter, and through the compiler."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from upsamplers.joint_bilateral import triton_kernels
from upsamplers.joint_bilateral.triton_tiles import Folding

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent


def test_triton_kernels__in_the_interpreter():
    command = [sys.executable, "-m", "pytest", str(HERE / "interpreted_kernels.py"), "-q"]
    options = ["-p", "no:xdist", "-p", "no:cacheprovider", "-o", "timeout=0"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command + options,
        cwd=HERE.parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


class Recorder:
    """Stands for a kernel and notes how it would have been launched."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def launches(patch, dtype):
    """Return every launch of a forward and a backward pass."""
    from upsamplers.joint_bilateral import triton_apply, triton_fold, triton_range

    seen = []
    for module in (triton_apply, triton_fold, triton_range):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            patch.setattr(module, name, Recorder(getattr(module, name), seen))
    low = torch.zeros(1, 256, 8, 8, dtype=dtype, requires_grad=True)
    projected = torch.zeros(1, 32, 24, 24, dtype=dtype, requires_grad=True)
    scalar = torch.ones((), requires_grad=True)
    kernel = triton_kernels.range_weights(projected, scalar, scalar, 1)
    triton_kernels.apply_kernel(low, kernel).sum().backward()
    return seen


def signature(kernel, args, kwargs):
    """Return types, constants and alignments of a launch, as the compiler takes them."""
    pointers = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    types, constants, alignments = {}, {}, {}
    for number, name in enumerate(kernel.arg_names):
        value = named[name]
        if kernel.params[number].is_constexpr:
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name], alignments[(number,)] = pointers[value.dtype], [["tt.divisibility", 16]]
        else:
            types[name] = "i32"
    return types, constants, alignments


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize(
    ("dtype", "capability", "shared_memory"),
    [(torch.bfloat16, 90, 227 * 1024), (torch.float32, 80, 163 * 1024)],
)
def test_triton_kernels__compile(monkeypatch, dtype, capability, shared_memory):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    seen = launches(monkeypatch, dtype)
    assert len({kernel for kernel, *_ in seen}) == 8
    for kernel, args, kwargs in seen:
        source = ASTSource(kernel, *signature(kernel, args, kwargs))
        options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
        done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert done.metadata.shared <= shared_memory
        if kernel.__name__ in ("_multiply_kernel", "_grad_low_kernel", "_grad_folded_kernel"):
            assert "mma" in done.asm["ptx"]


@pytest.mark.parametrize("factor", [1, 2, 3, 5, 7, 11])
@pytest.mark.parametrize("radius", [1, 2, 3, 5])
@pytest.mark.parametrize("bicubic", [False, True])
def test_folding__window_holds_every_cell_that_counts(factor, radius, bicubic):
    cells = 2 * radius + 9
    eye = torch.eye(cells, dtype=torch.float64)[None, None]
    mode = "bicubic" if bicubic else "bilinear"
    fine = torch.nn.functional.interpolate(eye, (cells * factor, cells), mode=mode)[0, 0]
    middle = cells // 2
    around = fine[middle * factor - radius : (middle + 1) * factor + radius]
    counting = around.abs().amax(0).gt(1e-12).nonzero().flatten()
    rows, columns = Folding((factor, factor), radius, bicubic).window
    assert rows == columns
    assert rows // 2 == max(middle - counting.min(), counting.max() - middle)


@pytest.mark.parametrize("factor", [1, 2, 3, 5, 7, 11])
@pytest.mark.parametrize("radius", [1, 3, 5])
def test_folding__tile_covers_its_pixels_and_cells(factor, radius):
    folding = Folding((factor, factor), radius, False)
    tile, (rows, columns) = folding.tile, folding.window
    assert tile.cells >= (tile.rows + rows - 1) * (tile.columns + columns - 1)
    fine_pixels = tile.rows * tile.columns * math.prod(folding.factor)
    assert tile.pixels * tile.products(folding.factor) >= fine_pixels
    assert {tile.pixels & (tile.pixels - 1), tile.cells & (tile.cells - 1)} == {0}


def test_is_available__not_on_a_cpu_without_the_interpreter():
    assert triton_kernels.is_available(torch.device("cpu")) == triton.knobs.runtime.interpret
