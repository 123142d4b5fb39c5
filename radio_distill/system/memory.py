"""Says which part of a step ran out of memory, at which size, and which setting lowers it.

torch says how much one tensor asked for. What a user can change is a field of the recipe, and only
the code around the allocation knows which. What the operating system's OOM killer ends cannot be
caught; that shows as a process that died of signal 9.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from ..errors import OutOfMemoryError

_SIGNS = (
    "out of memory",  # CUDA and HIP: the allocator, and errors of the driver
    "DefaultCPUAllocator",
    "Cannot allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)
_ASKED = re.compile(r"allocate (\d[\d.]*) ([KMGTPE]iB|bytes)")


@contextmanager
def explain_oom(part: str, what: str, hint: str) -> Iterator[None]:
    """Turn running out of memory inside the block into one line; the innermost block names it.

    Args:
        part: what was running: ``teacher 'sam'``.
        what: on how much: ``1024x1024 px, 8 images``.
        hint: the setting that lowers it; see :func:`lower`.

    Raises:
        OutOfMemoryError: the line, with what torch tells of the sizes.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's own is a RuntimeError
        if not is_out_of_memory(error):
            raise
        figures = ", ".join(filter(None, (_asked(str(error)), _in_use())))
        line = f"out of memory in {part} at {what}{': ' if figures else ''}{figures}; {hint}"
        raise OutOfMemoryError(line) from error


def lower(setting: str, limit: int, images: int, otherwise: str) -> str:
    """Return the hint for a part that takes images in calls of at most ``limit``.

    Args:
        setting: the field of the recipe that sets the limit.
        limit: its value; 0 for all at once.
        images: that were in the call.
        otherwise: the hint where there was one image, and no fewer can be.
    """
    if images <= 1:
        return otherwise
    return f"lower {setting} (now: {limit or 'all at once'})"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory, of the host or of a device, was not enough."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def _asked(message: str) -> str:
    """Return what a message of an allocator says of the size that was asked for."""
    found = _ASKED.search(message)
    if found is None:
        return ""
    amount, unit = found.groups()
    return f"asked for {_readable(float(amount)) if unit == 'bytes' else f'{amount} {unit}'}"


def _in_use() -> str:
    """Return how much of the device is taken; empty without one, or where it answers no more."""
    with suppress(RuntimeError):
        if torch.cuda.is_initialized():
            free, total = torch.cuda.mem_get_info()
            reserved, peak = torch.cuda.memory_reserved(), torch.cuda.max_memory_allocated()
            return (
                f"{_readable(free)} of the device's {_readable(total)} were free, this process "
                f"held {_readable(reserved)} (peak of its tensors {_readable(peak)})"
            )
    return ""


def _readable(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
