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
    ids: tuple[str, ...]
    """Which points of the class they are."""
    source_size: Size
    """Height and width."""
    target_size: Size
    source_box: tuple[float, float, float, float]
    """Left, top, right, bottom of the object."""
    target_box: tuple[float, float, float, float]
    viewpoint: int
    """How much the view differs, 0 to 2."""
    scale: int
    """How much the size differs, 0 to 2."""
    truncation: int
    """0: neither is cut off, 1: the source is, 2: the target is, 3: both are."""
    occlusion: int
    """0 to 3, in the same way."""


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
                tuple(data["kps_ids"]),
                (data["src_imsize"][1], data["src_imsize"][0]),
                (data["trg_imsize"][1], data["trg_imsize"][0]),
                tuple(data["src_bndbox"]),
                tuple(data["trg_bndbox"]),
                data["viewpoint_variation"],
                data["scale_variation"],
                data["truncation"],
                data["occlusion"],
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(f"{self.file} is no pair of SPair-71k ({error!r})") from error


@dataclass(frozen=True)
class Spair(Dataset):
    """SPair-71k as it is published.

    ``JPEGImages/CLASS/ID.jpg`` and ``PairAnnotation/{trn,val,test}/NUMBER-ID-ID:CLASS.json``.
    """

    name: ClassVar[str] = "spair"
    layout: ClassVar[str] = "JPEGImages/ and PairAnnotation/ (SPair-71k)"
    licence: ClassVar[str] = "research (PASCAL's images)"
    published: ClassVar[Mapping[str, int]] = {
        "trn": 53_340, "val": 5_384, "test": 12_234, "images": 1_800
    }  # fmt: skip

    def pairs(self, split: str) -> list[SpairPair]:
        """List the pairs of ``trn``, ``val`` or ``test``, sorted by number."""
        folder, images = self.folder("PairAnnotation", split), self.folder("JPEGImages")
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
        """Count the pairs of a split, or the images."""
        if part == "images":
            folder = self.folder("JPEGImages")
            return sum(len(stems(item, ".jpg")) for item in folder.iterdir() if item.is_dir())
        return len(self.pairs(part))

    def tested(self) -> list[Path]:
        """List the images of the test pairs, each once."""
        pairs = self.pairs("test")
        return sorted({path for pair in pairs for path in (pair.source, pair.target)})
