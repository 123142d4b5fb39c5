"""The processes of a run: rank and world size, joining, and the collectives that training needs.

The same code runs under plain python, ``torchrun``, ``accelerate launch`` and ``srun``: whichever
of their environment variables is present says rank and world size. accelerate's ``Accelerator``
is not used, since on CPU it counts one process where DeepSpeed has several.
"""

import atexit
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError, RadioDistillError
from .rendezvous import FORGET, meet

S = TypeVar("S")
T = TypeVar("T")
_LEAST_TIMEOUT = 1800.0  # seconds; torch's own default for gloo
_ONE_EACH = "start at most one process for each GPU"

_store: dist.Store | None = None
"""The store of the run's processes, once they have joined."""
_waits = 0
"""Number of times they have waited for rank 0."""
_is_alone = False
"""Whether this is rank 0 inside :func:`run_on_main`, where no other process takes part."""


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_from(environment: Mapping[str, str]) -> World:
    """Read rank and world size from a launcher's environment variables.

    Raises ConfigError where they contradict each other, or are left over from another run.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, world_size, local_rank = (
        _number(environment, name, default) for name, default in zip(names, (0, 1, 0), strict=True)
    )
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"{names[0]}={rank} does not lie below {names[1]}={world_size}; check the launcher, or "
            f"`{FORGET}` if they are left over from another run"
        )
    if names[0] == "RANK" and world_size > 1:
        for name in ("RANK", "MASTER_ADDR"):
            if name not in environment:
                raise ConfigError(
                    f"WORLD_SIZE={world_size} is set and {name} is not, so no launcher started "
                    f"this; `{FORGET}` for one process, or start {world_size} with `torchrun "
                    f"--nproc-per-node {world_size}`"
                )
    return World(rank, world_size, local_rank)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(environment.get(name, default))
    except ValueError:
        raise ConfigError(
            f"{name}={environment[name]} is no whole number; `unset {name}`, or fix the launcher"
        ) from None


def cores_of_process(environment: Mapping[str, str]) -> int:
    """Return how many cores this process has to itself.

    What the launcher has bound it to, or, where ``torchrun`` says how many processes share the
    machine, its part of them; at least 1.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // _number(environment, "LOCAL_WORLD_SIZE", 1))


def choose_device(name: str, world: World, tf32: bool = False) -> torch.device:
    """Return the device of this process; ``auto`` takes a GPU where there is one.

    On a GPU, float32 is float32 from here on, in cuBLAS as in cuDNN, whose convolutions use TF32
    by default. With ``tf32`` both round what they multiply to its 10 bits.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("engine.device: cuda is asked for, but torch sees no GPU; set it to cpu")
    index = gpu_index(world, torch.cuda.device_count())
    torch.cuda.set_device(index)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    return torch.device("cuda", index)


def gpu_index(world: World, visible: int) -> int:
    """Return which of the visible GPUs is this process's.

    Where a process sees one, it is its own: Slurm shows each task its own with ``--gpus-per-task``
    or ``--gpu-bind``. That no other process has it too is found out by :func:`join`.
    """
    if visible == 1:
        return 0
    if world.local_rank >= visible:
        raise ConfigError(
            f"process {world.rank} wants GPU {world.local_rank} of {visible}; {_ONE_EACH}"
        )
    return world.local_rank


def join(
    world: World, device: torch.device, hang_seconds: float = 0.0, alone: bool = False
) -> None:
    """Join the process group of a run with several processes; with ``alone``, of one too.

    The group lasts as long as the process, for DeepSpeed keeps groups that it once made: stages
    that run one after another in a process share them.

    Collectives time out later than ``hang_seconds``, so that the watchdog, which says more, is
    first.

    Raises:
        ConfigError: the other processes do not come, or two of them have one GPU.
    """
    global _store
    if dist.is_initialized() or (world.world_size == 1 and not alone):
        return
    atexit.register(_leave)
    # DeepSpeed insists on it, and takes the GPU of this number; srun does not set it.
    os.environ["LOCAL_RANK"] = str(world.local_rank if device.index is None else device.index)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    port = _number(
        os.environ, "MASTER_PORT", 20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000
    )
    if not 0 < port < 65_536:
        raise ConfigError(f"MASTER_PORT={port} is no port; set it to a free one, 1024 to 65535")
    os.environ["MASTER_PORT"] = str(port)
    if "MASTER_ADDR" not in os.environ:
        if int(os.environ.get("SLURM_NNODES", "1")) > 1:
            raise ConfigError(
                "MASTER_ADDR is not set for a run on several nodes: export "
                "MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)"
            )
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    with _interruptible(world):
        _store = meet(world.rank, world.world_size, _timeout(hang_seconds))
        if device.type == "cuda":
            _check_own_gpu(_store, world, device)
        dist.init_process_group(
            backend,
            store=_store,
            rank=world.rank,
            world_size=world.world_size,
            timeout=_timeout(hang_seconds),
        )


@contextmanager
def _interruptible(world: World) -> Iterator[None]:
    """Let Ctrl-C end a process that waits for others, which Python's own handler does not.

    Rank 0 gets Python's handler back behind the block, to say what is left; the others keep the
    system's, until the trainer listens.
    """
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if is_ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if world.is_main:
            signal.signal(signal.SIGINT, before)


def _check_own_gpu(store: dist.Store, world: World, device: torch.device) -> None:
    """Raise ConfigError on every process where two have one GPU; NCCL would end with a stack."""
    own = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
    store.set(f"gpu/{world.rank}", own)
    rank_of: dict[bytes, int] = {}
    for rank in range(world.world_size):
        other = rank_of.setdefault(store.get(f"gpu/{rank}"), rank)
        if other != rank:
            raise ConfigError(f"processes {other} and {rank} have the same GPU; {_ONE_EACH}")


def extend_timeouts(hang_seconds: float) -> None:
    """Give every process group the time-out of :func:`join`.

    DeepSpeed makes groups of its own with torch's default, which is shorter for NCCL: it would end
    a hanging run before the watchdog has told where it hangs.
    """
    if not dist.is_initialized():
        return
    from torch.distributed import distributed_c10d as c10d

    # Public from torch 2.15 on; the groups can be listed in private only.
    set_timeout = getattr(c10d, "set_timeout", None) or c10d._set_pg_timeout
    for group in list(c10d._world.pg_map):
        set_timeout(_timeout(hang_seconds), group)


def _timeout(hang_seconds: float) -> timedelta:
    return timedelta(seconds=max(_LEAST_TIMEOUT, 2 * hang_seconds))


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_shared() -> bool:
    """Return whether what is done now is done by several processes together."""
    return dist.is_initialized() and not _is_alone


def current_world() -> World:
    """Return this process's place among those that take part in what is done now."""
    return World(dist.get_rank(), dist.get_world_size()) if is_shared() else World()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum of ``values`` over all processes, on each of them, where they lie."""
    if not is_shared():
        return values
    # NCCL sums nothing that lies on the host.
    device = torch.device("cuda") if dist.get_backend() == "nccl" else values.device
    total = values.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


def run_on_main(
    world: World, function: Callable[[], T], waiting: Callable[[], None] | None = None
) -> T:
    """Call a function on rank 0 alone; every process returns its value, or raises its error.

    A process that did not learn of the error would wait for rank 0 for ever. The others call
    ``waiting`` about once a second meanwhile. For what ``function`` calls, rank 0 is all there is:
    the probes of an evaluation are trained as on one process.
    """
    global _is_alone
    if _is_alone:
        return function()
    value: T | None = None
    error: RadioDistillError | OSError | None = None
    if world.is_main:
        _is_alone = True
        try:
            value = function()
        except (RadioDistillError, OSError) as caught:
            error = caught
        finally:
            _is_alone = False
    _wait_for_main(world, waiting)
    value, error = broadcast_object((value, error))
    if error is not None:
        raise error
    return cast(T, value)


def _wait_for_main(world: World, waiting: Callable[[], None] | None) -> None:
    """Wait until rank 0 is here too, however long that takes.

    A collective would time out: rank 0 may read every byte of the shards, which takes hours.
    """
    global _waits
    if _store is None:
        return
    _waits += 1
    key, pause = f"run_on_main/{_waits}", 0.001
    if world.is_main:
        _store.set(key, "done")
    while not _store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
        if waiting is not None:
            waiting()


def broadcast_object(value: T) -> T:
    """Return rank 0's value of a small picklable object, on every process."""
    if not is_shared():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def share_out(items: Sequence[S], work: Callable[[Sequence[S]], Iterable[T]]) -> list[T]:
    """Return one result for each item, in their order, on every process; they take turns.

    ``work`` is given the items of this process, every ``world_size``-th, and yields a result for
    each, which is pickled and so lies on the host. What one process raises, all do: a process that
    did not learn of it would wait for ever.
    """
    world = current_world()
    own: list[T] = []
    error: RadioDistillError | OSError | None = None
    try:
        own = list(work(items[world.rank :: world.world_size]))
    except (RadioDistillError, OSError) as caught:
        if not is_shared():
            raise
        error = caught
    if not is_shared():
        return own
    parts = [(own, error)] * world.world_size
    dist.all_gather_object(parts, (own, error))
    for _, failed in parts:
        if failed is not None:
            raise failed
    return [parts[n % world.world_size][0][n // world.world_size] for n in range(len(items))]


def all_gather_object(values: list[T]) -> list[T]:
    """Return the lists of all processes as one, in the order of ranks, on every process."""
    if not is_shared():
        return values
    lists: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]
