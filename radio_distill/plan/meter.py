"""What running a model on tensors without data tells: operations, memory traffic, kernels, peak.

Models run on fake tensors, which have shape, type and device but no data, so a training step of any
size is measured in seconds on any machine. Code whose course depends on values cannot be. Of a
frozen encoder's equal blocks one is run for each shape of input, see :func:`share_equal_blocks`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, ClassVar
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from ..system.compiled import blocks_of

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_NOTHING_WRITTEN = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}
_DEVICE_OF = torch.ops.prim.device.default
"""What autograd asks of a tensor that is no plain one, more often than all else together."""
_NAMES_OF_PLACE = {"layer_idx", "layer_id", "layer_index", "index", "idx"}


def fake_tensors() -> FakeTensorMode:
    """Return the mode under which to build and run what is measured."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_module(module: nn.Module) -> nn.Module:
    """Turn a module of the meta device, in place, into one of fake tensors on the CPU.

    Must run under :func:`fake_tensors`. Returns the module.
    """
    return module._apply(  # to_empty makes fakes of the meta tensors first, which takes four times
        lambda tensor: torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
        )
    )


@dataclass(frozen=True, slots=True)
class Work:
    """What a device has to do."""

    flops: float = 0
    """Of matrix products, convolutions and attention; a multiplication and an addition are two."""
    traffic: float = 0
    """Bytes that all other operators read and write, as they run one by one."""
    kernels: float = 0
    """Operators that launch something: all but views."""
    block_traffic: float = 0
    """Of the traffic, that inside transformer blocks, most of which compilation spares."""
    block_kernels: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.traffic + other.traffic,
            self.kernels + other.kernels,
            self.block_traffic + other.block_traffic,
            self.block_kernels + other.block_kernels,
        )

    def __mul__(self, factor: float) -> "Work":
        return Work(
            self.flops * factor,
            self.traffic * factor,
            self.kernels * factor,
            self.block_traffic * factor,
            self.block_kernels * factor,
        )

    def __sub__(self, other: "Work") -> "Work":
        return self + other * -1

    def fused(self, traffic: float, kernels: float) -> "Work":
        """Return what is left when blocks keep these shares of their traffic and their kernels."""
        return replace(
            self,
            traffic=self.traffic - (1 - traffic) * self.block_traffic,
            kernels=self.kernels - (1 - kernels) * self.block_kernels,
        )

    def inside_blocks(self) -> "Work":
        """Return the same as work of which nothing is outside of blocks."""
        return replace(self, block_traffic=self.traffic, block_kernels=self.kernels)


@dataclass(frozen=True)
class Speed:
    """What a device does in a second."""

    bfloat16: float
    """Operations of matrix products alone; float16 is as bfloat16."""
    float32: float
    streaming: float
    """Bytes of elementwise kernels."""
    link: float = 370e9
    """Bytes of an all-reduce among the devices of a node."""
    launch: float = 0
    """Seconds of an operator where the device is its own host; on others launches go beside."""

    @property
    def is_host(self) -> bool:
        return self.launch > 0

    def seconds(self, work: Work, dtype: str) -> float:
        """Return how long the device is busy with some work."""
        rate = self.float32 if dtype == "float32" else self.bfloat16
        return work.flops / rate + work.traffic / self.streaming + work.kernels * self.launch


class _Meter(TorchDispatchMode, ABC):
    """A mode that sees every operator, and can be told what a block takes that is not run again."""

    active: ClassVar[list[Any]] = []

    def __enter__(self) -> Any:
        self.active.append(self)
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.active.remove(self)
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _DEVICE_OF:
            return func(*args)
        return self.see(func, args, kwargs or {})

    @abstractmethod
    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Count an operator, and return what it returns."""

    @abstractmethod
    def record(self, run: Callable[[], Any], is_block: bool) -> tuple[Any, Any]:
        """Return what ``run`` returns, and what :meth:`replay` needs to count it again."""

    @abstractmethod
    def replay(self, taken: Any) -> None:
        """Count what was recorded once more."""


class _WorkMeter(_Meter):
    """Adds up the work of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flops = _flops_of(func._overloadpacket)
        result = func(*args, **kwargs)
        if flops is not None:
            self.work += Work(flops=flops(*args, **kwargs, out_val=result), kernels=1)
        elif not func.is_view:
            self.work += _elementwise(func, args, kwargs, result)
        return result

    def record(self, run: Callable[[], Any], is_block: bool) -> tuple[Any, Work]:
        before = self.work
        result = run()
        taken = self.work - before
        if is_block:
            taken = taken.inside_blocks()
            self.work = before + taken
        return result, taken

    def replay(self, taken: Work) -> None:
        self.work += taken


def _flops_of(packet: Any) -> Callable[..., int] | None:
    """Return what counts the operations of an operator: two products forward, four backward."""
    if packet in (_ATTENTION, _ATTENTION_BACKWARD):
        skip, products = (0, 4) if packet is _ATTENTION else (1, 8)

        def attention(*args: Any, **_: Any) -> int:
            query, key = args[skip], args[skip + 1]
            return products * query.numel() * int(key.shape[-2])

        return attention
    return flop_registry.get(packet)


def _elementwise(func: Any, args: Any, kwargs: Any, result: Any) -> Work:
    """Return the work of an operator that reads its inputs once and writes its results once."""
    inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(result))
    if _storages(outputs).keys() <= _storages(inputs).keys() and not func._schema.is_mutable:
        return Work()  # reshape and the like, where they copy nothing
    if func._overloadpacket in _NOTHING_WRITTEN:
        return Work()
    return Work(traffic=sum(map(_distinct_bytes, (*inputs, *outputs))), kernels=1)


def _distinct_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, those that are repeated by a stride of 0 once."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size if stride else 1 for size, stride in sides)


def measure_work(run: Callable[[], Any]) -> Work:
    """Return the work of ``run``, backward pass and recomputation included.

    Attention counts as one kernel that keeps no scores; its operations are two products, and four
    more in the backward pass: what a fused kernel computes twice is left out.
    """
    with _plain_attention(), _WorkMeter() as meter:
        run()
    work: Work = meter.work
    return work


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Keep attention in operators that :func:`_flops_of` knows."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _LiveBytes(_Meter):
    """Adds up the storages that are alive, as operators make them and as they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if func.is_view:
            return result
        existing = _storages((args, kwargs))
        for address, storage in _storages(result).items():
            if address not in existing:  # not a view of an input
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                finalize(storage, self._remove, storage.nbytes())
        return result

    def _remove(self, size: int) -> None:
        self.now -= size

    def record(self, run: Callable[[], Any], is_block: bool) -> tuple[Any, int]:
        before, self.peak, start = self.peak, self.now, self.now
        result = run()
        taken = self.peak - start
        self.peak = max(before, self.peak)
        return result, taken

    def replay(self, taken: int) -> None:
        self.peak = max(self.peak, self.now + taken)


def peak_memory(run: Callable[[], Any]) -> int:
    """Return the most bytes that tensors made by ``run`` occupy at one time.

    Tensors that were there before do not count. Gradients do, unless they exist already.
    """
    return peaks_memory(run, lambda _: None)[0]


def peaks_memory(first: Callable[[], Any], second: Callable[[Any], Any]) -> tuple[int, int]:
    """Return the same of two runs one after the other, each by itself.

    The second is given what the first returns, and what it keeps counts for both.
    """
    with _LiveBytes() as live:
        result = first()
        peak, live.peak = live.peak, live.now
        second(result)
    return peak, live.peak


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    return {
        storage._cdata: storage for storage in (item.untyped_storage() for item in _tensors(tree))
    }


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of what an operator takes or gives, as torch's walk does, but sooner."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(tuple(tree.values()))


def share_equal_blocks(model: nn.Module) -> None:
    """Let one of a frozen model's equal blocks stand for all, in place, while it is measured.

    Children of a list or a sequence are equal where their modules have the same types, settings and
    shapes. What one takes for inputs of some shapes is counted again for the others, which return
    tensors of the same shapes unrun; so the counts are those of all blocks run. Without gradients
    only.
    """
    shared: dict[Hashable, dict[Hashable, Any]] = {}
    compiled = set(blocks_of(model))
    for parent in list(model.modules()):
        if isinstance(parent, (nn.ModuleList, nn.Sequential)):
            for block in parent:
                if any(True for _ in block.children()):
                    known = shared.setdefault(structure(block), {})
                    block.forward = _measured_once(block.forward, known, block in compiled)


def structure(module: nn.Module) -> Hashable:
    """Return what decides a module's operators: types, settings that are no fractions, shapes."""
    parts = []
    for name, part in module.named_modules():
        settings = tuple(
            (key, value)
            for key, value in sorted(vars(part).items())
            if isinstance(value, (bool, int, str, tuple)) and key not in _NAMES_OF_PLACE
        )
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        shapes = tuple((key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors)
        parts.append((name, type(part), str(settings), shapes))
    return tuple(parts)


def _measured_once(
    forward: Callable[..., Any], known: dict[Hashable, Any], is_block: bool
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not _Meter.active or torch.is_grad_enabled():
            return forward(*args, **kwargs)
        meter = _Meter.active[-1]
        key = (type(meter), is_block, torch.is_autocast_enabled("cpu"), _shapes((args, kwargs)))
        if key in known:
            taken, shapes = known[key]
            meter.replay(taken)
            return tree_map(lambda leaf: leaf() if isinstance(leaf, _Empty) else leaf, shapes)
        result, taken = meter.record(lambda: forward(*args, **kwargs), is_block)
        if not _storages(result).keys() & _storages((args, kwargs)).keys():
            known[key] = taken, tree_map(_Empty.like, result)
        return result

    return run


@dataclass(frozen=True)
class _Empty:
    """Makes tensors of one shape."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def like(cls, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return cls(tuple(leaf.shape), leaf.stride(), leaf.dtype)

    def __call__(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


def _shapes(tree: Any) -> Hashable:
    leaves = tree_leaves(tree_map(_Empty.like, tree))
    return tuple(leaf if isinstance(leaf, _Empty) else str(leaf) for leaf in leaves)
