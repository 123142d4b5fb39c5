"""Forward, backward and update of what is trained: what an engine is, and that of one process.

Engines keep float32 weights and compute in the recipe's precision through autocast, and they *sum*
gradients over processes, so that a task weighs images and never asks who runs them. Teachers stay
outside: they are not trained, and a checkpoint must not carry them. The engine of several processes
is :mod:`.deepspeed_engine`'s.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..config import EngineConfig
from ..models.gradients import touch
from ..system.compiled import compile_blocks
from ..system.precision import autocast
from .optim import load_optimizer_tensors, optimizer_tensors, set_learning_rates

Closing = Callable[[], Tensor]
"""Gives a loss behind the last pass of a step; see :meth:`Engine.backward`."""


class Engine(ABC):
    """Runs forward, backward and update of what is trained.

    Args:
        model: everything that is trained, on ``device``.
        optimizer: of the model's parameters, in groups with names.
        config: the recipe's engine section.
        gradient_clip: largest norm of the gradient; 0 for no limit.
        device: where it runs.
    """

    cuts_weights = False
    """Whether a weight is whole only while its layer runs."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        gradient_clip: float,
        device: torch.device,
    ):
        self.device, self.model = device, model
        self._optimizer: Any = optimizer
        self._precision, self._clip = config.precision, gradient_clip
        self._callable: Any = model
        self._norm: float | Tensor = math.nan
        if config.compile is True:
            compile_blocks(model)

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        """Call the model in the recipe's precision."""
        with self.autocast():
            return self._callable(*arguments, **settings)

    def autocast(self) -> torch.autocast:
        """Return the context in which the model computes in the recipe's precision."""
        return autocast(self._precision, self.device)

    def whole(self, weights: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """Return the context in which weights are whole; every rank must enter it."""
        return nullcontext()

    def backward(
        self,
        loss: Tensor,
        last: bool,
        skip: Tensor | None = None,
        closing: Closing | None = None,
    ) -> None:
        """Add the gradient of ``loss`` to the step's, summed over ranks; ``last`` closes it.

        Where ``skip``, a scalar bool on the device, is true, the gradient is made NaN, so that
        :meth:`step` clears it and updates nothing. The host does not wait to learn it.
        ``closing``, asked behind the last pass, gives a loss made of what the gradients of all
        passes left in tensors that are no parameters; its own gradient is added too.
        """
        if skip is not None:
            loss = loss * torch.where(skip, math.nan, 1.0)
        self._add_gradient(loss, last, closing if last else None)

    @abstractmethod
    def _add_gradient(self, loss: Tensor, last: bool, closing: Closing | None) -> None:
        """Add it; ``closing`` comes with the last pass alone, and ``loss`` may be NaN."""

    def zero(self) -> Tensor | None:
        """Return a loss for a pass without images, which gives each weight zeros; None where only
        a forward pass does."""
        return touch(*self.model.parameters())

    @abstractmethod
    def step(self, learning_rates: Mapping[str, float]) -> bool:
        """Clip, update each group at its rate, clear; returns whether the norm was finite, so that
        it did update."""

    def gradient_norm(self) -> float:
        """Return the norm of the last step's gradient before clipping, which may wait for it; NaN
        where none was taken."""
        return float(self._norm)

    @abstractmethod
    def model_tensors(self) -> dict[str, Tensor]:
        """Whole float32 weights and buffers by name, on the host; every rank calls, rank 0 gets
        them."""

    @abstractmethod
    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Whole optimizer state by name, on the host; every rank calls, rank 0 gets it."""

    @abstractmethod
    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Restore both, whatever the number of ranks and the ZeRO stage that wrote them."""


class SingleProcessEngine(Engine):
    """Plain PyTorch on one device."""

    def _add_gradient(self, loss: Tensor, last: bool, closing: Closing | None) -> None:
        loss.backward()
        if closing is not None:
            closing().backward()

    def step(self, learning_rates: Mapping[str, float]) -> bool:
        set_learning_rates(self._optimizer, learning_rates)
        self._norm = float(clip_gradient(self.model, self._clip))  # the host waits here alone
        is_taken = math.isfinite(self._norm)
        if is_taken:
            self._optimizer.step()
        self._optimizer.zero_grad()
        return is_taken

    def model_tensors(self) -> dict[str, Tensor]:
        return on_host(self.model.state_dict())

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return on_host(optimizer_tensors(self._optimizer, self.model))

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(weights)
        load_optimizer_tensors(self._optimizer, self.model, optimizer)


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the host, so that what is written of them is of this step."""
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def clip_gradient(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradient down to norm ``limit`` (0: leave it); returns the norm before."""
    return nn.utils.clip_grad_norm_(model.parameters(), limit or float("inf"))
