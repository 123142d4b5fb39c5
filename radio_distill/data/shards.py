"""Make tar shards from a folder of images.

The shards are plain webdataset: members ``KEY.jpg``, ``KEY.txt``, ``KEY.cls`` side by side. The
bytes of an image stay as they are; nothing is encoded again.
"""

import hashlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..config import DataConfig
from ..errors import ConfigError, DataError
from ..system.files import flush, printable, reason_of
from .bands import decode, suffix_of
from .find import Tree, list_tree
from .images import FIELD_OF_KIND, BadImageError, read_image

_COMPANIONS = ("txt", "cls", "json")  # kept where they lie beside an image under its name
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "dev")
_SHOWN = 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ShardSummary:
    """The result of :func:`write_shards`."""

    shards: tuple[Path, ...]
    num_images: int
    bad: Mapping[str, str]
    """Reason for each image that was left out, by its path within the source."""
    class_names: tuple[str, ...]
    """Names of the classes that the numbers in ``.cls`` stand for; empty without labels."""
    held_out: tuple[Path, ...] = ()
    """Shards of the images that were held out."""
    notes: tuple[str, ...] = ()
    """Further lines for a person."""

    def describe(self) -> list[str]:
        """Return lines for a person: what was made, passed over, and left out."""
        bad = [f"left out {name}: {reason}" for name, reason in islice(self.bad.items(), _SHOWN)]
        made = f"{self.num_images} images in {len(self.shards)} shards: {self.shards[0].parent}"
        return [made, *self.notes, *bad]


def write_shards(
    source: Path,
    out: Path,
    *,
    images_per_shard: int = 1000,
    labels: bool = False,
    limits: DataConfig | None = None,
    hold_out: float = 0.0,
    progress: Progress | None = None,
) -> ShardSummary:
    """Pack the images below ``source`` into shards; equal sources give equal bytes.

    Text beside an image goes with it: files of its name with the suffix ``.txt``, ``.cls`` or
    ``.json`` in place of its own or behind it, in upper or lower case. Captions are written as
    UTF-8. Images that training would not take are left out and listed. The shards appear in
    ``out`` when all of them are written.

    Args:
        labels: write the number of each image's class folder as ``.cls``, and the folder names
            to ``classes.txt``, one a line. The class folders are those of the first level at which
            there are several; images may lie deeper.
        limits: its ``min_size`` and ``max_pixels`` are those of training; by default the defaults.
        hold_out: share of the images, chosen by the hash of their paths, that go to shards of
            their own in ``OUT_held_out``.
        progress: called with images done and images in all.

    Raises:
        DataError: no image, ``out`` holds such shards already, a file cannot be written, or with
            labels a source of several splits or with images outside of class folders.
        ConfigError: ``images_per_shard`` is not positive, or ``hold_out`` no share.
    """
    source, out = Path(source), Path(out)
    if images_per_shard < 1:
        raise ConfigError(f"images_per_shard: {images_per_shard} is not positive")
    if not 0 <= hold_out < 1:
        raise ConfigError(f"hold_out: {hold_out:g} is not a share of 0 to below 1")
    limits = limits or DataConfig(shards=())
    tree = list_tree(source)
    tree.has_arrays = not limits.photographs
    if not tree.images:
        there = tree.describe_rest([])
        only = f": only {there}" if there else ""
        raise DataError(f"no images found in {printable(source)}{only}")
    held = _choose(tree.images, source, hold_out)
    parts = {out: [path for path in tree.images if path not in held]}
    if held:
        parts[held_out_folder(out)] = [path for path in tree.images if path in held]
    for place in parts:
        if list(place.glob("shard-*.tar")):
            raise DataError(
                f"{printable(place)} already holds shard-*.tar; remove them, or name another folder"
            )
    classes = _classes(tree.images, source) if labels else {}
    packer = _Packer(source, tree, classes, limits, progress)
    made: list[tuple[tuple[Path, ...], int]] = []
    for place, paths in parts.items():
        try:
            names = _write(packer, paths, place, images_per_shard)
        except OSError as error:
            reason = reason_of(error)
            raise DataError(f"cannot write shards to {printable(place)}: {reason}") from error
        made.append((tuple(place / name for name in names), packer.num_packed))
    (shards, num_images), (others, num_others) = made[0], made[-1] if held else ((), 0)
    if not shards:
        raise DataError(
            f"no image in {printable(source)} can be used: left out {packer.verdict()}; the "
            f"first: {': '.join(next(iter(packer.bad.items())))}"
        )
    notes = packer.notes()
    if held:
        where = f"{len(others)} shards: {held_out_folder(out)}"
        notes = [f"{num_others} images held out in {where}", *notes]
    return ShardSummary(shards, num_images, packer.bad, packer.class_names, others, tuple(notes))


def held_out_folder(out: Path) -> Path:
    """Return the folder of the images that are held out of the shards in ``out``."""
    return out.with_name(f"{out.name}_held_out")


def _choose(paths: list[Path], source: Path, share: float) -> set[Path]:
    """Choose a share of the images, at least one, by the hash of their paths."""

    def order(path: Path) -> bytes:
        return hashlib.sha256(os.fsencode(path.relative_to(source).as_posix())).digest()

    number = max(1, round(share * len(paths))) if share else 0
    if number >= len(paths):
        raise ConfigError(f"hold_out: {share:g} of {len(paths)} images leaves none to train on")
    return set(sorted(paths, key=order)[:number])


def _classes(paths: list[Path], source: Path) -> dict[Path, str]:
    """Return each image's class: its folder at the first level that has several.

    A single folder is gone into, so that the class is the folder below ``train``, and not what lies
    deeper, such as ``images``.
    """
    root, folders = _first_level(paths, source)
    splits = _splits(folders)
    if len(splits) > 1:
        raise DataError(
            f"{printable(root)} holds the splits {', '.join(splits)}, which are no classes; make "
            f"shards of each: `radio-distill shards {printable(root / splits[0])} OUT --labels`"
        )
    passed = root.relative_to(source).parts
    loose = [image for image in paths if image.parent == root]
    if not loose:
        return {image: image.relative_to(root).parts[0] for image in paths}
    names = [name for name in passed if name.lower() not in _SPLITS]
    if not passed or (folders and not names):
        raise DataError(
            f"{printable(loose[0])} lies in no class folder; move it, or go without labels"
        )
    return dict.fromkeys(paths, names[0] if names else passed[0])  # one class alone


def _first_level(paths: list[Path], source: Path) -> tuple[Path, list[str]]:
    """Go into single folders; return where images or several folders lie, and the folders."""
    root = source
    while True:
        folders = sorted({p.relative_to(root).parts[0] for p in paths if p.parent != root})
        if len(folders) != 1 or any(image.parent == root for image in paths):
            return root, folders
        root /= folders[0]


def _splits(folders: Sequence[str]) -> list[str]:
    return [printable(name) for name in folders if name.lower() in _SPLITS]


class _Packer:
    """Turns image files into webdataset samples, and counts."""

    def __init__(
        self,
        source: Path,
        tree: Tree,
        classes: dict[Path, str],
        limits: DataConfig,
        progress: Progress | None,
    ):
        self._source, self._tree, self._images = source, tree, tree.images
        self._classes, self._limits, self._progress = classes, limits, progress
        self._names = sorted(set(classes.values()))
        self.class_names = tuple(map(printable, self._names))
        self._side_files = _SideFiles(tree, without=("cls",) if classes else ())
        self._num_done = 0
        self.num_packed = 0
        """Samples that the last call of ``samples`` gave."""
        self.bad: dict[str, str] = {}
        self._kinds: Counter[str] = Counter()
        self._class_sizes: Counter[str] = Counter()

    def samples(self, paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
        """Yield a sample of each image that can be used."""
        self.num_packed = 0
        for image in paths:
            try:
                yield self._sample(image)
                self.num_packed += 1
            except BadImageError as error:
                self.bad[printable(image.relative_to(self._source).as_posix())] = str(error)
                self._kinds[error.kind] += 1
            self._num_done += 1
            if self._progress is not None:
                self._progress(self._num_done, len(self._images))

    def notes(self) -> list[str]:
        """Return lines about classes, side files, and what is not in the shards."""
        lines, side_files = [], self._side_files
        root, folders = _first_level(self._images, self._source)
        if len(splits := _splits(folders)) > 1:
            names = " and ".join(splits)
            lines.append(
                f"{names} are packed together; `radio-distill shards {root / splits[0]} OUT` packs "
                "one alone"
            )
        if self._classes:
            lines.append(f"classes: {len(self._names)} ({_listed(self._class_sizes)})")
        if side_files.counts:
            lines.append(f"side files: {_listed(side_files.counts)}")
        if rest := self._tree.describe_rest([*self._images, *side_files.used]):
            lines.append(f"passed over: {rest}")
        if self.bad:
            lines.append(f"left out: {self.verdict()}")
        return lines

    def verdict(self) -> str:
        """Return how many images are left out, of which kinds, and which limits take more."""
        kinds = ", ".join(f"{number} {kind}" for kind, number in self._kinds.most_common())
        limits = " and ".join(
            f"--{field} (now {getattr(self._limits, field.removeprefix('data.'))})"
            for kind, field in FIELD_OF_KIND.items()
            if self._kinds[kind]
        )
        limit = f"; the limit, here and in training, is {limits}" if limits else ""
        return f"{len(self.bad)} of {len(self._images)} images ({kinds}){limit}"

    def _sample(self, image: Path) -> dict[str, Any]:
        data = read_image(image)
        decode(data, self._limits)
        # Keys are ours: numbered, so that they are unique; ASCII without dots, so that every reader
        # splits them alike; with a trace of the old name, so that a person finds the file again.
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", image.stem)[:40]
        sample: dict[str, Any] = {"__key__": f"{self.num_packed:08d}-{stem}"}
        sample[suffix_of(data)] = data
        sample |= self._side_files.of(image)
        if self._classes:
            name = self._classes[image]
            self._class_sizes[printable(name)] += 1
            sample["cls"] = str(self._names.index(name)).encode()
        return sample


class _SideFiles:
    """Captions, labels and the like that lie beside images."""

    def __init__(self, tree: Tree, without: Sequence[str]):
        self._suffixes = [suffix for suffix in _COMPANIONS if suffix not in without]
        self._owners = {
            path.parent / name for path in tree.images for name in (path.stem, path.name)
        }
        self._files: dict[tuple[Path, str], list[Path]] = {}
        for path in tree.files:
            if path.suffix.lower().lstrip(".") in _COMPANIONS and path.is_file():
                self._files.setdefault((path.parent, path.name.lower()), []).append(path)
        self.used: set[Path] = set()
        self.counts: Counter[str] = Counter()

    def of(self, image: Path) -> dict[str, bytes]:
        """Read what lies beside an image, by suffix."""
        by_suffix = {}
        for suffix in self._suffixes:
            path = self._find(image, suffix)
            if path is None:
                continue
            self.used.add(path)
            try:
                data = read_image(path)
            except BadImageError:
                self.counts[f"unreadable .{suffix}"] += 1
                continue
            text = _as_utf8(data) if suffix == "txt" else data
            self.counts[f".{suffix}"] += 1
            self.counts[f"empty .{suffix}"] += not data.strip()
            self.counts[".txt encoded anew as UTF-8"] += text != data
            by_suffix[suffix] = text
        self.counts = +self.counts
        return by_suffix

    def _find(self, image: Path, suffix: str) -> Path | None:
        """Find a file of an image's name; in another case only where no image has that."""
        for name in (f"{image.stem}.{suffix}", f"{image.name}.{suffix}"):
            for path in self._files.get((image.parent, name.lower()), ()):
                stem = path.name[: -len(suffix) - 1]
                if stem in name or path.parent / stem not in self._owners:
                    return path
        return None


def _as_utf8(text: bytes) -> bytes:
    """Return a text as UTF-8 without a mark, whatever it was written in."""
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        return text.decode("utf-16", errors="replace").encode()
    try:
        return text.decode("utf-8-sig").encode()
    except UnicodeDecodeError:
        return text.decode("latin-1").encode()


def _listed(counts: Counter[str]) -> str:
    words = [f"{number} {name}" for name, number in counts.most_common(_SHOWN)]
    return ", ".join(words) + (", …" if len(counts) > _SHOWN else "")


def _write(packer: _Packer, paths: Sequence[Path], out: Path, images_per_shard: int) -> list[str]:
    """Write all shards to a hidden folder, then move them; returns their names."""
    from webdataset import TarWriter

    out.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    samples = packer.samples(paths)
    with tempfile.TemporaryDirectory(dir=out, prefix=".writing-") as folder:
        for first in samples:
            names.append(f"shard-{len(names):06d}.tar")
            path = Path(folder, names[-1])
            with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
                for sample in chain([first], islice(samples, images_per_shard - 1)):
                    writer.write(sample)
            flush(path)
        if packer.class_names and names:
            classes = "".join(f"{name}\n" for name in packer.class_names)
            Path(folder, "classes.txt").write_text(classes, encoding="utf-8")
            os.replace(Path(folder, "classes.txt"), out / "classes.txt")
        for name in names:
            os.replace(Path(folder, name), out / name)
    return names
