"""Decoding processes: how they start, which signals they take, and that they end."""

import atexit
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

from ..errors import DataError
from ..system.signals import SIGNALS

_GRACE = 2.0
"""Seconds that workers have to end by themselves; one that waits for a disk would take longer."""


class WorkerDiedError(DataError):
    """A process that was ended from outside, for instance because memory was short."""

    exit_status = 1
    """It may go well the next time."""


def prepare_worker(worker: int) -> None:
    """Make a new process ready to decode.

    Slurm sends its signals to every process of a job; a worker would run the handler of its parent,
    or die before the parent has saved.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")  # what matters is counted as a bad image


@contextmanager
def running(loader: "DataLoader[Any]") -> Iterator[Iterator[Any]]:
    """Start the workers of a loader, and end them in any case.

    As they ignore SIGTERM, multiprocessing would wait for them for ever at the end of the program.
    """
    # Workers inherit the mask, so that no signal can reach one while it starts.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    stream = iter(loader)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    end = partial(_end, stream)
    atexit.register(end)
    try:
        yield stream
    finally:
        atexit.unregister(end)
        end()


def _end(stream: Any) -> None:
    workers = getattr(stream, "_workers", [])  # there are none with workers=0
    timer = threading.Timer(_GRACE, _kill, [workers])
    if any(worker.is_alive() for worker in workers):  # not when called again after atexit
        with suppress(RuntimeError):  # at the end of a program no thread may start any more
            timer.start()
    with suppress(RuntimeError):  # torch tells again of a worker that died
        getattr(stream, "_shutdown_workers", lambda: None)()
    timer.cancel()
    _kill(workers)
    for worker in workers:
        worker.join(_GRACE)


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()  # does nothing where a worker has ended
