"""NAVI: objects photographed from many sides, with depth and the camera's pose."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ...types import Size
from ..masks import class_numbers
from . import Dataset, same_size
from .files import read_json, stems

_SMALL = "downsampled_"
"""Begins the names of the smaller copies that probe3d's script makes."""
_METRES = 655.35
"""Metres times the number in a depth file: it holds inverse depth, 65535 at 1 cm."""


@dataclass(frozen=True, slots=True)
class NaviImage:
    """An image of an object; neither it nor its depth is read yet."""

    key: str
    """OBJECT/SCENE/ID."""
    object: str
    image: Path
    depth: Path
    size: Size
    """Height and width, in pixels, that the focal length is meant for."""
    focal: float
    """Focal length, in pixels of ``size``."""
    quaternion: tuple[float, float, float, float]
    """w, x, y, z of the rotation from the object to the camera."""
    translation: tuple[float, float, float]
    """Of the object in the camera's frame, in metres."""

    def labels(self) -> dict[str, Tensor]:
        """Read ``depth``: ``[H, W]`` float32 in metres, 0 off the object."""
        stored = class_numbers(self.depth).astype(np.float32)
        depth = np.divide(_METRES, stored, out=np.zeros_like(stored), where=stored > 0)
        return same_size(self.image, {"depth": torch.from_numpy(depth)})

    def intrinsics(self, size: Size) -> Tensor:
        """Return the camera matrix ``[3, 3]`` of the whole image at ``size``, in its pixels."""
        height, width = size
        scale_y, scale_x = height / self.size[0], width / self.size[1]
        return torch.tensor(
            [
                [self.focal * scale_x, 0.0, width / 2],
                [0.0, self.focal * scale_y, height / 2],
                [0.0, 0.0, 1.0],
            ]
        )

    def pose(self) -> Tensor:
        """Return the rigid motion ``[4, 4]`` from the object's to the camera's frame, in metres.

        The camera looks along z, with x to the right and y down.
        """
        w, x, y, z = (value / np.linalg.norm(self.quaternion) for value in self.quaternion)
        rows = [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
        bottom = [[0.0, 0.0, 0.0, 1.0]]
        moved = [[*row, shift] for row, shift in zip(rows, self.translation, strict=True)]
        return torch.tensor(moved + bottom, dtype=torch.float32)


@dataclass(frozen=True)
class Navi(Dataset):
    """NAVI, version 1 or 1.5.

    ``OBJECT/{multiview-NN-CAMERA,wild_set}/{images/ID.jpg,depth/ID.png,annotations.json}``; folders
    ``multiview_*`` count too, and smaller copies ``downsampled_ID`` go first.
    """

    name: ClassVar[str] = "navi"
    layout: ClassVar[str] = "one folder an object, each with multiview-*/ and wild_set/"
    licence: ClassVar[str] = "CC BY 4.0"
    published: ClassVar[Mapping[str, int]] = {"multiview": 8_217, "wild": 2_298}

    def split(self, split: str) -> list[NaviImage]:
        """List ``train``, all of multiview, or ``val``, all of wild_set, sorted.

        As in Probe3D, an object that lacks one of the two is left out of both.
        """
        part = {"train": "multiview", "val": "wild"}[split]
        return [
            image
            for scenes in self._objects().values()
            if all(any(kind in name for name in scenes) for kind in self.published)
            for scene, folder in scenes.items()
            if part in scene
            for image in _scene(folder)
        ]

    def count(self, part: str) -> int:
        """Count the images of all objects in multiview or in wild sets."""
        return sum(
            len(list(_scene(folder)))
            for scenes in self._objects().values()
            for scene, folder in scenes.items()
            if part in scene
        )

    def tested(self) -> list[Path]:
        """List the images of ``val``."""
        return [image.image for image in self.split("val")]

    def _objects(self) -> dict[str, dict[str, Path]]:
        """Return the folders of scenes by object and name, sorted."""
        folders = [*self.folder().glob("*/multiview[-_]*"), *self.root.glob("*/wild_set")]
        objects: dict[str, dict[str, Path]] = {}
        for folder in sorted(folders):
            objects.setdefault(folder.parent.name, {})[folder.name] = folder
        if not objects:
            raise DataError(
                f"no OBJECT/multiview-* and no OBJECT/wild_set in {self.root}; name the folder of "
                f"navi that holds {self.layout}"
            )
        return objects


def _scene(folder: Path) -> Iterator[NaviImage]:
    """List the images of a scene, sorted; raises DataError for one that lacks its labels."""
    path = folder / "annotations.json"
    try:
        cameras = {item["filename"].partition(".")[0]: item for item in read_json(path)}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no annotations file of NAVI ({error!r})") from error
    for part in ("images", "depth"):
        if not (folder / part).is_dir():
            raise DataError(f"no folder {folder / part}; copy the set again")
    images, depths = stems(folder / "images", ".jpg"), set(stems(folder / "depth", ".png"))
    small = {name.removeprefix(_SMALL) for name in images if name.startswith(_SMALL)}
    for number in sorted({name.removeprefix(_SMALL) for name in images}):
        stem = f"{_SMALL}{number}" if number in small else number
        if number not in cameras or stem not in depths:
            lacking = folder / "depth" / f"{stem}.png" if number in cameras else f"a line in {path}"
            raise DataError(f"{folder / 'images' / stem}.jpg lacks {lacking}; copy the set again")
        yield _image(folder, number, stem, cameras[number])


def _image(folder: Path, number: str, stem: str, item: Mapping[str, Any]) -> NaviImage:
    try:
        camera = item["camera"]
        height, width = item["image_size"]
        w, x, y, z = camera["q"]
        right, down, away = (value / 1000 for value in camera["t"])
        focal = float(camera["focal_length"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / 'annotations.json'}: {number}: {error!r}") from error
    return NaviImage(
        f"{folder.parent.name}/{folder.name}/{number}",
        folder.parent.name,
        folder / "images" / f"{stem}.jpg",
        folder / "depth" / f"{stem}.png",
        (height, width),
        focal,
        (w, x, y, z),
        (right, down, away),
    )
