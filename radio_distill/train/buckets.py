"""Gradients that are summed over the processes while the backward pass still runs."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

BUCKET_BYTES = 32 << 20
"""Enough that a link is busy, few enough that the first leave early; PyTorch's DDP has 25 MB."""


class GradientBuckets:
    """Sums gradients over all processes, a bucket of some parameters at a time.

    A bucket leaves as soon as the last pass of a step has reached all of it and those before it
    have left. So buckets leave in one order on every process, whatever its passes are of, and
    nobody waits for the device. The gradients become views of the buckets, so they take no more
    memory than before, but for one bucket.

    Args:
        parameters: all that are trained; each asks for a gradient.
        bucket_bytes: size from which a bucket is full.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], bucket_bytes: int = BUCKET_BYTES):
        self._buckets: list[list[nn.Parameter]] = [[]]
        for parameter in reversed(list(parameters)):  # as a backward pass comes by, more or less
            full = sum(it.numel() * it.element_size() for it in self._buckets[-1]) >= bucket_bytes
            if full:
                self._buckets.append([])
            self._buckets[-1].append(parameter)
            parameter.register_post_accumulate_grad_hook(self._arrive)
        self._bucket_of = {it: index for index, some in enumerate(self._buckets) for it in some}
        self._is_open = False
        self._missing: list[int] = []
        """Parameters of each bucket that the last pass has not reached yet."""
        self._sent: list[Any] = []
        """What to wait for, by bucket."""

    def open(self) -> None:
        """Begin to send: the backward pass that comes is the last of its step."""
        self._is_open, self._sent = True, []
        self._missing = [len(bucket) for bucket in self._buckets]

    def close(self) -> None:
        """Send what the pass did not reach, and make the device wait for all; every rank calls."""
        while len(self._sent) < len(self._buckets):
            self._send()
        for work in self._sent:
            work.wait()
        self._is_open = False

    def _arrive(self, parameter: nn.Parameter) -> None:
        if self._is_open:
            self._missing[self._bucket_of[parameter]] -= 1
            while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
                self._send()

    def _send(self) -> None:
        bucket = self._buckets[len(self._sent)]
        grads = [torch.zeros_like(it) if it.grad is None else it.grad for it in bucket]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        parts = flat.split([it.numel() for it in bucket])
        for parameter, part in zip(bucket, parts, strict=True):
            parameter.grad = part.view(parameter.shape)
        self._sent.append(dist.all_reduce(flat, async_op=True))
