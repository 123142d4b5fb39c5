"""COCO 2017: objects with boxes and masks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError, DataError
from . import Dataset
from .files import check_json_end, check_listed, read_json, stems


class CocoImage(NamedTuple):
    """An image, and its size as its annotations mean it, in pixels."""

    id: int
    path: Path
    height: int
    width: int


class CocoObject(NamedTuple):
    """An annotated object."""

    id: int
    image: CocoImage
    category: int
    """Index in :attr:`CocoObjects.categories`."""
    box: tuple[float, float, float, float]
    """Left, top, width, height, in pixels."""
    area: float
    """Of the mask, in square pixels, as annotated."""
    crowd: bool
    """Whether it stands for several objects that nobody told apart."""
    segmentation: Any
    """Polygons, or a run-length code, as in the file."""

    def mask(self) -> Tensor:
        """Draw the mask, ``[H, W]`` bool, as COCO's own programs do."""
        try:
            from faster_coco_eval.core import mask as masks
        except ImportError as error:
            raise ConfigError(
                "masks of COCO need faster-coco-eval; pip install 'radio-distill[eval]'"
            ) from error
        code = self.segmentation
        if isinstance(code, list):
            code = masks.merge(masks.frPyObjects(code, self.image.height, self.image.width))
        elif isinstance(code["counts"], list):
            code = masks.frPyObjects(code, self.image.height, self.image.width)
        return torch.from_numpy(masks.decode(code)).bool()


class CocoObjects(NamedTuple):
    """The annotations of one file."""

    images: list[CocoImage]
    categories: dict[int, str]
    """Names by the number in the file, in its order; of the 80 the numbers go up to 90."""
    objects: list[CocoObject]


@dataclass(frozen=True)
class Coco(Dataset):
    """COCO 2017 as it is published.

    ``{train,val}2017/NAME.jpg`` and ``annotations/instances_{train,val}2017.json``.
    """

    name: ClassVar[str] = "coco"
    layout: ClassVar[str] = "annotations/, train2017/ and val2017/"
    licence: ClassVar[str] = "annotations CC BY 4.0, images flickr's terms"
    published: ClassVar[Mapping[str, int]] = {"train": 118_287, "val": 5_000, "instances": 36_781}

    def objects(self, split: str) -> CocoObjects:
        """Read the objects of ``train`` or ``val``, crowds too.

        Raises:
            DataError: file or images are missing, or it names what it does not describe.
        """
        path = self._annotations(split)
        data, folder = read_json(path), self.folder(f"{split}2017")
        try:
            images = {
                item["id"]: CocoImage(
                    item["id"], folder / item["file_name"], item["height"], item["width"]
                )
                for item in data["images"]
            }
            categories = {item["id"]: item["name"] for item in data["categories"]}
            index = {number: position for position, number in enumerate(categories)}
            objects = [_object(item, images, index) for item in data["annotations"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is no whole instances file of COCO ({error!r})") from error
        check_listed(path, [image.path.name for image in images.values()], folder)
        return CocoObjects(list(images.values()), categories, objects)

    def count(self, part: str) -> int:
        """Count the images of a split, or the objects of ``val``."""
        if part == "instances":
            return len(self.objects("val").objects)
        # Of train no file is read whole, since that takes half a minute and 3 GB.
        check_json_end(self._annotations(part))
        return len(stems(self.folder(f"{part}2017"), ".jpg"))

    def tested(self) -> list[Path]:
        """List the images of ``val``."""
        folder = self.folder("val2017")
        return [folder / f"{name}.jpg" for name in stems(folder, ".jpg")]

    def _annotations(self, split: str) -> Path:
        return self.folder("annotations") / f"instances_{split}2017.json"


def _object(
    item: Mapping[str, Any], images: Mapping[int, CocoImage], index: Mapping[int, int]
) -> CocoObject:
    left, top, width, height = item["bbox"]
    return CocoObject(
        item["id"],
        images[item["image_id"]],
        index[item["category_id"]],
        (left, top, width, height),
        item["area"],
        bool(item["iscrowd"]),
        item["segmentation"],
    )
