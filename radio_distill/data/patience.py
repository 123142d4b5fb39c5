"""Files that may not answer: paths that block when opened, and reads that never come back.

A network disk can stall in the middle of a read, and nothing in Python ends a system call. So a
read runs in a thread of its own kind, and when it takes too long, that thread is left behind with
all that it holds: its file stays open, for a descriptor that is closed under a read may be given to
another file. A thread that comes back later ends by itself and its file is closed. Such threads are
daemons, which a program does not wait for at its end.
"""

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, TypeVar

from ..errors import DataError

MAX_ABANDONED = 8
"""Reads of one process that may be without an answer at a time."""

Value = TypeVar("Value")


class NoAnswerError(Exception):
    """A call that did not come back in time."""


class DiskStalledError(DataError):
    """A disk that answers no longer."""

    exit_status = 1
    """It may answer again, or on another machine, so that starting again is worth it."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; raises OSError for a pipe, which could block for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("not a regular file")
    return os.fdopen(descriptor, "rb")


class ReadTimeout:
    """Runs calls that may never come back.

    Args:
        seconds: how long each call may take.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._process = os.getpid()
        self._helper: _Helper | None = None
        self._abandoned: list[threading.Thread] = []

    def __reduce__(self) -> tuple[type["ReadTimeout"], tuple[float]]:
        return ReadTimeout, (self._seconds,)

    def __del__(self) -> None:
        if self._helper is not None:
            self._helper.end()

    def run(self, function: Callable[..., Value], *arguments: Any) -> Value:
        """Return what ``function`` returns, or raise what it raises.

        Raises:
            NoAnswerError: it takes too long.
            DiskStalledError: so do others, ``MAX_ABANDONED`` in all.
        """
        if self._process != os.getpid():  # threads do not survive a fork
            self._process, self._helper, self._abandoned = os.getpid(), None, []
        helper, self._helper = self._helper or _Helper(), None
        try:
            value, error = helper.ask(function, arguments, self._seconds)
        except Empty:
            self._abandon(helper)
            raise NoAnswerError(f"no answer within {self._seconds:g} s") from None
        except BaseException:  # Ctrl-C: the answer must not reach the next one who asks
            helper.end()
            raise
        self._helper = helper
        if error is None:
            return value
        try:
            raise error
        finally:
            del error  # it holds this frame, and with it what was to be read

    def _abandon(self, helper: "_Helper") -> None:
        helper.end()
        self._abandoned = [*(one for one in self._abandoned if one.is_alive()), helper.thread]
        if len(self._abandoned) >= MAX_ABANDONED:
            raise DiskStalledError(
                f"the disk does not answer: {len(self._abandoned)} reads have taken more than "
                f"{self._seconds:g} s; fix the disk or raise data.read_timeout, and start again"
            )


class _Helper:
    """A thread that makes one call after the other."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Any] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        # The thread holds the queues and not this object, or neither would ever be freed.
        arguments = self._calls, self._answers
        self.thread = threading.Thread(target=_serve, args=arguments, name="read", daemon=True)
        self.thread.start()

    def ask(self, function: Callable[..., Any], arguments: Any, seconds: float) -> Any:
        """Return (value, error) of a call; raises Empty when it takes too long."""
        self._calls.put((function, arguments))
        return self._answers.get(timeout=seconds)

    def end(self) -> None:
        """Let the thread end as soon as its call comes back."""
        self._calls.put(None)


def _serve(calls: "SimpleQueue[Any]", answers: "SimpleQueue[Any]") -> None:
    while (call := calls.get()) is not None:
        answers.put(_outcome(*call))
        del call  # it would keep a file open until the next one


def _outcome(function: Callable[..., Any], arguments: Any) -> tuple[Any, BaseException | None]:
    try:
        return function(*arguments), None
    except BaseException as error:
        return None, error
