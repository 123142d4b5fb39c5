"""Ends a process whose steps no longer finish, with the stacks of its threads in the log.

When one process of a run hangs, the others wait for it in a collective, for ever or until a
time-out that says nothing of the cause. Each process therefore watches itself: those that wait
reach the limit with the one that hangs, every rank's stacks are in the log, and the one whose stack
differs is the culprit.

::

    last step          limit              limit + patience
        │                │                        │
        ├─ hangs ────────┼─ stacks, file, hook ───┤ ends with HUNG_STATUS
        └─ holds the GIL ┼───────── stacks ───────┘ ends with status 1, before the others end

All wait for ``patience`` before they end, since launchers kill the other processes as soon as one
is gone. A thread of Python's watches; while foreign code holds the interpreter lock (GIL) no such
thread runs, and faulthandler's timer, a thread in C, takes over: its stacks stand below a line
"Timeout" without a rank, and in the log alone.

A process that is stopped (SIGSTOP) or swapped out cannot write its stack; those of the others show
that they wait for it. A job that the scheduler suspends for longer than the limit is taken for hung
when it goes on. Left out: frames of C, for which ``py-spy dump --native`` is the tool, and source
lines, which would be read from a disk that may be what hangs.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType, TracebackType

from ..errors import HUNG_STATUS
from ..system.files import reason_of

_LOG = 2
"""File descriptor of stderr; whoever has replaced ``sys.stderr`` may be part of the hang."""


class Watchdog:
    """Watches the block that it is entered for; one at a time in a process.

    Args:
        limit: seconds without a :meth:`beat` after which the process is ended; 0 for never. Must
            exceed the longest step, saves and compilation included.
        rank: of this process, for the log.
        folder: gets ``stacks-rankN.txt``, with the same text as the log; None for the log alone.
        on_hang: called with the last finished step and one line of reason before the process ends,
            in a thread of its own; it may fail or hang.
        step: that was finished before the block.
    """

    def __init__(
        self,
        limit: float,
        rank: int,
        folder: Path | None = None,
        on_hang: Callable[[int, str], None] | None = None,
        step: int = 0,
    ):
        self.patience = min(5.0, limit / 4)
        """Seconds between the stacks and the end of the process."""
        self._limit, self._rank, self._folder, self._on_hang = limit, rank, folder, on_hang
        self._step = step
        self._last = self._armed = 0.0
        self._left_block, self._is_hung = threading.Event(), False
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._limit:
            self._last = time.monotonic()
            self._arm()
            self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._limit:
            self._left_block.set()
            self._watcher.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self, step: int) -> None:
        """Note that ``step`` is finished. Does not return once the process is taken for hung."""
        if not self._limit:
            return
        if self._is_hung:  # too late: other ranks are ending
            self._watcher.join()
        self._step, self._last = step, time.monotonic()
        if self._last - self._armed > self.patience / 4:  # arming starts a thread, 0.1 ms
            self._arm()

    def _arm(self) -> None:
        """Have faulthandler end the process, between half and 3/4 of the patience from the limit.

        That is after the watcher would have called it off, and before the other ranks end.
        """
        self._armed = time.monotonic()
        seconds = self._limit + 0.75 * self.patience
        faulthandler.dump_traceback_later(seconds, exit=True, file=_LOG)

    def _watch(self) -> None:
        while (left := self._last + self._limit - time.monotonic()) > 0:
            if self._left_block.wait(left):
                return
        self._is_hung = True
        faulthandler.cancel_dump_traceback_later()
        # In another thread, for a disk that hangs must not keep this one from ending the process.
        threading.Thread(target=self._report, name="watchdog report", daemon=True).start()
        time.sleep(self.patience)
        os._exit(HUNG_STATUS)

    def _report(self) -> None:
        step, seconds = self._step, time.monotonic() - self._last
        reason = (
            f"rank {self._rank} on {socket.gethostname()}: no step finished for {seconds:.0f} s, "
            f"the last was {step}"
        )
        own = (self._watcher.ident, threading.get_ident())
        hint = "where steps do take so long, raise watch.hang_seconds"
        text = f"{reason}; {hint}; the stacks of its threads:\n{stacks(without=own)}"
        _write(_LOG, text)  # in one piece, so that those of several ranks do not mix
        try:
            if self._folder is not None:
                _append(self._folder / f"stacks-rank{self._rank}.txt", text)
            if self._on_hang is not None:
                self._on_hang(step, reason)
        except Exception as error:
            _write(_LOG, f"rank {self._rank}: {self._folder}: {reason_of(error)}\n")


def stacks(without: Collection[int | None] = ()) -> str:
    """Return the stacks of all threads but those of these identifiers, most recent call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "".join(
        f"Thread {names.get(ident, ident)} (most recent call last):\n{_stack(frame)}"
        for ident, frame in sys._current_frames().items()
        if ident not in without
    )


def _stack(frame: FrameType) -> str:
    lines = [
        f'  File "{inner.f_code.co_filename}", line {line}, in {inner.f_code.co_name}\n'
        for inner, line in traceback.walk_stack(frame)
    ]
    return "".join(reversed(lines))


def _write(descriptor: int, text: str) -> None:
    with open(descriptor, "wb", closefd=False) as stream:
        stream.write(text.encode(errors="backslashreplace"))


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(text)
