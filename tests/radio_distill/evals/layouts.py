"""Tiny data sets in the layouts of the published ones, one function a layout.

Each function fills an empty folder and returns it. Pictures show their labels: one colour a class.
"""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (48, 40)
"""Width and height of every picture."""


def save(path: Path, array: np.ndarray) -> Path:
    """Write an array as the image that the suffix says, JPEGs with all their colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
    Image.fromarray(array).save(path, **options)
    return path


def write(path: Path, text: str) -> Path:
    """Write a text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def regions(generator: np.random.Generator, numbers: list[int]) -> np.ndarray:
    """A label map of 8 px blocks that shows each of ``numbers``, ``[H, W]`` uint8."""
    width, height = SIZE[0] // 8, SIZE[1] // 8
    blocks = generator.choice(np.array(numbers, dtype=np.uint8), (height, width))
    blocks.flat[: len(numbers)] = numbers
    return np.kron(blocks, np.ones((8, 8), dtype=np.uint8))


def painted(numbers: np.ndarray) -> np.ndarray:
    """A picture in which each number of a label map has a colour of its own, ``[H, W, 3]``."""
    return np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)[numbers]


def ade20k(root: Path, train: int = 3, val: int = 2) -> Path:
    """ADEChallengeData2016 with classes 1 to 4 and unlabelled pixels."""
    generator = np.random.default_rng(0)
    for folder, short, count in (("training", "train", train), ("validation", "val", val)):
        for number in range(1, count + 1):
            stem = f"{folder}/ADE_{short}_{number:08d}"
            mask = regions(generator, [0, 1, 2, 3, 4])
            save(root / "images" / f"{stem}.jpg", painted(mask))
            save(root / "annotations" / f"{stem}.png", mask)
    return root


def voc(root: Path, train: int = 2, val: int = 2, aug: int = 3) -> Path:
    """VOC2012 with background, two classes and void; ``aug`` pictures more in trainaug."""
    generator = np.random.default_rng(0)
    lists: dict[str, list[str]] = {"train": [], "val": [], "aug": []}
    for number in range(train + val + aug):
        split = "train" if number < train else "val" if number < train + val else "aug"
        lists[split].append(f"2007_{number:06d}")
        stem = lists[split][-1]
        numbers = regions(generator, [0, 1, 15, 255])
        save(root / "JPEGImages" / f"{stem}.jpg", painted(numbers))
        mask = Image.fromarray(numbers)
        mask.putpalette([value for index in range(256) for value in (index, 7, 255 - index)])
        for folder in ["SegmentationClass"] * (split != "aug") + ["SegmentationClassAug"] * (
            aug > 0
        ):
            (root / folder).mkdir(exist_ok=True)
            mask.save(root / folder / f"{stem}.png")
    if aug:
        lists["trainaug"] = lists["train"] + lists["aug"]
    for name, stems in lists.items():
        write(root / "ImageSets" / "Segmentation" / f"{name}.txt", "\n".join(stems) + "\n")
    return root
