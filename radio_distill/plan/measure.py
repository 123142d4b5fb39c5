"""What running something costs, found without running it: floating-point operations and memory.

Code runs on fake tensors, which have shape, type and device but no data, so a training step of any
size is measured in seconds on any machine. Code whose course depends on values cannot be measured.
Kernels are those of a CPU; their temporary buffers are not seen, on a GPU they differ.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def fake_tensors() -> FakeTensorMode:
    """Return the mode under which to build and run what is measured."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_module(module: nn.Module) -> nn.Module:
    """Turn a module of the meta device, in place, into one of fake tensors on the CPU.

    Must run under :func:`fake_tensors`. Returns the module.
    """
    return module.to_empty(device="cpu")


def count_flops(run: Callable[[], Any]) -> int:
    """Return the floating-point operations of ``run``, backward pass and recomputation included.

    A multiplication and an addition are two. As usual, only matrix products, convolutions and
    attention count. Attention is counted as its two products, once more for each in the backward
    pass; what a fused kernel computes twice is left out.
    """
    with _slow_attention(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@contextmanager
def _slow_attention() -> Iterator[None]:
    """Keep attention in parts that every supported version of the counter knows."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


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
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self._now -= size


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
