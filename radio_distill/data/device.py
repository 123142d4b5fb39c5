"""From the loader to the device: images travel as uint8, and are made numbers where they arrive."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache

import torch

from ..types import ImageBatch
from .rendering import to_float


def on_device(batches: Iterable[ImageBatch], device: torch.device) -> Iterator[ImageBatch]:
    """Yield batches on a device, as float32 in [0, 1].

    On CUDA the next batch is copied, on a stream of its own, while this one is worked on. That
    needs pinned memory, which :class:`.loader.ShardBatches` gives.
    """
    copies = (_begin_copy(batch, device) for batch in batches)
    coming = next(copies, None)
    while coming is not None:
        if device.type == "cuda":
            _wait_for(coming, device)
        here, coming = coming, next(copies, None)
        yield replace(here, views={view: to_float(pixels) for view, pixels in here.views.items()})


def _begin_copy(batch: ImageBatch, device: torch.device) -> ImageBatch:
    if device.type != "cuda":
        return replace(batch, views={view: item.to(device) for view, item in batch.views.items()})
    with torch.cuda.stream(_copy_stream(device)):
        views = {view: item.to(device, non_blocking=True) for view, item in batch.views.items()}
    return replace(batch, views=views)


def _wait_for(batch: ImageBatch, device: torch.device) -> None:
    """Let what is computed from here on begin after the copies; the host goes on."""
    current = torch.cuda.current_stream(device)
    current.wait_stream(_copy_stream(device))
    for pixels in batch.views.values():
        pixels.record_stream(current)  # else its memory could be given to the next copy too early


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
