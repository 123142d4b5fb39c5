"""The meeting of a run's processes, with a message while some are missing, and an end.

torch waits without a word for processes that were never started, for instance because RANK and
WORLD_SIZE are left over in a shell from another run. This wait is announced, and ends.
"""

import ipaddress
import logging
import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from ..errors import ConfigError

logger = logging.getLogger(__name__)

FORGET = "unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT"
"""Command that makes a shell forget an earlier run."""
ANNOUNCED = 3.0
"""Seconds after which a wait is announced."""
HERE, ELSEWHERE = 40.0, 600.0
"""Seconds to wait for processes that were started by hand on this machine, and for all others: a
scheduler may start them minutes apart."""


def meet(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Return the store that all processes of a run share, once they are all there.

    The place is MASTER_ADDR and MASTER_PORT; rank 0 keeps the store there, unless torchrun does.

    Args:
        rank: of this process.
        world_size: how many are to come.
        timeout: of the store's own calls, later on.

    Raises:
        ConfigError: some do not come, or the place is taken.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = _Wait(f"{address}:{port}", rank, world_size, _longest_wait(address))
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if by_torchrun or rank > 0:
        while not _answers(address, port):
            wait.for_process("process 0")
    if by_torchrun:
        store, *_ = next(
            dist.rendezvous("env://", rank=rank, world_size=world_size, timeout=timeout)
        )
        return store
    try:
        store = dist.TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
        store.set(f"here/{rank}", "")
        for other in range(world_size):
            while not store.check([f"here/{other}"]):
                wait.for_process(f"process {other}")
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"the processes of the run cannot meet at {address}:{port}: {reason}; set MASTER_PORT "
            f"to a free port, or `{FORGET}` for one process"
        ) from error
    return store


class _Wait:
    """A wait that is announced, and ends with an error."""

    def __init__(self, place: str, rank: int, world_size: int, limit: float):
        self._place, self._rank, self._world_size = place, rank, world_size
        self._limit, self._start, self._is_announced = limit, time.monotonic(), False

    def for_process(self, name: str) -> None:
        """Wait a moment for another process; raises ConfigError where it has taken too long."""
        waited = time.monotonic() - self._start
        variables = f"RANK={self._rank} WORLD_SIZE={self._world_size}"
        if waited > self._limit:
            raise ConfigError(
                f"{name} of {self._world_size} did not come to {self._place} in {waited:.0f} s "
                f"({variables}); start all of them, or `{FORGET}` for one process"
            )
        if waited > ANNOUNCED and not self._is_announced:
            self._is_announced = True
            logger.warning(
                "waiting at %s for %s of %d, at most %.0f s (%s); for one process, stop this and "
                "`%s`",
                self._place, name, self._world_size, self._limit, variables, FORGET,
            )  # fmt: skip
        time.sleep(min(0.05 + waited / 20, 1.0))


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def _longest_wait(address: str) -> float:
    try:
        is_here = address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        is_here = False
    return HERE if is_here and "SLURM_STEP_ID" not in os.environ else ELSEWHERE
