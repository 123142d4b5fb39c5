"""Two functions that change gradients and leave values alone, bit for bit.

A distributed engine waits until every parameter has its gradient, and ZeRO-3 gathers parameters in
the order of the modules. So a head that is not asked, or a body that is frozen for some steps, runs
all the same and receives zeros; ``requires_grad`` stays as it is.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients  # autograd hands in zeros for outputs that nobody used


class _Zero(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


def join_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return equal tensors; the gradient of any one reaches all, as zeros where it is not used."""
    joined: tuple[Tensor, ...] = _Join.apply(*tensors)
    return joined


def zero_gradient(tensor: Tensor) -> Tensor:
    """Return an equal tensor whose gradient is exactly zero (but not None)."""
    zeroed: Tensor = _Zero.apply(tensor)
    return zeroed
