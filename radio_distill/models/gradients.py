"""Functions that change gradients alone: values pass through them bit for bit."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients  # autograd hands in zeros for outputs that nobody used


class _Zero(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


class _Touch(Function):
    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient * torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


join_gradients: Callable[..., tuple[Any, ...]] = _Join.apply
"""Return equal tensors, bit for bit (None stays None); the gradient of any one reaches all of them,
as zeros where it is not used."""

touch: Callable[..., Tensor] = _Touch.apply
"""Return a scalar of zero that gives each tensor a gradient of zeros, or NaN where its own is."""

zero_gradient: Callable[[Tensor], Tensor] = _Zero.apply
"""Return an equal tensor, bit for bit, whose gradient is exactly zero (but not None)."""
