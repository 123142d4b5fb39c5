"""Asks a run to stop at the end of its step, when Slurm is about to end the job.

A handler that saves by itself would save in the middle of a step, and on one process alone. Here it
only notes the signal; the training loop lets all processes agree, saves once, and ends.

SIGUSR2 is what submitit has Slurm send before the time limit; SIGTERM is what Slurm sends when it
preempts, requeues or cancels a job.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)

_noted: list[int] = []


def requested() -> int:
    """Return the first signal that asked this process to stop, or 0."""
    return _noted[0] if _noted else 0


@contextmanager
def listening() -> Iterator[None]:
    """Note signals inside the block; the handlers before it are restored at its end.

    Blocks may be nested. Outside the main thread, where Python sets no handlers, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if signal.getsignal(SIGNALS[0]) is not _note:
            _noted.clear()


def _note(number: int, frame: FrameType | None) -> None:
    del frame
    _noted.append(number)
