"""The Triton kernels without a GPU: in the interpreter, and through the compiler."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.joint_bilateral_compiled import compiled, launches
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


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize(
    ("dtype", "capability", "shared_memory"),
    [(torch.bfloat16, 90, 227 * 1024), (torch.float32, 80, 163 * 1024)],
)
def test_triton_kernels__compile(dtype, capability, shared_memory):
    seen = launches(dtype, batch=1, channels=256, cells=8, radius=1)
    assert len({launch.kernel for launch in seen}) == 9
    for launch in seen:
        done = compiled(launch, capability)
        assert done.metadata.shared <= shared_memory
        if launch.kernel.__name__ in (
            "_multiply_kernel",
            "_grad_low_kernel",
            "_grad_folded_kernel",
        ):
            assert "mma" in done.asm["ptx"]


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing is compiled in the interpreter")
def test_triton_kernels__another_batch_size_compiles_nothing_anew():
    size = {"channels": 256, "cells": 8, "radius": 1}
    one, three = (launches(torch.float32, batch=batch, **size) for batch in (1, 3))
    for first, second in zip(one, three, strict=True):
        assert first.constants == second.constants
        variable = [param for param in first.kernel.params if not param.is_constexpr]
        changing = [
            param
            for param, before, after in zip(
                variable, first.arguments, second.arguments, strict=True
            )
            if isinstance(before, int) and before != after
        ]
        assert all(param.do_not_specialize for param in changing), first.kernel.__name__


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
