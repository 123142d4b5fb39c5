"""Checkpoints that are written while the next steps run.

The state is copied in the training loop, which is short; summing, writing, flushing and reading it
back take long, and happen in a thread. At most one checkpoint is under way: a save that comes
sooner waits, so that memory holds one copy of the state and checkpoints appear in order.
"""

import threading
from collections.abc import Callable
from pathlib import Path


class Saver:
    """Runs one write after the other in a thread of rank 0.

    Attributes:
        newest: the last checkpoint that was written whole.
        error: what went wrong with one; the run must end.
    """

    def __init__(self, newest: Path | None = None):
        self.newest = newest
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self, write: Callable[[], Path]) -> None:
        """Write in the background; call :meth:`wait` first."""
        assert self._thread is None, "one checkpoint at a time"
        # A daemon, for who aborts a run does not wait; in all other ends the lifeline does.
        self._thread = threading.Thread(
            target=self._run, args=(write,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until nothing is under way, or for so many seconds."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = None

    def _run(self, write: Callable[[], Path]) -> None:
        try:
            self.newest = write()
        except Exception as error:  # a thread would lose it
            self.error = error
