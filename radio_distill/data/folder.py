"""Held-out images for evaluation, in one fixed order, from a folder or from shards.

Nothing is replaced here: a score is only comparable when everyone was asked the same images, so a
bad one stops the evaluation with its name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar, overload

from PIL.Image import Image

from ..errors import DataError
from ..system.files import printable, reason_of, refuse_unreadable
from .find import Tree, find_shards, is_address, is_hidden, list_tree, say_once
from .images import BadImageError, decode_image, read_image
from .remote import without_secrets
from .sources import describe_notes
from .tar_index import open_shards
from .tar_reader import ShardReader
from .tar_scan import describe

T = TypeVar("T")

_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
"""Names of the folders of a split, in lower case."""
_SIDE_FILES = (".txt", ".cls", ".json")  # lie beside images, and are no matter of evaluation


@dataclass(frozen=True)
class ImageRef:
    """An image that is not read yet."""

    key: str
    """Path within the folder, or ``shard:member``."""
    read: Callable[[], bytes]

    def load(self) -> Image:
        """Decode the image to RGB; raises DataError with its key."""
        try:
            return decode_image(self.read())
        except OSError as error:
            raise DataError(f"image {self.key}: {reason_of(error)}") from error
        except BadImageError as error:
            raise DataError(f"image {self.key}: {error}; replace or remove it") from error


class Images(Sequence[tuple[str, Image]]):
    """(key, image) pairs, decoded anew at each access, so that they need no memory."""

    def __init__(self, refs: Sequence[ImageRef]):
        self._refs = refs

    def __len__(self) -> int:
        return len(self._refs)

    @property
    def keys(self) -> list[str]:
        """The keys of all images, which none is read for."""
        return [ref.key for ref in self._refs]

    @overload
    def __getitem__(self, index: int) -> tuple[str, Image]: ...

    @overload
    def __getitem__(self, index: slice) -> "Images": ...

    def __getitem__(self, index: int | slice) -> "tuple[str, Image] | Images":
        if isinstance(index, slice):
            return Images(self._refs[index])
        return self._refs[index].key, self._refs[index].load()


class LabelledImages(NamedTuple):
    """Images of two splits, each with the number of its class."""

    train: list[tuple[Path, int]]
    val: list[tuple[Path, int]]
    class_names: tuple[str, ...]


def load_images(source: str, limit: int | None = None) -> Images:
    """Give access to the images of a folder or of shards; see :func:`list_images`.

    With a ``limit``, that many are taken at even distances, so that no class of a sorted folder is
    left out; 0 or None takes all.
    """
    return Images(spread(list_images(source), limit))


def in_batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Return items in their order, ``size`` at a time, the last perhaps fewer."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """Return at most ``limit`` items at even distances, so that sorted classes all stay present."""
    if not limit or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def list_images(source: str) -> list[ImageRef]:
    """List the images of a folder, sorted, or of shards, in their order.

    ``source`` is a folder of images, or whatever ``data.shards`` takes; a folder with shards in
    it counts as shards.

    Raises:
        DataError: nothing is there, or a shard is damaged.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if is_address(source):
            raise DataError(
                f"{without_secrets(source)} lies elsewhere; these images are read from a disk: "
                "copy them to a folder, and name that"
            )
        if not folder.suffix and not folder.exists() and not set(source) & set("*?[{:|"):
            raise DataError(f"no folder {source}, of images or of shards")
        return _in_shards(source)
    tree = list_tree(folder)
    paths = tree.images
    if any(path.suffix.lower() == ".tar" for path in tree.files):
        if paths:
            say_once(f"{printable(folder)}: {len(paths)} images beside the shards are not used")
        return _in_shards(source)
    tree.say_rest(paths, _side_files(tree))
    if not paths:
        rest = tree.describe_rest([])
        raise DataError(
            f"no images and no shards found in {source}" + (f": only {rest}" if rest else "")
        )
    return [
        ImageRef(printable(path.relative_to(folder).as_posix()), partial(read_image, path))
        for path in paths
    ]


def _side_files(tree: Tree) -> list[Path]:
    return [path for path in tree.files if path.suffix.lower() in _SIDE_FILES]


def _in_shards(source: str) -> list[ImageRef]:
    found = find_shards([source])
    reader = ShardReader(open_shards(found.paths))
    for note in [*found.notes, *describe_notes(reader.shards)]:
        say_once(note)
    refs = []
    for number, shard in enumerate(reader.shards):
        if shard.left_out:
            kinds = describe(shard.left_out)
            raise DataError(f"shard {printable(shard.path)} is not clean: {kinds}; make it anew")
        if not shard.num_samples:
            say_once(f"shard {printable(shard.path)} has no images")
        for index in range(shard.num_samples):
            sample = reader.sample(number, index)
            read = partial(reader.image_bytes, number, sample)
            refs.append(ImageRef(reader.key(number, sample), read))
    if not refs:
        raise DataError(f"no images in the shards of {source}")
    return refs


def labelled_images(folder: str) -> LabelledImages:
    """List ``folder/train/CLASS/*.jpg`` and ``folder/val/CLASS/*.jpg``, sorted.

    A folder that holds exactly one such set, one level down, stands for it. Hidden files and
    folders are passed over, as are class folders without any image, which are counted.

    Raises:
        DataError: another layout, one class only, or images in ``val`` of a class that has none
            in ``train``.
    """
    refuse_unreadable(Path(folder).expanduser(), DataError)
    root = _find_splits(Path(folder).expanduser())
    train, val = (_by_class(split_folder(root, split)) for split in ("train", "val"))
    names = tuple(sorted(name for name, paths in train.items() if paths))
    if unknown := [name for name in val if name not in names and (name not in train or val[name])]:
        raise DataError(
            f"{printable(str(split_folder(root, 'val') / unknown[0]))} has no counterpart with "
            f"images in {printable(str(split_folder(root, 'train')))}, so no answer could be "
            f"right; add the class there, or remove it ({len(unknown)} such classes)"
        )
    if empty := [name for name in train if name not in names]:
        say_once(
            f"{printable(root)}: class folders without images, passed over: {len(empty)} "
            f"(first: {printable(empty[0])})"
        )
    if len(names) == 1:
        raise DataError(f"{root} has images of one class only ({names[0]}); add another")
    return LabelledImages(_numbered(train, names), _numbered(val, names), names)


def split_folder(parent: Path, split: str) -> Path:
    """Return the folder of a split, ``train`` or ``val``, by any of its usual names in any case.

    Raises:
        DataError: there is none, or there are several.
    """
    found = _split_folders(parent, split)
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in found)
    raise DataError(
        f"{parent} holds several folders for one split: {names}; keep one"
        if found
        else f"{parent} has no folder {split} ({' or '.join(_SPLITS[split][1:])} will do)"
    )


def _split_folders(parent: Path, split: str) -> list[Path]:
    return [path for path in _folders(parent) if path.name.lower() in _SPLITS[split]]


def _folders(parent: Path) -> list[Path]:
    shown = (path for path in parent.glob("*") if not is_hidden(path.name))
    return sorted(path for path in shown if path.is_dir())


def _find_splits(folder: Path) -> Path:
    candidates = [folder, *_folders(folder)]
    found = [path for path in candidates if all(_split_folders(path, split) for split in _SPLITS)]
    if found and (found[0] == folder or len(found) == 1):
        return found[0]
    there = ", ".join(path.name for path in sorted(folder.glob("[!.]*"))[:8]) or "nothing"
    raise DataError(
        f"{folder} is no labelled set: expected train/CLASS/*.jpg and val/CLASS/*.jpg in it "
        f"(found: {printable(there)})"
    )


def _by_class(split: Path) -> dict[str, list[Path]]:
    """Return the images of each class folder; what else lies there is counted and said."""
    tree = list_tree(split)
    classes: dict[str, list[Path]] = {path.name: [] for path in _folders(split)}
    loose = [path for path in tree.images if path.parent == split]
    for path in tree.images:
        if path.parent != split:
            classes[path.relative_to(split).parts[0]].append(path)
    if not any(classes.values()):
        raise DataError(f"no images found in the class folders of {split}")
    if loose:
        say_once(
            f"{printable(split)}: images in no class folder, passed over: {len(loose)} "
            f"(first: {printable(loose[0].name)})"
        )
    tree.say_rest(tree.images, _side_files(tree))
    return classes


def _numbered(classes: dict[str, list[Path]], names: tuple[str, ...]) -> list[tuple[Path, int]]:
    return [(path, label) for label, name in enumerate(names) for path in classes.get(name, ())]
