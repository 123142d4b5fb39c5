"""Held-out pictures for evaluation, in one fixed order, from a folder or from shards.

Nothing is replaced here: a score is only comparable when everyone was asked the same pictures, so a
bad one stops the evaluation with its name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, overload

from PIL.Image import Image

from ..errors import DataError
from ..files import reason_of
from .images import BadImageError, decode_image
from .index import open_shards
from .names import printable
from .reader import ShardReader
from .shards import find_pictures, find_shards, read_picture
from .walk import describe


@dataclass(frozen=True)
class PictureRef:
    """A picture that is not read yet."""

    key: str
    """Path within the folder, or ``shard:member``."""
    read: Callable[[], bytes]

    def load(self) -> Image:
        """Decode the picture to RGB; raises DataError with its key."""
        try:
            return decode_image(self.read())
        except OSError as error:
            raise DataError(f"picture {self.key}: {reason_of(error)}") from error
        except BadImageError as error:
            raise DataError(f"picture {self.key}: {error}; replace or remove it") from error


class Pictures(Sequence[tuple[str, Image]]):
    """(key, picture) pairs, decoded anew at each access, so that they need no memory."""

    def __init__(self, refs: Sequence[PictureRef]):
        self._refs = refs

    def __len__(self) -> int:
        return len(self._refs)

    @overload
    def __getitem__(self, index: int) -> tuple[str, Image]: ...

    @overload
    def __getitem__(self, index: slice) -> "Pictures": ...

    def __getitem__(self, index: int | slice) -> "tuple[str, Image] | Pictures":
        if isinstance(index, slice):
            return Pictures(self._refs[index])
        return self._refs[index].key, self._refs[index].load()


class LabelledPictures(NamedTuple):
    """Pictures of two splits, each with the number of its class."""

    train: list[tuple[Path, int]]
    val: list[tuple[Path, int]]
    class_names: tuple[str, ...]


def load_pictures(source: str, limit: int | None = None) -> Pictures:
    """Give access to the pictures of a folder or of shards; see :func:`list_pictures`.

    With a ``limit``, that many are taken at even distances, so that no class of a sorted folder is
    left out; 0 or None takes all.
    """
    refs = list_pictures(source)
    if limit and limit < len(refs):
        refs = [refs[index * len(refs) // limit] for index in range(limit)]
    return Pictures(refs)


def list_pictures(source: str) -> list[PictureRef]:
    """List the pictures of a folder, sorted, or of shards, in their order.

    ``source`` is a folder of pictures, or whatever ``data.shards`` takes; a folder with shards in
    it counts as shards.

    Raises:
        DataError: nothing is there, or a shard is damaged.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir() or any(folder.rglob("*.tar")):
        return _in_shards(source)
    refs = [
        PictureRef(printable(path.relative_to(folder).as_posix()), partial(read_picture, path))
        for path in find_pictures(folder)
    ]
    if not refs:
        raise DataError(f"no pictures and no shards found in {source}")
    return refs


def _in_shards(source: str) -> list[PictureRef]:
    reader = ShardReader(open_shards(find_shards([source])))
    refs = []
    for number, shard in enumerate(reader.shards):
        if shard.left_out:
            kinds = describe(shard.left_out)
            raise DataError(f"shard {printable(shard.path)} is not clean: {kinds}; make it anew")
        for index in range(shard.num_samples):
            sample = reader.sample(number, index)
            read = partial(reader.image_bytes, number, sample)
            refs.append(PictureRef(reader.key(number, sample), read))
    return refs


def labelled_pictures(folder: str) -> LabelledPictures:
    """List ``folder/train/CLASS/*.jpg`` and ``folder/val/CLASS/*.jpg``, sorted.

    A folder that holds exactly one such set, one level down, stands for it.

    Raises:
        DataError: another layout, or a class of ``val`` that ``train`` lacks.
    """
    root = _find_splits(Path(folder).expanduser())
    names = tuple(sorted(path.name for path in (root / "train").iterdir() if path.is_dir()))
    for path in sorted((root / "val").iterdir()):
        if path.is_dir() and path.name not in names:
            raise DataError(f"{path} has no counterpart in {root / 'train'}")
    train, val = (_in_classes(root / split, names) for split in ("train", "val"))
    return LabelledPictures(train, val, names)


def _find_splits(folder: Path) -> Path:
    candidates = [folder, *sorted(folder.glob("*/"))]
    found = [path for path in candidates if (path / "train").is_dir() and (path / "val").is_dir()]
    if found and (found[0] == folder or len(found) == 1):
        return found[0]
    raise DataError(
        f"{folder} is no labelled set: expected train/CLASS/*.jpg and val/CLASS/*.jpg in it"
    )


def _in_classes(folder: Path, names: tuple[str, ...]) -> list[tuple[Path, int]]:
    pictures = [
        (path, label) for label, name in enumerate(names) for path in find_pictures(folder / name)
    ]
    if not pictures:
        raise DataError(f"no pictures found in the class folders of {folder}")
    return pictures
