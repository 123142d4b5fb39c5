"""Small tensors between host and device, without the host waiting for the device."""

from typing import Any

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device. Only pinned memory is copied without waiting."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class OnItsWay:
    """A copy of a device's numbers to the host; who reads it waits for these numbers alone."""

    def __init__(self, values: Tensor):
        self._values = values.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if values.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def tolist(self) -> list[Any]:
        """Return the numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[Any] = self._values.tolist()
        return numbers
