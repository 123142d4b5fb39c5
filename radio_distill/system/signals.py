"""Signals that ask a run to stop at the end of its step: from Slurm, or from a person.

A handler that saves by itself would save in the middle of a step, and on one process alone. This
one only notes the signal; the trainer lets all processes agree, saves once, and ends.

SIGUSR2 is what submitit has Slurm send before the time limit; SIGTERM is what Slurm sends when it
preempts, requeues or cancels a job; SIGINT is Ctrl-C, whose second one aborts at once.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)

_noted: list[int] = []
_notices: list[str] = []


def requested() -> int:
    """Return the first signal that asked this process to stop, or 0."""
    return _noted[0] if _noted else 0


@contextmanager
def listening(keyboard: bool = False, notice: str = "") -> Iterator[None]:
    """Note signals inside the block; the handlers before it are restored at its end.

    Blocks may be nested. Outside the main thread, where Python sets no handlers, nothing is done.

    Args:
        keyboard: whether Ctrl-C is noted too, so only where :func:`requested` is asked often;
            a second one raises KeyboardInterrupt.
        notice: what the first Ctrl-C writes to stderr.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A script's background job ignores Ctrl-C from its start, and is to go on doing so.
    is_heard = keyboard and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    numbers = SIGNALS if is_heard else (signal.SIGUSR2, signal.SIGTERM)
    before = {number: signal.signal(number, _note) for number in numbers}
    _notices.append(notice)
    try:
        yield
    finally:
        _notices.pop()
        for number, handler in before.items():
            signal.signal(number, handler)
        if signal.getsignal(SIGNALS[0]) is not _note:
            _noted.clear()


def _note(number: int, frame: FrameType | None) -> None:
    del frame
    if number == signal.SIGINT:
        if number in _noted:
            raise KeyboardInterrupt
        if _notices[-1]:  # not through sys.stderr, in the middle of whose work this may come
            os.write(2, f"{_notices[-1]}\n".encode())
    _noted.append(number)
