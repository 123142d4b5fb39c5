"""Launch settings of the Triton kernels: the default, and what was timed on an architecture.

``launches.json`` beside this file holds what ``python -m benchmarks.joint_bilateral_gpu --sweep``
found, by compute capability and number type: ``{"90": {"bfloat16": {"multiply": {...}}}}``. What
has no entry there runs with :data:`DEFAULT`. The settings are fixed for a run: a search at the
first call would synchronise, and might choose another order of additions in the next one.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("launches.json")
Settings = Mapping[str, int]
"""``BLOCK``: channels of a block, half as many for 32 bits; ``num_warps``; ``num_stages``, the
depth of the pipeline. ``multiply`` and ``grad_folded`` take these warps for each 64 target pixels
of a product."""

DEFAULT: dict[str, Settings] = {
    "multiply": {"BLOCK": 128, "num_warps": 4, "num_stages": 3},
    "grad_folded": {"BLOCK": 64, "num_warps": 4, "num_stages": 3},
    "grad_low": {"BLOCK": 256, "num_warps": 8, "num_stages": 3},
}
"""At most 64 sums a thread. Read off the machine code for sm_80 and sm_90, not timed."""


def launch_settings(kernel: str, tensor: torch.Tensor) -> Settings:
    """Return how a kernel is launched on the device and in the type of a tensor."""
    return _timed(_capability(tensor.device), _name(tensor.dtype)).get(kernel, DEFAULT[kernel])
