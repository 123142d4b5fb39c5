"""Fetches remote shards before they are needed, in the order of the epoch."""

import logging
import threading
import weakref
from collections.abc import Sequence
from typing import BinaryIO

from ..errors import RadioDistillError
from ..system.files import printable, reason_of
from .order import SampleOrder
from .remote import Remote
from .tar_index import Shard

logger = logging.getLogger(__name__)

_THREADS = 4
_MOST_AHEAD = 256  # each holds an open file
_PAUSE = 1.0  # seconds until it is looked again whether there is room, or others have finished


class Ahead:
    """Keeps the shards that are needed next in the cache, as many as its bound lets in.

    What it has fetched it holds open until it is passed, so that no process removes it before.
    Several processes that do this at once share the work: each takes the first shard that no other
    is fetching. What cannot be fetched is left to whoever needs it, and says so.

    Args:
        shards: by number; those on disks are passed over.
        order: which of them are needed when.
    """

    def __init__(self, shards: Sequence[Shard], order: SampleOrder):
        self._shards, self._order = shards, order
        self._wanted: list[int] = []
        self._held: dict[int, BinaryIO] = {}
        self._tried: set[int] = set()  # in the hands of a thread, or not to be had
        self._lock, self._moved = threading.Lock(), threading.Condition()
        self._started = False

    def move(self, position: int) -> None:
        """Say that the images from ``position`` on are needed next."""
        wanted = self._next(position)
        with self._lock:
            self._wanted = wanted
            for number in set(self._held) - set(wanted):
                self._held.pop(number).close()
            self._tried &= set(wanted)
        with self._moved:
            self._moved.notify_all()
        if not self._started:
            self._started = True
            for _ in range(_THREADS):
                threading.Thread(
                    target=_work, args=(weakref.ref(self),), name="ahead", daemon=True
                ).start()

    def _next(self, position: int) -> list[int]:
        """Return remote shards in the order of need, up to the bound of the cache."""
        wanted: dict[int, None] = {}
        room, num_seen, seen = -1, len(self._shards), set()
        for number in self._order.shards_from(position):
            shard = self._shards[number]
            seen.add(number)
            if isinstance(shard.path, Remote) and number not in wanted:
                room = shard.path.cache.max_bytes if room < 0 else room
                room -= shard.size
                if room < 0:
                    break
                wanted[number] = None
            if len(seen) == num_seen or len(wanted) == _MOST_AHEAD:
                break
        return list(wanted)

    def fetch_one(self) -> bool:
        """Fetch the first shard that is wanted and that nobody has or fetches."""
        with self._lock:
            numbers = [n for n in self._wanted if n not in self._held and n not in self._tried]
        for number in numbers:
            with self._lock:
                if number in self._held or number in self._tried or number not in self._wanted:
                    continue
                self._tried.add(number)
            shard, failed, file = self._shards[number], False, None
            try:
                assert isinstance(shard.path, Remote)
                file = shard.path.open_if_free()
            except (OSError, RadioDistillError) as error:
                failed = True
                logger.debug("not ahead: %s: %s", printable(shard.path), reason_of(error))
            with self._lock:
                if not failed:
                    self._tried.discard(number)
                if file is not None and number in self._wanted:
                    self._held[number] = file
                elif file is not None:
                    file.close()
            if file is not None:
                return True
        return False

    def pause(self) -> None:
        """Wait until the position has moved, or a moment."""
        with self._moved:
            self._moved.wait(_PAUSE)


def _work(reference: "weakref.ref[Ahead]") -> None:
    while (ahead := reference()) is not None:
        if not ahead.fetch_one():
            ahead.pause()
        del ahead  # nothing else ends the thread
