"""The sha256 of a teacher's tensors, kept beside its file so that a start need not compute it.

A note ``.NAME.DIGEST.fingerprint`` lies in the folder of the weights; DIGEST stands for what the
tensors depend on beside the file: the preset and the versions of the libraries. It counts only as
long as every file has the path, size, inode and times that it says. The time of change of an inode
(ctime) is among them, which no program can set, so a file that was replaced by one of equal size
and equal mtime is hashed again. Where the folder cannot be written, every start hashes.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from radio_distill.errors import ConfigError
from radio_distill.system.files import write_text

from .presets import Preset

logger = logging.getLogger(__name__)

SETTLED = 10.0
"""Seconds since a file's last change from which on its times tell a further one."""
_LIBRARIES = ("torch", "timm", "open_clip_torch", "transformers")


class FingerprintNote:
    """The note beside some files of weights; make it before they are read.

    Args:
        preset: what the files are read as.
        files: all that are read; the note lies beside the first.
    """

    def __init__(self, preset: Preset, files: Sequence[Path]):
        versions = {name: _version(name) for name in _LIBRARIES}
        digest = sha256(json.dumps([repr(preset), versions]).encode()).hexdigest()
        self.path = files[0].parent / f".{files[0].name}.{digest[:12]}.fingerprint"
        self._files = files
        self._started = time.time()
        self._state = _state(files)

    def fingerprint(self, compute: Callable[[], str]) -> str:
        """Return what is noted, else what ``compute`` hashes of the tensors, which is then noted.

        Files that changed since the note was made are neither believed nor noted.
        """
        is_same = _state(self._files) == self._state
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            if is_same and kept["files"] == self._state and len(kept["fingerprint"]) == 64:
                return str(kept["fingerprint"])
        fingerprint = compute()
        # A change within one tick of the file system's clock would leave the times as they are.
        changed = max(
            time_ns for *_, modified, inode in self._state for time_ns in (modified, inode)
        )
        if _state(self._files) == self._state and self._started - changed / 1e9 > SETTLED:
            try:
                text = json.dumps({"fingerprint": fingerprint, "files": self._state})
                write_text(self.path, text)
            except ConfigError as error:
                logger.info("the fingerprint is computed at every start: %s", error)
        return fingerprint


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def _state(files: Sequence[Path]) -> list[list[Any]]:
    """Return what tells a change of files without reading them, as JSON has it."""
    states = [(str(path.resolve()), path.stat()) for path in files]
    return [
        [path, state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns]
        for path, state in states
    ]
