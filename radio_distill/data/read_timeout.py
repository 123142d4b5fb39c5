"""Calls that are left behind when they do not come back in time."""

import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

from ..errors import DataError

Value = TypeVar("Value")

READ_TIMEOUT = 60.0
"""Seconds for one read, where no recipe says otherwise."""
MAX_STALLED = 8
"""Reads of one process that may be without an answer at a time."""


class NoAnswerError(Exception):
    """A call that did not come back in time."""


class DiskStalledError(DataError):
    """A disk that answers no longer."""

    exit_status = 1
    """It may answer again, or on another machine, so that starting again is worth it."""


class ReadTimeout:
    """Runs calls that may never come back, for nothing in Python ends a system call.

    They run in a thread, one after the other. When one takes too long, its thread is left behind
    with all that it holds: its file stays open, for a descriptor that is closed under a read may be
    given to another file. Such threads are daemons, which a program does not wait for at its end.

    Args:
        seconds: how long each call may take.
    """

    def __init__(self, seconds: float):
        self._seconds, self._process = seconds, os.getpid()
        self._helper: _Helper | None = None
        self._stalled: list[threading.Thread] = []

    def __reduce__(self) -> tuple[type["ReadTimeout"], tuple[float]]:
        return ReadTimeout, (self._seconds,)

    def __del__(self) -> None:
        if self._helper is not None:
            self._helper.calls.put(None)

    def run(self, function: Callable[..., Value], *arguments: Any) -> Value:
        """Return what ``function`` returns, or raise what it raises.

        Raises:
            NoAnswerError: it takes too long.
            DiskStalledError: so do others, ``MAX_STALLED`` in all.
        """
        if self._process != os.getpid():  # threads do not survive a fork
            self._process, self._helper, self._stalled = os.getpid(), None, []
        helper, self._helper = self._helper or _start_helper(), None
        helper.calls.put((function, arguments))
        try:
            value, error = helper.answers.get(timeout=self._seconds)
        except BaseException as failure:  # Ctrl-C too: the answer must not reach the next who asks
            helper.calls.put(None)
            if not isinstance(failure, Empty):
                raise
            self._stalled = [*(one for one in self._stalled if one.is_alive()), helper.thread]
            if len(self._stalled) < MAX_STALLED:
                raise NoAnswerError(f"no answer within {self._seconds:g} s") from None
            raise DiskStalledError(
                f"the disk does not answer: {len(self._stalled)} reads have taken more than "
                f"{self._seconds:g} s; fix the disk or raise data.read_timeout, and start again"
            ) from None
        self._helper = helper
        try:
            if error is not None:
                raise error
            return value
        finally:
            del error  # it holds this frame, and with it what was to be read


class _Helper(NamedTuple):
    """A thread that makes one call after the other, until it gets None."""

    calls: "SimpleQueue[Any]"
    answers: "SimpleQueue[Any]"
    thread: threading.Thread


def _start_helper() -> _Helper:
    calls: SimpleQueue[Any] = SimpleQueue()
    answers: SimpleQueue[Any] = SimpleQueue()
    thread = threading.Thread(target=_serve, args=(calls, answers), name="read", daemon=True)
    thread.start()
    return _Helper(calls, answers, thread)


def _serve(calls: "SimpleQueue[Any]", answers: "SimpleQueue[Any]") -> None:
    while (call := calls.get()) is not None:
        answers.put(_outcome(*call))
        del call  # it would keep a file open until the next one


def _outcome(function: Callable[..., Any], arguments: Any) -> tuple[Any, BaseException | None]:
    try:
        return function(*arguments), None
    except BaseException as error:
        return None, error
