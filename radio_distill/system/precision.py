"""Number types that a device computes natively, what one costs where it does not, and equal sums.

bfloat16 halves memory and time on devices that have instructions for it: NVIDIA GPUs from Ampere
on, processors with AMX or AVX512-BF16, Arm processors with BF16. Everywhere else it is emulated, on
processors at several times the time of float32. A field that is ``auto`` therefore means bfloat16
on the former and float32 on the latter.

:func:`deterministic` is for the same bits in each run, on a GPU too: every sum in a fixed order. A
processor adds in a fixed order anyway. Kernels of a GPU often do not: the backward passes of
attention, of samplers and of resizing add through atomics, and cuBLAS may choose another workspace,
with another order, from call to call. torch has other kernels for most of these and refuses those
that it has none for; what a stage differentiates has none of the latter.
"""

import copy
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

AUTO = "auto"
REDUCED = ("bfloat16", "float16")

_ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_WITHOUT_BFLOAT16 = ("AVX512_CORE", "AVX512_CORE_VNNI")  # here oneDNN itself says that it has it

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
FIXED_WORKSPACES = (":4096:8", ":16:8")
"""What cuBLAS must be told; from the documentation of ``torch.use_deterministic_algorithms``."""

_FILLING: Any = torch.utils.deterministic  # whose types lack its one setting


def is_native(dtype: str, device: str | torch.device) -> bool:
    """Return whether a device has instructions for the matrix products of a number type.

    A processor is judged as torch uses it, so limits that are set for oneDNN
    (``ONEDNN_MAX_CPU_ISA``) count.
    """
    device = torch.device(device)
    if dtype == "float32":
        return True
    if device.type == "cuda":
        if dtype == "float16":
            return True
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        return _bfloat16_on_cpu() if dtype == "bfloat16" else _float16_on_cpu()
    return False


def native_dtype(device: str | torch.device) -> Literal["float32", "bfloat16"]:
    """Return what ``auto`` means on a device: ``bfloat16`` where it is native, else ``float32``."""
    return "bfloat16" if is_native("bfloat16", device) else "float32"


def resolved_dtype(dtype: str, device: str | torch.device) -> str:
    """Return a number type with ``auto`` replaced by what it means on a device."""
    return native_dtype(device) if dtype == AUTO else dtype


def autocast(dtype: str, device: torch.device) -> torch.autocast:
    """Return the context in which matrix products are of a type; ``auto`` is the device's own.

    For float32 autocast is switched off, not left as the caller has it.
    """
    dtype = resolved_dtype(dtype, device)
    reduced = dtype in REDUCED
    return torch.autocast(device.type, getattr(torch, dtype) if reduced else None, enabled=reduced)


def slowdown(dtype: str, device: str | torch.device = "cpu") -> float:
    """Measure how much longer an MLP of a ViT-S takes in a number type than in float32.

    Takes a fraction of a second. The least of several times counts, since a machine may have other
    work.
    """
    device = torch.device(device)
    layers = nn.Sequential(nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384)).to(device)
    stored = copy.deepcopy(layers).to(getattr(torch, dtype))
    tokens = torch.randn(128, 384, device=device)

    def reduced() -> object:
        return stored(tokens.to(getattr(torch, dtype)))

    with torch.inference_mode():
        return _seconds(reduced, device) / _seconds(lambda: layers(tokens), device)


def emulation_warning(fields: Mapping[str, str], device: torch.device) -> str:
    """Return one line about fields that ask for a type which the device emulates, or nothing.

    Args:
        fields: number types by the name of the recipe's field.
        device: where they are used.
    """
    emulated = {
        name: dtype
        for name, dtype in fields.items()
        if dtype in REDUCED and not is_native(dtype, device)
    }
    if not emulated:
        return ""
    where = "this processor" if device.type == "cpu" else "this GPU"
    types = {dtype: f"{slowdown(dtype, device):.0f}" for dtype in dict.fromkeys(emulated.values())}
    cost = " and ".join(f"{dtype} at {factor} times" for dtype, factor in types.items())
    return (
        f"{where} emulates {cost} the time of float32 ({', '.join(emulated)}); "
        f"auto would be {native_dtype(device)} here"
    )


def _bfloat16_on_cpu() -> bool:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True  # there oneDNN asks the processor for the instructions themselves
    # On x86 it also says yes to plain AVX512, where it emulates them at half of float32's speed.
    limits = [os.environ.get(name, "").upper() for name in _ISA_LIMITS]
    if any(limit in _WITHOUT_BFLOAT16 for limit in limits):
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _float16_on_cpu() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _seconds(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    def timed() -> float:
        start = _now(device)
        call()
        return _now(device) - start

    timed()  # the first call chooses and compiles kernels
    return min(timed() for _ in range(repeats))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def deterministic(enabled: bool, warn_only: bool = False) -> Iterator[None]:
    """Let torch add in a fixed order within the block, if ``enabled``; else change nothing.

    The environment stays changed, since cuBLAS reads it when it is first used.

    Args:
        enabled: whether to do anything.
        warn_only: let operations that have no such order warn instead of raising RuntimeError.
    """
    if not enabled:
        yield
        return
    if os.environ.get(CUBLAS) not in FIXED_WORKSPACES:
        os.environ[CUBLAS] = FIXED_WORKSPACES[0]
    cudnn = torch.backends.cudnn
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        torch.backends.cuda.cudnn_sdp_enabled(),
        _FILLING.fill_uninitialized_memory,
    )
    try:
        _set((True, warn_only, True, False, False, False))
        yield
    finally:
        _set(before)


def _set(values: tuple[bool, bool, bool, bool, bool, bool]) -> None:
    enabled, warn_only, cudnn, benchmark, cudnn_attention, fill = values
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.backends.cudnn.deterministic = cudnn
    torch.backends.cudnn.benchmark = benchmark  # which takes the fastest, another one each time
    # Flash and memory-efficient attention have a fixed order for the asking; cuDNN's has no switch.
    torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
    # Finds reads of memory that nobody wrote, and costs a write of every new tensor.
    _FILLING.fill_uninitialized_memory = fill
