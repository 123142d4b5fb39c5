"""What the readers of data sets share: lists, pairs of files, numbers in PNGs, JSON.

Every function that fails raises DataError in one line, with the fix.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ...system.files import open_regular, printable, reason_of
from ..encoder import open_image
from ..masks import class_numbers
from ..metrics import IGNORED

_NONE = IGNORED - 1
"""Stands for a number that is no class and not ignored either."""


def stems(folder: Path, suffix: str) -> list[str]:
    """List the files of a folder with a suffix by their names without it, sorted."""
    with os.scandir(folder) as entries:
        names = [item.name for item in entries if not item.name.startswith(".")]
    return sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix))


def same_stems(images: Path, labels: Path, suffixes: tuple[str, str]) -> list[str]:
    """List what both folders hold, sorted; what only one of them holds is an error."""
    first, second = stems(images, suffixes[0]), stems(labels, suffixes[1])
    if not first:
        raise DataError(f"no *{suffixes[0]} in {images}; copy the images there")
    for there, lacking, folder, suffix in (
        (first, second, labels, suffixes[1]),
        (second, first, images, suffixes[0]),
    ):
        if alone := sorted(set(there) - set(lacking)):
            raise DataError(
                f"{len(alone):,} of {len(there):,} files have no partner in {folder} (first: "
                f"{printable(alone[0])}{suffix}); copy the set again, or remove what is alone"
            )
    return first


def read_lines(path: Path) -> list[str]:
    """Read the lines of a list, stripped, without empty ones."""
    try:
        with open_regular(path) as file:
            lines = [line.strip() for line in file.read().decode().splitlines()]
    except OSError as error:
        raise DataError(f"{path}: {reason_of(error)}; the list comes with the set") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no text; copy the list again") from error
    if found := [line for line in lines if line]:
        return found
    raise DataError(f"{path} is empty; copy the list again")


def check_listed(list_path: Path, names: Sequence[str], folder: Path, suffix: str = "") -> None:
    """Check that ``folder/NAME.suffix`` is there for each name of a list."""
    there = set(stems(folder, suffix)) if folder.is_dir() else set()
    if lost := [name for name in names if name not in there]:
        raise DataError(
            f"{len(lost):,} of {len(names):,} names in {list_path} have no file in {folder} "
            f"(first: {printable(lost[0])}{suffix}); copy the set again, or shorten the list"
        )


def read_classes(path: Path, num_classes: int, ignored: int, offset: int = 0) -> Tensor:
    """Read a PNG of class numbers: ``[H, W]`` int64 from 0, ``ignored`` as IGNORED.

    Args:
        path: one channel, grey or palette.
        num_classes: of the set; a larger number is an error.
        ignored: the number in the file that is no class.
        offset: the number in the file that is class 0.
    """
    numbers = class_numbers(path)
    classes = np.full(np.iinfo(numbers.dtype).max + 1, _NONE)
    classes[offset : offset + num_classes] = np.arange(num_classes)
    classes[ignored] = IGNORED
    found = classes[numbers]
    if found.min() == _NONE:
        raise DataError(
            f"{path} shows {numbers[found == _NONE][0]}, and classes are {offset} to "
            f"{offset + num_classes - 1}: these are the masks of another set"
        )
    return torch.from_numpy(found)


def read_normals(path: Path) -> Tensor:
    """Read normals out of an image whose 0 to 255 stand for -1 to 1: ``[3, H, W]``, unit or 0."""
    stored = np.array(open_image(path), dtype=np.float32)
    normals = torch.from_numpy(2 * stored / 255 - 1).permute(2, 0, 1)
    length = normals.norm(dim=0)
    return torch.where(length > 0.1, normals / length, 0.0)


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    try:
        with open_regular(path) as file:
            return json.load(file)
    except OSError as error:
        raise DataError(f"{path}: {reason_of(error)}; it comes with the set") from error
    except ValueError as error:
        raise DataError(f"{path} is no whole JSON file; copy it again") from error


def check_json_end(path: Path) -> None:
    """Check that a JSON object is there and ends as one, without reading it."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, path.stat().st_size - 64))
            if file.read().rstrip().endswith(b"}"):
                return
    except OSError as error:
        raise DataError(f"{path}: {reason_of(error)}; it comes with the set") from error
    raise DataError(f"{path} is no whole JSON file; copy it again")
