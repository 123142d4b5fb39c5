"""SPair-71k: pairs of images of one class with corresponding keypoints."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ...errors import DataError
from ...types import Size
from . import Dataset
from .files import check_listed, read_json, stems

_NAME = re.compile(r"(?P<number>\d+)-(?P<source>.+)-(?P<target>.+)[:_](?P<category>[a-z]+)")
"""A pair's file; file systems that take no colon have an underscore."""


class Keypoints(NamedTuple):
    """What a pair's file says."""

    source: Tensor
    """``[K, 2]`` x, y in pixels of the source image."""
    target: Tensor
    """``[K, 2]`` x, y of the same points in the target image."""
    source_size: Size
    """Height and width."""
    target_size: Size
    target_box: tuple[float, float, float, float]
    """Left, top, right, bottom of the object."""
    viewpoint: int
    """How much the view differs, 0 to 2."""


@dataclass(frozen=True, slots=True)
class SpairPair:
    """A pair of images; its keypoints are not read yet."""

    key: str
    category: str
    source: Path
    target: Path
    file: Path

    def keypoints(self) -> Keypoints:
        """Read the pair's file; raises DataError where it is damaged."""
        data = read_json(self.file)
        try:
            return Keypoints(
                torch.tensor(data["src_kps"], dtype=torch.float32).reshape(-1, 2),
                torch.tensor(data["trg_kps"], dtype=torch.float32).reshape(-1, 2),
                (data["src_imsize"][1], data["src_imsize"][0]),
                (data["trg_imsize"][1], data["trg_imsize"][0]),
                tuple(data["trg_bndbox"]),
                data["viewpoint_variation"],
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(f"{self.file} is no pair of SPair-71k ({error!r})") from error


@dataclass(frozen=True)
class Spair(Dataset):
    """SPair-71k as it is published: its test pairs.

    ``JPEGImages/CLASS/ID.jpg`` and ``PairAnnotation/test/NUMBER-ID-ID:CLASS.json``.
    """

    name: ClassVar[str] = "spair"
    layout: ClassVar[str] = "JPEGImages/ and PairAnnotation/ (SPair-71k)"
    licence: ClassVar[str] = "research (PASCAL's images)"
    published: ClassVar[Mapping[str, int]] = {"test": 12_234, "images": 1_800}

    def pairs(self) -> list[SpairPair]:
        """List the pairs of the test, sorted by number."""
        folder, images = self.folder("PairAnnotation", "test"), self.folder("JPEGImages")
        pairs = []
        for key in stems(folder, ".json"):
            match = _NAME.fullmatch(key)
            if match is None:
                raise DataError(f"{folder / key}.json is not called NUMBER-ID-ID:CLASS.json")
            source, target = (
                images / match["category"] / f"{match[side]}.jpg" for side in ("source", "target")
            )
            pairs.append(SpairPair(key, match["category"], source, target, folder / f"{key}.json"))
        if not pairs:
            raise DataError(f"no pairs in {folder}; copy the set again")
        for category in sorted({pair.category for pair in pairs}):
            of_class = [pair for pair in pairs if pair.category == category]
            names = {path.stem for pair in of_class for path in (pair.source, pair.target)}
            check_listed(folder, sorted(names), images / category, ".jpg")
        return pairs

    def count(self, part: str) -> int:
        """Count the pairs, or the images."""
        if part == "images":
            folder = self.folder("JPEGImages")
            return sum(len(stems(item, ".jpg")) for item in folder.iterdir() if item.is_dir())
        return len(self.pairs())

    def tested(self) -> list[Path]:
        """List the images of the test pairs, each once."""
        return sorted({path for pair in self.pairs() for path in (pair.source, pair.target)})
