"""Launch settings of the Triton kernels, by architecture and number type.

``launches.json`` beside this file has what ``python -m benchmarks.joint_bilateral_gpu --sweep``
found to be fastest: ``{"90": {"bfloat16": {"multiply": {...}}}}``, by compute capability. What has
no entry is launched by :data:`DEFAULT`. Nothing is searched for while a program runs: that would
synchronise, and might choose another order of additions in the next run.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("launches.json")
Settings = Mapping[str, int]
"""``BLOCK``, channels of a block (half for 32 bits); ``num_warps``, which ``multiply`` and
``grad_folded`` take for each 64 target pixels of a product; ``num_stages``, depth of pipeline."""
DEFAULT: Mapping[str, Settings] = {
    "multiply": {"BLOCK": 128, "num_warps": 4, "num_stages": 3},
    "grad_folded": {"BLOCK": 64, "num_warps": 4, "num_stages": 3},
    "grad_low": {"BLOCK": 256, "num_warps": 8, "num_stages": 3},
}
"""By kernel: at most 64 sums a thread. Read off the machine code for sm_80 and sm_90, not timed."""


def launch_settings(kernel: str, map_: torch.Tensor) -> Settings:
    """Return how a kernel is launched for a map, by its device and number type."""
    timed = _table(TABLE).get(architecture(map_.device), {}).get(number_type(map_.dtype), {})
    settings: Settings = timed.get(kernel, DEFAULT[kernel])
    return settings


def architecture(device: torch.device) -> str:
    """Return the compute capability as two digits; of the interpreter ``cpu``."""
    if device.type != "cuda":
        return device.type
    return "{}{}".format(*torch.cuda.get_device_capability(device))


def number_type(dtype: torch.dtype) -> str:
    """Return a type's name in the table."""
    return str(dtype).removeprefix("torch.")


def write_table(device: str, dtype: str, found: Mapping[str, Settings], path: Path = TABLE) -> None:
    """Put settings of kernels in the place of those of one architecture and type."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    table.setdefault(device, {})[dtype] = {name: dict(found[name]) for name in sorted(found)}
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _table.cache_clear()


@lru_cache
def _table(path: Path) -> dict[str, dict[str, dict[str, Settings]]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
