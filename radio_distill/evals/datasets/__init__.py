"""Published data sets by name, read as they lie on their users' disks. Nothing is downloaded.

``DATASETS.get("ade20k")(path)`` is a :class:`Dataset`: :meth:`Dataset.check` counts what is there,
and accessors of its own give benchmarks images and labels. One file reads one layout;
docs/evaluation.md has the table of layouts, counts and licences.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from ...data.folder import spread
from ...errors import DataError
from ...registry import Registry
from ...system.files import printable
from ..masks import shape_of

DATASETS = Registry(
    "dataset",
    {
        "ade20k": "radio_distill.evals.datasets.ade20k:Ade20k",
        "coco": "radio_distill.evals.datasets.coco:Coco",
        "coco_retrieval": "radio_distill.evals.datasets.captions:CocoRetrieval",
        "flickr30k": "radio_distill.evals.datasets.captions:Flickr30k",
        "imagenet": "radio_distill.evals.datasets.imagenet:ImageNet",
        "navi": "radio_distill.evals.datasets.navi:Navi",
        "nyu_depth": "radio_distill.evals.datasets.nyu_depth:NyuDepth",
        "nyud": "radio_distill.evals.datasets.nyud:Nyud",
        "pascal_context": "radio_distill.evals.datasets.pascal_context:PascalContext",
        "redwood": "radio_distill.evals.datasets.redwood:Redwood",
        "spair": "radio_distill.evals.datasets.spair:Spair",
        "voc": "radio_distill.evals.datasets.voc:Voc",
    },
)


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image with dense labels; neither is read yet."""

    key: str
    """Its name within the set."""
    image: Path
    read: Callable[[], dict[str, Tensor]]

    def labels(self) -> dict[str, Tensor]:
        """Read the labels, each at the image's own height and width.

        * ``segmentation``, ``parts``, ``saliency``: int64 ``[H, W]``, class or IGNORED;
        * ``depth``: float32 ``[H, W]`` metres, 0 where unknown;
        * ``normals``: float32 ``[3, H, W]``, unit vectors, 0 where unknown.

        Raises:
            DataError: a file is damaged, or labels are not of the image's size.
        """
        return same_size(self.image, self.read())


def same_size(image: Path, labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the labels; raises DataError where one is not of the size that the image has."""
    width, height = shape_of(image).upright
    for kind, values in labels.items():
        if values.shape[-2:] != (height, width):
            size = "x".join(map(str, reversed(values.shape[-2:])))
            raise DataError(
                f"{printable(image)} is {width}x{height} px, its {kind} {size}; take both from one "
                "copy of the set"
            )
    return labels


@dataclass(frozen=True, slots=True)
class Contents:
    """What was found in a data set's folder."""

    counts: Mapping[str, int]
    """Items of each part that could be read: ``{"train": 20210, "val": 2000}``."""
    published: Mapping[str, int]
    """Items that the whole set has."""
    problems: Mapping[str, str]
    """What is wrong with each part that could not be read, in one line."""

    @property
    def missing(self) -> list[str]:
        """Parts that are not whole, each in one line; empty for a whole set."""
        lines = list(self.problems.values())
        for part, whole in self.published.items():
            if part not in self.problems and self.counts[part] < whole:
                lines.append(f"{part}: {self.counts[part]:,} of {whole:,}")
        return lines


@dataclass(frozen=True)
class Dataset(ABC):
    """A published data set in a folder; see its class for the layout."""

    root: Path

    name: ClassVar[str]
    layout: ClassVar[str]
    """What lies in its folder, as a message says it: ``images/ and annotations/``."""
    licence: ClassVar[str]
    published: ClassVar[Mapping[str, int]]
    """Items of each part of the whole set."""

    def __post_init__(self) -> None:
        """Take a path as a recipe writes it."""
        object.__setattr__(self, "root", Path(self.root).expanduser())

    @abstractmethod
    def count(self, part: str) -> int:
        """Count the items of a part, one of ``published``; raises DataError in one line."""

    @abstractmethod
    def tested(self) -> list[Path]:
        """List the images that scores are of; raises DataError in one line."""

    def check(self) -> Contents:
        """Count every part, and say what is wrong with those that cannot be read.

        Raises:
            DataError: no part can be read: the folder is another.
        """
        counts: dict[str, int] = {}
        errors: dict[str, DataError] = {}
        for part in self.published:
            try:
                counts[part] = self.count(part)
            except DataError as error:
                errors[part] = error
        if not any(counts.values()) and errors:
            raise next(iter(errors.values()))
        problems = {part: f"{part}: {error}" for part, error in errors.items()}
        return Contents(counts, self.published, problems)

    def folder(self, *path: str) -> Path:
        """Return a folder of the set; raises DataError with what is there in its place."""
        folder = self.root.joinpath(*path)
        if folder.is_dir():
            return folder
        last = next((parent for parent in folder.parents if parent.is_dir()), Path("/"))
        there = ", ".join(sorted(item.name for item in last.glob("[!.]*"))[:8]) or "nothing"
        raise DataError(
            f"no folder {folder} ({last} holds {printable(there)}); name the folder of {self.name} "
            f"that holds {self.layout}"
        )


@dataclass(frozen=True)
class LabelledDataset(Dataset):
    """A data set of images with dense labels, in splits."""

    @abstractmethod
    def split(self, split: str) -> list[LabelledImage]:
        """List the images of ``train`` or ``val``; raises DataError in one line."""

    def count(self, part: str) -> int:
        """Count the images of a split, and read the labels of a few."""
        items = self.split(part)
        for item in spread(items, 4):
            item.labels()
        return len(items)

    def tested(self) -> list[Path]:
        """List the images of ``val``."""
        return [item.image for item in self.split("val")]
