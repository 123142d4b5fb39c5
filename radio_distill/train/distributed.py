"""Processes: who am I, how many are we, and the few collectives that the trainer needs.

The same code runs under plain python, ``torchrun``, ``accelerate launch`` and ``srun``: whichever
of their environment variables is present says rank and world size. accelerate's ``Accelerator``
is not used, since on CPU it counts one process where DeepSpeed has several.
"""

import atexit
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError, RadioDistillError

T = TypeVar("T")
_LEAST_TIMEOUT = 1800.0  # seconds; torch's own default for gloo


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

    Raises ConfigError where they contradict each other.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return World()
    defaults = ("0", "1", "0")
    rank, world_size, local_rank = (
        int(environment.get(name, default)) for name, default in zip(names, defaults, strict=True)
    )
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"{names[0]}={rank} does not lie below {names[1]}={world_size}; check the launcher"
        )
    return World(rank, world_size, local_rank)


def choose_device(name: str, world: World) -> torch.device:
    """Return the device of this process; ``auto`` takes a GPU where there is one."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("engine.device: cuda is asked for, but torch sees no GPU; set it to cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {world.rank} wants GPU {world.local_rank} of {torch.cuda.device_count()}; "
            "start at most one process for each GPU"
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def join(
    world: World, device: torch.device, hang_seconds: float = 0.0, alone: bool = False
) -> None:
    """Join the process group of a run with several processes; with ``alone``, of one too.

    The group lasts as long as the process, for DeepSpeed keeps groups that it once made: stages
    that run one after another in a process share them.

    Collectives time out later than ``hang_seconds``, so that the heartbeat, which says more, is
    first.
    """
    if dist.is_initialized() or (world.world_size == 1 and not alone):
        return
    atexit.register(_leave)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    os.environ.setdefault(
        "MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000)
    )
    if "MASTER_ADDR" not in os.environ:
        if int(os.environ.get("SLURM_NNODES", "1")) > 1:
            raise ConfigError(
                "MASTER_ADDR is not set for a run on several nodes: export "
                "MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)"
            )
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group(
        backend,
        rank=world.rank,
        world_size=world.world_size,
        timeout=_timeout(hang_seconds),
    )


def extend_timeouts(hang_seconds: float) -> None:
    """Give every process group the time-out of :func:`join`.

    DeepSpeed makes groups of its own with torch's default, which is shorter for NCCL: it would end
    a hanging run before the heartbeat has told where it hangs.
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


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of ``values`` over all processes, on each of them, where they lie."""
    if not dist.is_initialized():
        return values
    # NCCL sums nothing that lies on the host.
    device = torch.device("cuda") if dist.get_backend() == "nccl" else values.device
    total = values.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


def main_first(world: World, function: Callable[[], T]) -> T:
    """Call a function on rank 0 alone; every process returns its value, or raises its error.

    A process that did not learn of the error would wait for rank 0 for ever.
    """
    value: T | None = None
    error: RadioDistillError | None = None
    if world.is_main:
        try:
            value = function()
        except RadioDistillError as caught:
            error = caught
    value, error = from_main((value, error))
    if error is not None:
        raise error
    return cast(T, value)


def from_main(value: T) -> T:
    """Return rank 0's value of a small picklable object, on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_ranks(values: list[T]) -> list[T]:
    """Return the lists of all processes as one, in the order of ranks, on every process."""
    if not dist.is_initialized():
        return values
    lists: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]
