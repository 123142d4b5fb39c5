"""Writes safetensors files while other threads go on, and knows the sum of what it meant to write.

safetensors' own writer holds Python's lock while a file of gigabytes is written, and its file can
only be summed up by reading it back, when a bad disk has had its chance. The format is a length, a
JSON header and the bytes of the tensors; ours is byte for byte the same file.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..system.files import sha256_of

_CHUNK = 16 << 20
_NAMES = {  # in the order that safetensors gives them
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors of the host, flushed to the disk.

    Returns:
        sha256 of the bytes in memory, so that :func:`verify` compares the disk with it.
    """
    # As the original: widest types first, so that every tensor begins at a multiple of its width.
    names = sorted(tensors, key=lambda name: (-_ORDER[tensors[name].dtype], name))
    header, offset = {}, 0
    for name in names:
        tensor, start = tensors[name], offset
        offset += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, offset],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for head in (len(text).to_bytes(8, "little"), text):
            digest.update(head)
            file.write(head)
        for name in names:
            content = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(content), _CHUNK):
                chunk = content[start : start + _CHUNK].data
                digest.update(chunk)
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def verify(path: Path, sha256: str) -> None:
    """Read a file back from the disk; raises CheckpointError where it is not what was meant."""
    with path.open("rb") as file:
        # What the system still holds in memory would tell nothing of the disk.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if sha256_of(path) != sha256:
        raise CheckpointError(
            f"{path} does not hold what was written to it; the disk or its memory is damaged"
        )
