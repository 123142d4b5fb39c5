"""Images with captions, for retrieval: COCO's and Flickr30k's test images of Karpathy's split.

The split lies on disks in three forms: CLIP_benchmark's files (COCO's own JSON for COCO, a list
``NAME.jpg,caption`` for Flickr30k), Karpathy's ``dataset_*.json``, or COCO's captions as they are.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ...errors import DataError
from ...system.files import printable
from . import Dataset
from .files import check_listed, read_json, read_lines


@dataclass(frozen=True, slots=True)
class Captions:
    """Images and their captions, in the order of the file."""

    images: list[Path]
    texts: list[str]
    image_of: list[int]
    """For each text the index of its image."""
    source: str
    """Name of the file that says which images: two splits are two protocols."""


@dataclass(frozen=True)
class _Retrieval(Dataset):
    files: ClassVar[tuple[str, ...]]
    """Where the split may lie, the first that is there counts."""
    folders: ClassVar[tuple[str, ...]]
    """Where the images may lie."""

    def test(self) -> Captions:
        """Read the test images and their captions."""
        self.folder()
        paths = [self.root / name for name in self.files if (self.root / name).is_file()]
        if not paths:
            raise DataError(
                f"no captions of {self.name} in {self.root}: expected {' or '.join(self.files)}"
            )
        folders = [self.root / name for name in self.folders]
        if paths[0].suffix == ".txt":
            return _listed_captions(paths[0], folders)
        if paths[0].name.startswith("dataset_"):
            return _karpathy_captions(paths[0], folders)
        return _coco_captions(paths[0], folders)

    def count(self, part: str) -> int:
        """Count the images or the captions."""
        captions = self.test()
        return len(captions.images if part == "images" else captions.texts)

    def tested(self) -> list[Path]:
        """List the test images."""
        return self.test().images


@dataclass(frozen=True)
class CocoRetrieval(_Retrieval):
    """COCO captions, Karpathy's test split.

    ``val2014/COCO_val2014_*.jpg`` and ``coco_test_karpathy.json`` or ``dataset_coco.json``; or,
    another split, ``val2017/`` and ``annotations/captions_val2017.json``.
    """

    name: ClassVar[str] = "coco_retrieval"
    layout: ClassVar[str] = "val2014/ and coco_test_karpathy.json"
    licence: ClassVar[str] = "annotations CC BY 4.0, images flickr's terms"
    published: ClassVar[Mapping[str, int]] = {"images": 5_000, "captions": 25_010}
    files: ClassVar[tuple[str, ...]] = (
        "coco_test_karpathy.json",
        "dataset_coco.json",
        "annotations/captions_val2014.json",
        "annotations/captions_val2017.json",
    )
    folders: ClassVar[tuple[str, ...]] = ("val2014", "val2017", "images", ".")


@dataclass(frozen=True)
class Flickr30k(_Retrieval):
    """Flickr30k, Karpathy's test split.

    ``NAME.jpg``, here or in ``images/``, and ``flickr30k_test_karpathy.txt`` (a header, then
    ``NAME.jpg,caption``), ``dataset_flickr30k.json``, or ``flickr30k_test_karpathy.json`` in
    COCO's format.
    """

    name: ClassVar[str] = "flickr30k"
    layout: ClassVar[str] = "the images and flickr30k_test_karpathy.txt"
    licence: ClassVar[str] = "non-commercial research (flickr's terms)"
    published: ClassVar[Mapping[str, int]] = {"images": 1_000, "captions": 5_000}
    files: ClassVar[tuple[str, ...]] = (
        "flickr30k_test_karpathy.txt",
        "dataset_flickr30k.json",
        "flickr30k_test_karpathy.json",
    )
    folders: ClassVar[tuple[str, ...]] = (
        ".",
        "images",
        "Images",
        "flickr30k-images",
        "flickr30k_images",
    )


def _coco_captions(path: Path, folders: Sequence[Path]) -> Captions:
    """Read captions in COCO's format; the images are in the first of ``folders`` that has them."""
    data = read_json(path)
    try:
        names = {item["id"]: item["file_name"] for item in data["images"]}
        pairs = [(names[item["image_id"]], item["caption"]) for item in data["annotations"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is no whole captions file of COCO ({error!r})") from error
    return _captions(path, folders, names.values(), pairs)


def _karpathy_captions(path: Path, folders: Sequence[Path]) -> Captions:
    data = read_json(path)
    try:
        items = [item for item in data["images"] if item["split"] == "test"]
        pairs = [(item["filename"], text["raw"]) for item in items for text in item["sentences"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is no whole file of Karpathy's ({error!r})") from error
    return _captions(path, folders, [item["filename"] for item in items], pairs)


def _listed_captions(path: Path, folders: Sequence[Path]) -> Captions:
    """Read a header and lines ``NAME.jpg,caption``; captions have commas too."""
    pairs = []
    for line in read_lines(path)[1:]:
        name, found, text = line.partition(".jpg,")
        if not found:
            raise DataError(f"{path}: no NAME.jpg,caption in {printable(line)[:80]!r}; copy again")
        pairs.append((f"{name}.jpg", text.strip()))
    return _captions(path, folders, dict(pairs), pairs)


def _captions(
    path: Path,
    folders: Sequence[Path],
    names: Iterable[str],
    pairs: Sequence[tuple[str, str]],
) -> Captions:
    """Number the images, and find their folder."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    if silent := numbers.keys() - {name for name, _ in pairs}:
        raise DataError(f"{path}: {len(silent):,} images have no caption; copy it again")
    if not numbers:
        raise DataError(f"{path} names no images; copy it again")
    first = next(iter(numbers))
    folder = next((place for place in folders if (place / first).is_file()), folders[0])
    check_listed(path, list(numbers), folder)
    return Captions(
        [folder / name for name in numbers],
        [text for _, text in pairs],
        [numbers[name] for name, _ in pairs],
        path.name,
    )
