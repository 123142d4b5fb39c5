"""The same bits in each run, on a GPU too: every sum in a fixed order.

A processor adds in a fixed order anyway. Kernels of a GPU often do not: the backward passes of
attention, of samplers and of resizing add through atomics, and cuBLAS may choose another workspace,
with another order, from call to call. torch has other kernels for most of these and refuses those
that it has none for; what a stage differentiates has none of the latter.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
FIXED_WORKSPACES = (":4096:8", ":16:8")
"""What cuBLAS must be told; from the documentation of ``torch.use_deterministic_algorithms``."""

_FILLING: Any = torch.utils.deterministic  # whose types lack its one setting


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
