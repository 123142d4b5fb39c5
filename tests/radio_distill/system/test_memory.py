"""Running out of memory, for real: tensors too large, and a process that may have little."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from radio_distill.errors import ConfigError, OutOfMemoryError
from radio_distill.system.memory import explain_oom, is_out_of_memory, lower

ROOT = Path(__file__).resolve().parents[3]
TOO_MANY = 1 << 60
"""Bytes that no machine has: 1 EiB."""


def too_large() -> torch.Tensor:
    return torch.empty(TOO_MANY, dtype=torch.uint8)


def named() -> explain_oom:
    return explain_oom("teacher 'sam'", "1024x1024 px, 8 images", "lower teachers.sam.micro_batch")


def test_naming__tensor():
    with pytest.raises(OutOfMemoryError) as caught, named():
        too_large()
    assert str(caught.value) == (
        "out of memory in teacher 'sam' at 1024x1024 px, 8 images: asked for 1048576.0 TiB; "
        "lower teachers.sam.micro_batch"
    )
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_naming__array():
    with pytest.raises(OutOfMemoryError, match=r"1\.00 EiB"), named():
        np.empty(TOO_MANY, np.uint8)


def test_naming__python():
    with pytest.raises(OutOfMemoryError, match="8 images"), named():
        bytearray(TOO_MANY)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS")
def test_naming__process_with_little_memory():
    # Pieces that each fit: the limit is met somewhere inside a layer.
    program = """
    import resource, torch
    from radio_distill.errors import OutOfMemoryError
    from radio_distill.system.memory import explain_oom

    layer = torch.nn.Linear(1024, 1024)
    layer(torch.ones(1, 1024)).sum().backward()  # what is only made once is there
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20,) * 2)
    images = torch.ones(2000, 1024)
    try:
        with explain_oom("student", "2000 images", "lower engine.micro_batch"):
            kept = [images]
            while True:
                kept.append(layer(kept[-1]))
    except OutOfMemoryError as error:
        print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.stdout == (
        "out of memory in student at 2000 images: asked for 7.8 MiB; lower engine.micro_batch\n"
    ), done.stderr


def test_naming__innermost_names_it():
    with (
        pytest.raises(OutOfMemoryError, match="upsampler"),
        explain_oom("step", "8 images", "lower engine.micro_batch"),
        explain_oom("the upsampler", "grid 64x64", "lower upsampler.factor"),
    ):
        too_large()


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        too_large()


def test_naming__around_backward():
    loss = FailsInBackward.apply(torch.ones(2, requires_grad=True)).sum()
    with pytest.raises(OutOfMemoryError, match="'sam'"), named():
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_naming__inside_backward(reentrant):
    # Gradient checkpointing runs the forward pass again from within autograd's engine.
    calls = []

    def block(tokens):
        calls.append(tokens)
        with named():
            return (tokens if len(calls) == 1 else too_large()) ** 2  # which saves its input

    tokens = checkpoint(block, torch.ones(2, requires_grad=True), use_reentrant=reentrant)
    with (
        pytest.raises(OutOfMemoryError, match="'sam'"),
        explain_oom("step", "8 images", "lower engine.micro_batch"),
    ):
        tokens.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ConfigError("unknown"), KeyError("x")]
)
def test_naming__other_errors_pass(error):
    with pytest.raises(type(error)) as caught, named():
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "message",
    [
        # As torch writes them, from 1.13 to 2.9.
        "CUDA out of memory. Tried to allocate 2.10 GiB. GPU 0 has a total capacity of 79.15 GiB",
        "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 15.90 GiB total capacity)",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "[enforce fail at alloc_cpu.cpp:118] data. DefaultCPUAllocator: not enough memory: you "
        "tried to allocate 4096 bytes.",
        "unable to mmap 128 bytes from file </torch_1>: Cannot allocate memory (12)",
        "std::bad_alloc",
    ],
)
def test_is_out_of_memory__messages(message):
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(ValueError(message))


def test_is_out_of_memory__torchs_own():
    assert is_out_of_memory(torch.OutOfMemoryError("anything"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_naming__says_what_the_gpu_holds():
    held = torch.ones(1 << 20, device="cuda")
    figures = r"asked for .* TiB, .* were free, this process held"
    with pytest.raises(OutOfMemoryError, match=figures) as caught, named():
        torch.empty(1 << 45, dtype=torch.uint8, device="cuda")
    assert "\n" not in str(caught.value)
    assert torch.cuda.max_memory_allocated() >= held.nbytes


def test_lower__says_what_it_is_now():
    setting, otherwise = "teachers.sam.micro_batch", "lower teachers.sam.input_size"
    assert lower(setting, 0, 8, otherwise) == f"lower {setting} (now: all at once)"
    assert lower(setting, 4, 4, otherwise) == f"lower {setting} (now: 4)"
    assert lower(setting, 0, 1, otherwise) == otherwise
