"""The photographs of the demo: those inside the scikit-image and scikit-learn packages, in crops.

Held-out images are whole photographs that no training crop is cut from: the cat, the cup and both
views of the motorcycle, which the correspondence benchmark uses too. Grey photographs count as
images; drawings, masks, colour charts and anything that would have to be downloaded do not.
"""

import hashlib
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from radio_distill.data.find import list_tree
from radio_distill.data.images import IMAGE_SUFFIXES
from radio_distill.data.shards import find_images
from radio_distill.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

# name -> number of crops. Scenes weigh more than textures and instruments' images (our choice).
TRAIN = {
    "astronaut.png": 64,
    "camera.png": 64,
    "china.jpg": 64,
    "flower.jpg": 64,
    "rocket.jpg": 64,
    "brick.png": 24,
    "coins.png": 24,
    "grass.png": 24,
    "gravel.png": 24,
    "hubble_deep_field.jpg": 24,
    "ihc.png": 24,
    "retina.jpg": 24,
}
HELD_OUT = {
    "chelsea.png": 20,
    "coffee.png": 20,
    "motorcycle_left.png": 20,
    "motorcycle_right.png": 20,
}

_LONGEST = 640  # px; larger crops are reduced, none is enlarged
_SHORTEST = 192  # px
_LEAST_CONTRAST = 14.0  # standard deviation of grey levels; below lies empty sky (measured)


@dataclass(frozen=True)
class DemoImages:
    """Two folders of images, none of which shows what the other shows."""

    train: Path
    held_out: Path
    num_train: int
    num_held_out: int


def gather_demo_images(out: Path, data: Path | None = None) -> DemoImages:
    """Fill ``out/train`` and ``out/held_out``; the same images at every call.

    What an earlier call left there is replaced. Without ``data``, crops of the packages'
    photographs are written as JPEG. With it, its images are linked, with the captions beside
    them, in the same sub-folders; every tenth is held out, by the hash of its path.

    Raises:
        ConfigError: where ``out`` cannot be written or a package is missing.
        DataError: where ``data`` holds fewer than two images.
    """
    if data is not None:
        _check_apart(out, data)
    images = None if data is None else _split(data)
    folders = {name: out / name for name in ("train", "held_out")}
    try:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        if data is None or images is None:
            for name, crops in (("train", TRAIN), ("held_out", HELD_OUT)):
                _write_crops(folders[name], crops)
        else:
            for name, files in images.items():
                _link(files, data, folders[name])
    except OSError as error:
        raise ConfigError(f"cannot write images to {out}: {error.strerror or error}") from error
    train, held_out = (len(find_images(folder)) for folder in folders.values())
    return DemoImages(folders["train"], folders["held_out"], train, held_out)


def photograph(name: str) -> "Image":
    """Open one of the packages' photographs, as RGB.

    Raises:
        ConfigError: where the package that ships it is not installed.
    """
    from PIL import Image

    for folder in _package_folders():
        if (folder / name).is_file():
            with Image.open(folder / name) as image:
                return image.convert("RGB")
    raise ConfigError(
        f"the photograph {name} is missing: install scikit-image and scikit-learn "
        "(pip install 'radio-distill[demo]')"
    )


def _package_folders() -> list[Path]:
    from importlib.util import find_spec

    inside = {"skimage": "data", "sklearn": "datasets/images"}
    specs = {name: find_spec(name) for name in inside}
    return [
        Path(spec.origin).parent / inside[name]
        for name, spec in specs.items()
        if spec is not None and spec.origin
    ]


def _write_crops(folder: Path, crops: dict[str, int]) -> None:
    for name, number in crops.items():
        image, draw = photograph(name), random.Random(name)
        for index in range(number):
            # Number first: the first N files show as many images as they can.
            path = folder / f"{index:02}_{Path(name).stem}.jpg"
            _crop(image, draw).save(path, quality=95, subsampling=0)


def _crop(image: "Image", draw: random.Random) -> "Image":
    """Cut a random window: 1/6 of the image to all of it, log-uniform; aspect 3:4 to 4:3."""
    from PIL import Image, ImageStat

    width, height = image.size
    while True:
        area = width * height * 6 ** -draw.random()
        aspect = draw.uniform(3 / 4, 4 / 3)
        w, h = min(width, round((area * aspect) ** 0.5)), min(height, round((area / aspect) ** 0.5))
        left, top = draw.randint(0, width - w), draw.randint(0, height - h)
        if min(w, h) < _SHORTEST:
            continue
        crop = image.crop((left, top, left + w, top + h))
        if ImageStat.Stat(crop.convert("L")).stddev[0] < _LEAST_CONTRAST:
            continue
        crop.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
        return crop


def _check_apart(out: Path, data: Path) -> None:
    inner, outer = out.resolve(), data.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise ConfigError(f"{data} and the run's {out} lie in each other; move the images apart")


def _split(data: Path) -> dict[str, list[Path]]:
    if not data.is_dir():
        raise DataError(f"no folder {data}; DATA is a folder of images")
    tree = list_tree(data)
    files = tree.images
    captions = [file.with_suffix(".txt") for file in files]
    if rest := tree.describe_rest([*files, *captions]):
        print(f"passed over in {data}: {rest}")
    if len(files) < 2:
        raise DataError(
            f"{len(files)} images in {data}; at least 2 are needed, one to learn from and one to "
            f"hold out ({', '.join(IMAGE_SUFFIXES)})"
        )
    files.sort(key=lambda path: hashlib.sha256(path.relative_to(data).as_posix().encode()).digest())
    held_out = files[::10]
    return {"train": sorted(set(files) - set(held_out)), "held_out": sorted(held_out)}


def _link(files: list[Path], data: Path, folder: Path) -> None:
    captions = {file.with_suffix(".txt") for file in files}
    for source in [*files, *filter(Path.is_file, captions)]:
        link = folder / source.relative_to(data)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(source.resolve())
