"""Segmentation sets in a folder: which images, which masks, which numbers in them are classes.

::

    SET/images/train/NAME.jpg   SET/images/val/…
    SET/masks/train/NAME.png    SET/masks/val/…

A mask is a PNG of one channel, grey or palette, whose pixels are class numbers; it covers its image
pixel by pixel, both as their EXIF orientation says they are shown. What a set means by its numbers
nobody can read off it: 255 is nothing in VOC and Cityscapes, 0 is a class there and nothing in
ADE20K. So masks that show the largest number of their type are refused until somebody says.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..data.find import list_tree, say_once
from ..data.folder import split_folder, spread
from ..data.images import BadImageError, Shape, image_shape, upright
from ..errors import DataError
from ..system.files import open_regular, printable, reason_of
from .metrics import IGNORED

logger = logging.getLogger(__name__)

FIELD = "evaluation.segmentation_ignore"

Ignore = int | tuple[int, ...] | Literal["unset"]
"""Which numbers of a mask are no class; ``unset``: 0, and 255 must not occur."""

_SCALED_GREY = {2: 85, 4: 17}
"""Bits of a grey pixel, and the factor by which Pillow brings such pixels to 8 bits."""
_BIT_DEPTH = 24  # position of the byte in a PNG file


class Pair(NamedTuple):
    """An image and its mask."""

    image: Path
    mask: Path


@dataclass(frozen=True, slots=True)
class SegmentationSet:
    """Images and masks of two splits, checked, and the classes of the training masks."""

    train: list[Pair]
    val: list[Pair]
    classes: np.ndarray
    """``[K]``, class numbers, sorted."""
    ignore: tuple[int, ...]

    def mask(self, pair: Pair, size: int) -> Tensor:
        """Return the mask of a pair as :func:`read_mask` does."""
        return read_mask(pair.mask, size, self.classes)


def open_set(folder: str, limit: int | None = None, ignore: Ignore = "unset") -> SegmentationSet:
    """List a segmentation set and read every mask once, so that nothing stops in the middle.

    Args:
        folder: see the module's text.
        limit: most images of each split, taken at even distances.
        ignore: numbers that are no class.

    Raises:
        DataError: another layout, an image and a mask of different size, a mask that is none,
            numbers that nobody explained, or fewer than two classes.
    """
    train, val = (spread(find_pairs(folder, split), limit) for split in ("train", "val"))
    check_sizes(train + val)
    classes = labelled_classes([pair.mask for pair in train], ignore)
    ignored = ignored_numbers(ignore)
    if len(classes) == 1:
        raise DataError(
            f"evaluation.segmentation: the training masks show one class only, {classes[0]}, "
            f"beside what is ignored ({listed(ignored)}), and of one class every prediction is "
            f"right; if 0 is a class, set --{FIELD} '[]'"
            + (", or raise --evaluation.limit" if limit else "")
        )
    data = SegmentationSet(train, val, classes, ignored)
    _log_contents(data, _pixels([pair.mask for pair in val], ignore))
    return data


def _log_contents(data: SegmentationSet, shown: "Counter[int]") -> None:
    """Log how many images and classes a set has; ``shown`` counts the validation pixels."""
    total = sum(shown.values())
    logger.info(
        "segmentation: %d training and %d validation images, %d classes; ignored: %s (%.1f%% of "
        "the validation pixels)",
        len(data.train), len(data.val), len(data.classes), listed(data.ignore),
        100 * sum(shown[number] for number in data.ignore) / total,
    )  # fmt: skip
    unknown = sorted(set(shown) - set(data.classes.tolist()) - set(data.ignore))
    if unknown:
        logger.warning(
            "segmentation: %.1f%% of the validation pixels show %d classes that no training mask "
            "shows (%s), and are passed over",
            100 * sum(shown[number] for number in unknown) / total, len(unknown), listed(unknown),
        )  # fmt: skip


def listed(numbers: Sequence[int], most: int = 8) -> str:
    """Write numbers for people, the first few of many."""
    shown = ", ".join(map(str, numbers[:most])) + (", …" if len(numbers) > most else "")
    return shown or "nothing"


def find_pairs(folder: str, split: str) -> list[Pair]:
    """List the images of a split that have a mask, sorted by name, and count what has no partner.

    Hidden files and files of other kinds are passed over. A mask has its image's path, with .png.

    Raises:
        DataError: another layout, or no image has a mask.
    """
    root = Path(folder).expanduser()
    images, masks = _named(root, "images", split), _named(root, "masks", split)
    pairs = [Pair(image, masks[name]) for name, image in images.items() if name in masks]
    alone = [image for name, image in images.items() if name not in masks]
    left = [mask for name, mask in masks.items() if name not in images]
    if not pairs:
        raise DataError(
            f"evaluation.segmentation: no mask in {root / 'masks'} is called as an image of "
            f"{split} in {root / 'images'} is: NAME.jpg has its mask in NAME.png "
            f"(first image: {printable(alone[0])}; first mask: {printable(left[0])})"
        )
    for what, lack, paths in (("images", "mask", alone), ("masks", "image", left)):
        if paths:
            say_once(
                f"segmentation: {len(paths)} {what} of {split} without {lack}, passed over (first: "
                f"{printable(paths[0])})"
            )
    return pairs


def _named(root: Path, kind: str, split: str) -> dict[Path, Path]:
    """Return the images or masks of a split by their path within it, without suffix."""
    if not (root / kind).is_dir():
        there = ", ".join(sorted(path.name for path in root.glob("[!.]*"))[:8]) or "nothing"
        raise DataError(
            f"evaluation.segmentation: no folder {root / kind}: expected images/train, images/val, "
            f"masks/train and masks/val in {root} (found: {printable(there)}); move or link yours"
        )
    parent = split_folder(root / kind, split)
    tree = list_tree(parent)
    paths = [path for path in tree.images if kind == "images" or path.suffix.lower() == ".png"]
    if not paths:
        raise DataError(
            f"evaluation.segmentation: no {'.png' if kind == 'masks' else 'images'} in {parent}"
        )
    tree.say_rest(paths, what=kind)
    named: dict[Path, Path] = {}
    for path in paths:
        name = path.relative_to(parent).with_suffix("")
        if name in named:
            raise DataError(
                f"evaluation.segmentation: {printable(named[name])} and {printable(path)} differ "
                "in their suffix only, and so have one partner; keep one"
            )
        named[name] = path
    return named


def check_sizes(pairs: Sequence[Pair]) -> None:
    """Compare every image's size with its mask's, both upright as EXIF says, by their headers.

    Raises:
        DataError: they differ, with the pair and the likely reason; or a file is no image.
    """
    shapes = [(pair, shape_of(pair.image), shape_of(pair.mask)) for pair in pairs]
    wrong = [row for row in shapes if row[1].upright != row[2].upright]
    if wrong:
        more = f" ({len(wrong) - 1} more pairs differ)" if len(wrong) > 1 else ""
        raise DataError(f"evaluation.segmentation: {_difference(*wrong[0])}{more}")
    # An orientation of the image alone that leaves its size as it was cannot be told by sizes.
    doubtful = [
        pair
        for pair, image, mask in shapes
        if image.orientation != 1 and mask.orientation == 1 and image.upright == image.stored
    ]
    if doubtful:
        say_once(
            f"segmentation: {len(doubtful)} images are turned or mirrored by EXIF, their masks are "
            "not, and sizes do not tell whether these were made for the upright image, as they "
            f"must be (first: {printable(doubtful[0].image)})"
        )


def shape_of(path: Path) -> Shape:
    """Read the size of an image out of its header; raises DataError with its name."""
    try:
        with open_regular(path) as file:
            return image_shape(file)
    except OSError as error:
        raise DataError(f"{printable(path)}: {reason_of(error)}") from error
    except BadImageError as error:
        raise DataError(f"{printable(path)}: {error}; replace or remove it") from error


def _difference(pair: Pair, image: Shape, mask: Shape) -> str:
    said = (
        f"{printable(pair.image)} is {_size(image)}, its mask {printable(pair.mask)} {_size(mask)}"
    )
    if image.turned != mask.turned and image.stored == mask.stored:
        turned, other = ("image", "mask") if image.turned else ("mask", "image")
        path = pair.image if image.turned else pair.mask
        return (
            f"{said}: EXIF turns the {turned} and not the {other}; if the two fit as they are "
            f"stored, take the tag out of the {turned} (exiftool -Orientation= {printable(path)}), "
            f"else turn the {other}"
        )
    return f"{said}; a mask covers its image pixel by pixel: scale it, with nearest neighbours"


def _size(shape: Shape) -> str:
    width, height = shape.upright
    stored = f" (upright; stored as {shape.stored[0]}x{shape.stored[1]})" if shape.turned else ""
    return f"{width}x{height} px{stored}"


def ignored_numbers(ignore: Ignore) -> tuple[int, ...]:
    """Return the numbers that are no class; 0 where nobody said."""
    if ignore == "unset":
        return (0,)
    return (ignore,) if isinstance(ignore, int) else tuple(ignore)


def labelled_classes(paths: Sequence[Path], ignore: Ignore = "unset") -> np.ndarray:
    """List the class numbers that masks show, sorted, without the ignored; ``[K]``.

    Raises:
        DataError: no class, a mask that is none, or numbers that nobody explained.
    """
    ignored = ignored_numbers(ignore)
    numbers = sorted(set(_pixels(paths, ignore)) - set(ignored))
    if not numbers:
        raise DataError(
            "evaluation.segmentation: the training masks label nothing, every pixel is ignored "
            f"({listed(ignored)}); see {FIELD}"
        )
    return np.array(numbers)


def _pixels(paths: Sequence[Path], ignore: Ignore) -> "Counter[int]":
    """Count the pixels of each number; raises DataError for numbers that nobody explained."""
    shown: Counter[int] = Counter()
    for path in paths:
        numbers = class_numbers(path)
        values, counts = np.unique(numbers, return_counts=True)
        largest = np.iinfo(numbers.dtype).max
        if ignore == "unset" and values[-1] == largest:
            raise DataError(
                f"evaluation.segmentation: masks show {largest} (first: {printable(path)}), and "
                f"nobody said what it is: set --{FIELD} {largest} where it marks what is not "
                f"labelled (VOC, Cityscapes; 0 is a class then), --{FIELD} 0 where 0 does and "
                f"{largest} is a class (as ADE20K has 0), --{FIELD} '[0, {largest}]' where both "
                f"do, or '[]' where all are classes (masks of 0 and {largest})"
            )
        shown.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    return shown


def class_numbers(path: Path) -> np.ndarray:
    """Read the upright class numbers of a mask, ``[H, W]`` uint8 or uint16, as they are stored.

    Raises:
        DataError: not a PNG of one channel, or not readable.
    """
    try:
        with open_regular(path) as file:
            head = file.read(_BIT_DEPTH + 1)
            file.seek(0)
            image = Image.open(file, formats=["PNG"])
            image.load()
            numbers = upright(np.array(image), image)
    except Image.UnidentifiedImageError as error:
        raise DataError(
            f"{printable(path)}: not a PNG file, whatever its name says; masks are PNG, since "
            "lossy formats blur class numbers"
        ) from error
    except Exception as error:  # decoders fail on damaged bytes with nearly any exception
        raise DataError(
            f"{printable(path)}: cannot read the mask ({printable(reason_of(error))})"
        ) from error
    if numbers.ndim != 2:
        raise DataError(
            f"{printable(path)}: a mask has one channel of class numbers, not {numbers.shape[2]} "
            f"({image.mode}); write the class number of each colour as grey or palette PNG"
        )
    if image.mode == "L" and head[_BIT_DEPTH] in _SCALED_GREY:
        numbers //= _SCALED_GREY[head[_BIT_DEPTH]]
    return numbers.astype(np.uint8 if numbers.itemsize == 1 else np.uint16)


def read_mask(path: Path, size: int, classes: np.ndarray) -> Tensor:
    """Read a mask, cropped as images are: ``[size, size]``, index in ``classes`` or IGNORED."""
    whole = Image.fromarray(class_numbers(path).astype(np.int32))
    fitted = np.array(ImageOps.fit(whole, (size, size), Image.Resampling.NEAREST))
    position = np.searchsorted(classes, fitted).clip(max=len(classes) - 1)
    return torch.from_numpy(np.where(classes[position] == fitted, position, IGNORED))
