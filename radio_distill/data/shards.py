"""Find tar shards, and make them from a folder of pictures.

The shards are plain webdataset: members ``KEY.jpg``, ``KEY.txt``, ``KEY.cls`` side by side. The
bytes of a picture stay as they are; nothing is encoded again.
"""

import glob
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..files import flush, reason_of
from .images import IMAGE_SUFFIXES, BadImageError, decode_image, image_suffix
from .names import printable
from .patience import open_regular
from .walk import MAX_MEMBER_BYTES

logger = logging.getLogger(__name__)

_COMPANIONS = ("txt", "cls", "json")  # kept where they lie beside a picture under its name


@dataclass(frozen=True)
class ShardSummary:
    """What :func:`write_shards` made."""

    shards: tuple[Path, ...]
    num_images: int
    bad: dict[str, str]
    """Reason for each picture that was left out, by its path within the source."""
    class_names: tuple[str, ...]
    """What the numbers in ``.cls`` stand for; empty without labels."""


def find_shards(patterns: Sequence[str]) -> list[Path]:
    """List the shards that files, folders (searched for ``*.tar``) and patterns with ``*`` name.

    Each shard comes once, in the order of the patterns, sorted within each.

    Raises:
        DataError: a pattern names no shard.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        paths = _matches(os.path.expanduser(pattern))
        if not paths:
            raise DataError(
                f"no shards found for {pattern!r}; make them with `radio-distill shards SRC OUT`"
            )
        for path in paths:
            found.setdefault(os.path.abspath(path), path)
    return list(found.values())


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        return sorted(path.rglob("*.tar"))
    if path.is_file():
        return [path]
    return sorted(
        item for match in glob.glob(pattern, recursive=True) if (item := Path(match)).is_file()
    )


def find_pictures(folder: Path) -> list[Path]:
    """List the picture files below a folder, sorted; hidden files and folders are passed over."""
    suffixes = {f".{suffix}" for suffix in IMAGE_SUFFIXES}
    pictures = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        pictures += [
            Path(parent, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes
        ]
    return sorted(pictures)


def read_picture(path: Path) -> bytes:
    """Read a file of a folder; raises BadImageError where it is too large, or no file at all."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_MEMBER_BYTES + 1)
    except OSError as error:
        raise BadImageError("unreadable", reason_of(error)) from error
    if len(data) > MAX_MEMBER_BYTES:
        raise BadImageError("too_large", f"more than {MAX_MEMBER_BYTES} bytes")
    return data


def write_shards(
    source: Path,
    out: Path,
    *,
    images_per_shard: int = 1000,
    prefix: str = "shard",
    labels: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ShardSummary:
    """Pack the pictures below ``source`` into shards; equal sources give equal bytes.

    Files ``NAME.txt``, ``NAME.cls`` and ``NAME.json`` beside a picture go with it. Pictures that
    cannot be decoded are left out, logged and listed. The shards appear in ``out`` when all of them
    are written.

    Args:
        labels: write the number of each picture's parent folder as ``.cls``, and the folder names
            to ``classes.txt``, one a line.
        progress: called with pictures done and pictures in all.

    Raises:
        DataError: no picture, ``out`` holds such shards already, or a file cannot be written.
        ConfigError: ``images_per_shard`` is not positive.
    """
    source, out = Path(source), Path(out)
    if images_per_shard < 1:
        raise ConfigError(f"images_per_shard: {images_per_shard} is not positive")
    pictures = find_pictures(source)
    if not pictures:
        raise DataError(f"no pictures found in {source} (known: {', '.join(IMAGE_SUFFIXES)})")
    if list(out.glob(f"{prefix}-*.tar")):
        raise DataError(f"{out} already holds {prefix}-*.tar; remove them or choose another folder")
    packer = _Packer(source, pictures, labels, progress)
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = _write(packer.samples(), out, images_per_shard, prefix, packer.class_names)
    except OSError as error:
        raise DataError(f"cannot write shards to {out}: {reason_of(error)}") from error
    if not names:
        raise DataError(f"none of the {len(pictures)} pictures in {source} can be decoded")
    return ShardSummary(
        tuple(out / name for name in names), packer.num_packed, packer.bad, packer.class_names
    )


class _Packer:
    """Turns picture files into webdataset samples, and counts."""

    def __init__(
        self,
        source: Path,
        pictures: list[Path],
        labels: bool,
        progress: Callable[[int, int], None] | None,
    ):
        self._source, self._pictures, self._progress = source, pictures, progress
        self.num_packed = 0
        self.bad: dict[str, str] = {}
        self._classes: list[str] = []
        self.class_names: tuple[str, ...] = ()
        if labels:
            if loose := [picture for picture in pictures if picture.parent == source]:
                raise DataError(
                    f"{printable(loose[0])} lies in no class folder; move it, or go without labels"
                )
            self._classes = sorted({picture.parent.name for picture in pictures})
            self.class_names = tuple(map(printable, self._classes))

    def samples(self) -> Iterator[dict[str, Any]]:
        for done, picture in enumerate(self._pictures, 1):
            try:
                yield self._sample(picture)
                self.num_packed += 1
            except BadImageError as error:
                name = printable(picture.relative_to(self._source).as_posix())
                logger.warning("left out %s: %s", name, error)
                self.bad[name] = str(error)
            if self._progress is not None:
                self._progress(done, len(self._pictures))

    def _sample(self, picture: Path) -> dict[str, Any]:
        data = read_picture(picture)
        decode_image(data)
        # Keys are ours: numbered, so that they are unique; ASCII without dots, so that every reader
        # splits them alike; with a trace of the old name, so that a person finds the file again.
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", picture.stem)[:40]
        sample: dict[str, Any] = {"__key__": f"{self.num_packed:08d}-{stem}"}
        sample[image_suffix(data)] = data
        for suffix in _COMPANIONS:
            companion = picture.with_suffix(f".{suffix}")
            if companion.is_file():
                sample[suffix] = read_picture(companion)
        if self._classes:
            sample["cls"] = str(self._classes.index(picture.parent.name)).encode()
        return sample


def _write(
    samples: Iterator[dict[str, Any]],
    out: Path,
    images_per_shard: int,
    prefix: str,
    class_names: Sequence[str],
) -> list[str]:
    """Write all shards to a hidden folder, then move them; returns their names."""
    names: list[str] = []
    with tempfile.TemporaryDirectory(dir=out, prefix=".writing-") as folder:
        for first in samples:
            names.append(f"{prefix}-{len(names):06d}.tar")
            chunk = chain([first], islice(samples, images_per_shard - 1))
            _write_shard(Path(folder, names[-1]), chunk)
        if class_names and names:
            Path(folder, "classes.txt").write_text("\n".join(class_names) + "\n", encoding="utf-8")
            os.replace(Path(folder, "classes.txt"), out / "classes.txt")
        for name in names:
            os.replace(Path(folder, name), out / name)
    return names


def _write_shard(path: Path, samples: Iterator[dict[str, Any]]) -> None:
    from webdataset import TarWriter

    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for sample in samples:
            writer.write(sample)
    flush(path)
