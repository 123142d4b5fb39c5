"""An exponential moving average of the student, in float32.

It is a whole second model, so it is evaluated, exported and checkpointed like the first, and can
teach it (MESA). It needs whole parameters, which ZeRO 3 leaves no rank, so they are refused
together.
"""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn


class Ema:
    """The average of a model's parameters over steps.

    Args:
        model: copied; the copy starts equal.

    Attributes:
        model: the averaged copy, in evaluation mode and without gradients.
    """

    def __init__(self, model: nn.Module):
        self.model = deepcopy(model).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """Set average = decay * average + (1 - decay) * parameter; buffers are copied."""
        parameters = dict(model.named_parameters())
        averages: list[Tensor] = []
        targets: list[Tensor] = []
        for name, average in self.model.named_parameters():
            parameter = parameters[name]
            assert parameter.shape == average.shape, f"{name} is not whole; gather it first"
            averages.append(average)
            targets.append(parameter.to(average))
        torch._foreach_lerp_(averages, targets, 1 - decay)  # a few kernels for all on a GPU
        buffers = dict(model.named_buffers())
        for name, copy in self.model.named_buffers():
            copy.copy_(buffers[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Averaged weights by name, as the model's own ``state_dict`` names them."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.model.load_state_dict(state)
