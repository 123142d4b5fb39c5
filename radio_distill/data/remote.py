"""Shards that lie elsewhere, read through a bounded folder of local copies.

A shard is fetched whole, under a temporary name, and renamed, so that a copy is whole or not there.
The folder, its bound and its locks are those of :mod:`.cache`.

A copy has the version of the shard in its name (a number made of size and ETag), so a shard that
has changed is never mixed up with its copy. Addresses are shown without user, password and query.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar, Union
from urllib.parse import unquote, urlsplit

from ..system.files import open_regular, reason_of, shortened
from ..system.redaction import redact
from .cache import Cache, CacheError, flock, locked_file, make_room, reserve
from .read_timeout import NoAnswerError, ReadTimeout

Value = TypeVar("Value")

PIPE = "pipe:"
PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
}
"""The package that reads the addresses of each scheme, through fsspec."""

_CHUNK = 8 << 20
_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further try
_VERSIONS = ("ETag", "etag", "generation", "lfs", "blob_id", "Last-Modified", "LastModified")
_FINAL = {400, 401, 403, 404, 405, 410}  # answers that another try would get again
_LOGGERS = ("aiobotocore", "botocore", "fsspec", "gcsfs", "httpx", "httpcore", "s3fs", "urllib3")


Place = Union["Remote", Path]
"""Where a shard lies."""


def open_place(place: Place) -> BinaryIO:
    """Open a shard for reading; raises OSError where it cannot be read, or fetched."""
    return place.open() if isinstance(place, Remote) else open_regular(place)


class FetchError(OSError):
    """A shard that could not be fetched; the text says why, not which."""


def shown(url: str) -> str:
    """Return an address without user, password and query; of a command, its first word."""
    if url.startswith(PIPE):
        return PIPE + shortened(next(iter(url.removeprefix(PIPE).split()), ""))
    scheme, is_address, rest = url.partition("://")
    if not is_address:
        return url
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def without_secrets(entry: str) -> str:
    """Return an entry of `data.shards` as it may be shown."""
    is_elsewhere = "://" in entry or PIPE in entry
    return "::".join(map(shown, entry.split("::"))) if is_elsewhere else entry


@dataclass(frozen=True)
class Remote:
    """The address of a shard, or the command that writes it; used where others have a path."""

    url: str = field(repr=False)
    cache: Cache
    size: int = -1
    """In bytes; -1 where it is not known."""
    mtime_ns: int = 0
    """A number made of size and ETag, in place of a time; 0 where there is none."""

    def __str__(self) -> str:
        """Return the address without what may be secret; of a command, its first word."""
        return f"{shown(self.url)} … {self.name}" if self.is_command else shown(self.url)

    @property
    def is_command(self) -> bool:
        """Whether the shard is what a command writes."""
        return self.url.startswith(PIPE)

    @property
    def name(self) -> str:
        """The name of the file, as a local one has it."""
        if not self.is_command:
            return unquote(PurePosixPath(urlsplit(self.url).path).name)
        names = re.findall(r"[\w.+-]+\.tar\b", self.url)
        return str(names[-1]) if names else f"{self.key}.tar"

    @property
    def suffix(self) -> str:
        """The last suffix of the name."""
        return PurePosixPath(self.name).suffix

    @property
    def key(self) -> str:
        """What tells it from others, whoever signed the address."""
        identity = self.url if self.is_command else str(self)
        return hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    @property
    def copy(self) -> Path:
        """The place of its local copy."""
        stem = self.name.removesuffix(".tar").lstrip(".").replace("/", "_")[:100]
        return self.cache.folder / f"{stem}.{self.key}.{self.mtime_ns:x}.tar"

    def look(self) -> "Remote":
        """Return it with its size and version, which the server is asked for.

        Raises:
            FetchError: it is not there, or the server does not answer.
            CacheError: the cache is smaller than the shard.
        """
        if self.is_command:
            return self
        info = self._trying(lambda: _filesystem(self.url).info(self.url))
        size = -1 if info.get("size") is None else int(info["size"])
        version = next((info[name] for name in _VERSIONS if info.get(name)), "")
        digest = hashlib.sha256(f"{size} {version}".encode()).digest()
        found = replace(self, size=size, mtime_ns=int.from_bytes(digest[:7], "big"))
        found.check_bound(size)
        return found

    def check_bound(self, size: int) -> None:
        """Raise CacheError where the cache is smaller than the shard, of ``size`` bytes."""
        if size > self.cache.max_bytes:
            raise CacheError(
                f"data.cache_gb: {self.cache.max_bytes / 1e9:g} GB are less than one shard, {self} "
                f"has {size / 1e9:.3g} GB; give it that of many shards"
            )

    def open(self) -> BinaryIO:
        """Return the local copy, which stays while it is open; fetches it where there is none.

        Raises:
            FetchError: it cannot be fetched, or is not what was looked at.
            CacheError: the cache cannot be written, or is too small.
        """
        file = self._open_copy()
        if file is None:
            with locked_file(self._lock):
                file = self._open_copy() or self._fetch(must=True)
        assert file is not None, "what must be fetched is"
        return file

    def open_if_free(self) -> BinaryIO | None:
        """Do as :meth:`open`; return None where another fetches it, or the cache has no room."""
        file = self._open_copy()
        if file is None:
            with locked_file(self._lock, wait=False) as is_ours:
                return (self._open_copy() or self._fetch(must=False)) if is_ours else None
        return file

    @property
    def _lock(self) -> Path:
        return self.cache.folder / f".lock-{self.key[:2]}"  # 256 in all, for they stay

    def _open_copy(self) -> BinaryIO | None:
        try:
            file = open_regular(self.copy)
        except FileNotFoundError:
            return None
        flock(file, fcntl.LOCK_SH)
        status = os.fstat(file.fileno())
        if status.st_nlink and self.size in (-1, status.st_size):
            os.utime(file.fileno())
            return file
        file.close()
        if status.st_nlink:  # not removed meanwhile, but cut by hand
            self.copy.unlink(missing_ok=True)
        return None

    def _fetch(self, *, must: bool) -> BinaryIO | None:
        """Fetch a copy, by whoever has the lock of the shard; None where it may not and no room."""
        if not self.is_command and self.look().mtime_ns != self.mtime_ns:
            raise FetchError("changed since it was indexed; start again, and it is indexed anew")
        part = self.copy.with_suffix(".part")
        file = reserve(self.cache, part, max(self.size, 0), must)
        if file is None:
            return None
        try:
            self._download(file)
            self.check_bound(os.fstat(file.fileno()).st_size)
            os.replace(part, self.copy)
        except BaseException as error:
            part.unlink(missing_ok=True)
            file.close()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                reason = f"{self.cache.folder} has no space left; lower data.cache_gb"
                raise CacheError(f"data.cache: {reason}") from None
            raise
        flock(file, fcntl.LOCK_SH)  # from now on it is in use like any other
        if self.size < 0:  # only now it is known what had to be made room for
            make_room(self.cache)
        file.seek(0)
        return file

    def _download(self, file: BinaryIO) -> None:
        """Write what comes to a file; a further try goes on behind what has come."""
        done, timeout = 0, ReadTimeout(self.cache.timeout)

        def attempt() -> None:
            nonlocal done
            source = timeout.run(self._source)
            try:
                if done:
                    try:
                        source.seek(done)
                    except (ValueError, OSError):  # a stream, which begins anew
                        done = 0
                file.seek(done)
                while chunk := timeout.run(source.read, _CHUNK):
                    file.write(chunk)
                    done += len(chunk)
            finally:
                source.close()
            if self.size not in (-1, done):
                came, done = done, 0
                raise ConnectionError(f"{came} of {self.size} bytes came")

        self._trying(attempt, within=False)
        file.truncate(done)
        file.flush()

    def _source(self) -> Any:
        if self.is_command:
            return _Command(self.url.removeprefix(PIPE))
        return _filesystem(self.url).open(self.url, "rb", cache_type="none")

    def _trying(self, action: Callable[[], Value], within: bool = True) -> Value:
        """Do something, again and again with pauses where that may help."""
        tries = 0
        while True:
            tries += 1
            try:
                return ReadTimeout(self.cache.timeout).run(action) if within else action()
            except CacheError:
                raise
            except Exception as error:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise
                reason, is_final = _diagnosis(error)
                if is_final or tries > len(_WAITS):
                    times = f", {tries} times" if tries > 1 else ""
                    raise FetchError(f"cannot be fetched: {reason}{times}") from None
                time.sleep(_WAITS[tries - 1])


class _Command:
    """What a command writes, as a file; its words, which may be secret, are in no message."""

    def __init__(self, command: str):
        self._process = subprocess.Popen(
            command, shell=True, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) < size and self._process.wait():
            raise ConnectionError(f"the command ended with status {self._process.returncode}")
        return data

    def seek(self, place: int) -> None:
        raise ValueError(f"a command begins anew, not at byte {place}")

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()  # its pipe is closed with it: a read may still be waiting there


def _filesystem(url: str) -> Any:
    return _filesystem_of(urlsplit(url).scheme, os.getpid())


@cache
def _filesystem_of(scheme: str, process: int) -> Any:
    """Return the file system of a scheme; each process has its own, with its own connections."""
    for name in _LOGGERS:  # they log whole addresses; what matters we say
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        import fsspec

        kind = fsspec.get_filesystem_class(scheme)
    except ImportError:
        raise missing_package(scheme) from None
    return kind(use_listings_cache=False, skip_instance_cache=True)


def missing_package(scheme: str) -> CacheError:
    """Say what reads the addresses of a scheme, and how to get it."""
    return CacheError(
        f"data.shards: {scheme}:// needs {PACKAGES[scheme]}; "
        "run `pip install 'radio-distill[remote]'`"
    )


def matching(url: str, cache: Cache) -> list[Remote]:
    """Return the shards of one address: of a pattern with ``*``, or of a folder, those it names.

    Raises:
        FetchError: the server does not list them.
    """
    remote = Remote(url, cache)
    scheme, _, place = url.partition("://")
    if remote.is_command or ("*" not in place and not place.endswith("/")):
        return [remote]
    if scheme in ("http", "https"):
        return []
    pattern = url + "*.tar" if url.endswith("/") else url
    names = remote._trying(lambda: _filesystem(url).glob(pattern))
    return [Remote(f"{scheme}://{name}", cache) for name in sorted(names) if name.endswith(".tar")]


def _diagnosis(error: BaseException) -> tuple[str, bool]:
    """Return in one line why something failed, and whether it would fail again."""
    errors = list(_chain(error))
    status = next(filter(None, map(_status, errors)), None)
    if status is not None:
        return f"the server says {status}", status in _FINAL
    if any(isinstance(one, PermissionError) or "NoCredentials" in str(type(one)) for one in errors):
        return "access is denied, or there are no credentials", True
    root = errors[-1]
    if isinstance(root, FileNotFoundError):
        return "it is not there", True
    if isinstance(root, NoAnswerError):
        return str(root), False
    text = re.sub(r"\w[\w+.-]*://\S+", "…", reason_of(root))
    return shortened(redact(f"{type(root).__name__}: {text}")), False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _status(error: BaseException) -> int | None:
    """Return the status of an HTTP answer, wherever a library keeps it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(error, "status", None) or getattr(response, "status_code", None)
    return status if isinstance(status, int) else None
