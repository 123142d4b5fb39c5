"""Memory of one device, for P parameters of student and heads, W devices, ZeRO stage z:

    weights    4 P, under z = 3 divided by W; from z = 1 on also DeepSpeed's master copy, 4 P / W
    gradients  4 P, from z = 2 on divided by W
    optimizer  8 P (two moments), from z = 1 on divided by W
    average    4 P for the student's EMA: of the first device, of all where it teaches (MESA)
    teachers   every teacher of the recipe, matrices in its dtype: each device holds all of them
    step       what the largest micro-batch takes beside these, see :func:`step_memory`

Left out: CUDA's own share, communication buffers, fragmentation (:data:`USABLE` leaves room for
them), and the parameters that ZeRO 3 gathers for a moment. Kernels are those of a CPU; their
temporary buffers are not seen, on a GPU they differ.
"""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..distill.losses import KINDS, distillation_loss
from ..distill.micro_batches import Pass
from ..models.position import NUM_DRAWS
from ..stage import Stage
from ..system.precision import autocast
from ..teacher_view import TeacherView
from ..types import Features
from .cost import ModelCosts

GIB = 2**30
USABLE = 0.9
"""Share of a device's memory that tensors may fill. Assumed."""
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device."""

    weights: float
    gradients: float
    optimizer: float
    average: float = 0
    teachers: float = 0
    step: float = 0

    @property
    def total(self) -> float:
        state = self.weights + self.gradients + self.optimizer + self.average
        return state + self.teachers + self.step

    def fits(self, gib: float) -> bool:
        """Return whether it leaves the room that :data:`USABLE` asks for on so much memory."""
        return self.total <= USABLE * gib * GIB


def state_memory(parameters: int, zero_stage: int, devices: int) -> Memory:
    """Return the bytes of float32 weights, gradients and moments on one of some devices."""
    whole, part = 4 * parameters, 4 * parameters / devices
    return Memory(
        weights=(part if zero_stage == 3 else whole) + (part if zero_stage else 0),
        gradients=part if zero_stage >= 2 else whole,
        optimizer=2 * (part if zero_stage else whole),
    )


def step_memory(costs: ModelCosts, stage: Stage, passes: Sequence[Pass], images: int) -> int:
    """Return the most bytes that a micro-batch takes beside weights, gradients and moments.

    That is the views of its images, the targets of all passes over them, and the larger of two: a
    teacher at work on the images of one call, with its own map, of which the normalizer makes the
    target; the student with its losses.
    """
    sizes = {view.rendered for item in passes for view in item.views.values()}
    sizes |= {item.size for item in passes}
    pixels = _FLOAT * images * 3 * sum(map(math.prod, sizes))
    kept: dict[TeacherView, int] = {}
    peaks = []
    for item in passes:
        targets = {name: costs.target(view, images) for name, view in item.views.items()}
        for view in item.views.values():
            tensors: list[Tensor] = [part for part in targets[view.teacher] if part is not None]
            kept[view] = sum(tensor.nbytes for tensor in tensors)
            peaks.append(kept[view] + _encode_memory(costs, stage, view, images))
        peaks.append(_learning_memory(costs, stage, item, targets, images))
    return pixels + sum(kept.values()) + max(peaks)


def _encode_memory(costs: ModelCosts, stage: Stage, view: TeacherView, images: int) -> int:
    """Return what a teacher takes for the images of one call."""
    limit, inputs = stage.teachers[view.teacher].micro_batch, view.inputs(images)
    if view.is_upsampled:
        inputs *= costs.upsamplers[stage.name].cost(view.grid)
        limit = stage.upsampler.micro_batch or limit
    pixels = torch.empty(min(inputs, limit or inputs), 3, *view.encoded)
    return peak_memory(lambda: costs.teachers[view.teacher].encode(pixels))


def _learning_memory(
    costs: ModelCosts, stage: Stage, item: Pass, targets: Mapping[str, Features], images: int
) -> int:
    """Return what forward, losses and backward of one pass take."""

    def learn() -> None:
        with autocast(stage.engine.precision, torch.device("cpu")):
            predictions = costs.student(
                pixels, item.partition.teachers, draws=torch.empty(images, NUM_DRAWS)
            )
        weights = {f"{name}/{kind}": 1.0 for name in targets for kind in KINDS}
        report = distillation_loss(predictions.features, targets, stage.loss, weights)
        report.total.sum().backward()

    pixels = torch.empty(images, 3, *item.size)
    return peak_memory(learn)


def peak_memory(run: Callable[[], Any]) -> int:
    """Return the most bytes that tensors made by ``run`` occupy at one time.

    Tensors that were there before do not count. Gradients do, unless they exist already.
    """
    with _LiveBytes() as live:
        run()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that are alive, as operators make them and as they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        existing = _storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        for address, storage in _storages(result).items():
            if address not in existing:  # not a view of an input
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._remove, storage.nbytes())
        return result

    def _remove(self, size: int) -> None:
        self._now -= size


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
