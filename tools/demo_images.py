"""Make the demo's shards of the photographs inside the scikit-image and scikit-learn packages.

python -m tools.demo_images

Writes crops of them to ``data/demo``: ``shards`` to train on, ``held_out``, a folder of images, and
``labels``, 200 small labelled ones (faces of Labeled Faces in the Wild or none, 25 px a side, as
scikit-image has them), half of each class to compare the others with.
Held-out images are whole photographs that no training crop is cut from: the cat, the cup and both
views of the motorcycle, which the correspondence benchmark uses too. Grey photographs count as
images; drawings, masks, colour charts and anything that would have to be downloaded do not.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from radio_distill.errors import ConfigError
from stages.arguments import run_command

if TYPE_CHECKING:
    from PIL.Image import Image

OUT = Path("data/demo")
"""Where the recipe of the demo looks for its images."""
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
    "chelsea.png": 10,
    "coffee.png": 10,
    "motorcycle_left.png": 10,
    "motorcycle_right.png": 10,
}

_LONGEST = 640  # px; larger crops are reduced, none is enlarged
_SHORTEST = 192  # px
_LEAST_CONTRAST = 14.0  # standard deviation of grey levels; below lies empty sky (measured)


def main(argv: Sequence[str] | None = None) -> int:
    """Make shards and held-out images, unless they are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUT, metavar="DIR")
    arguments = parser.parse_args(argv)
    return run_command(lambda: write_demo_images(arguments.output))


def write_demo_images(out: Path = OUT) -> None:
    """Write ``shards``, ``held_out`` and ``labels`` in ``out``; the same images at every call.

    Raises:
        ConfigError: where ``out`` cannot be written or a package is missing.
    """
    from radio_distill.data.shards import write_shards

    shards, held_out, labels = out / "shards", out / "held_out", out / "labels"
    if any(shards.glob("*.tar")) and labels.is_dir():
        return
    try:
        for earlier in (shards, held_out, labels):
            shutil.rmtree(earlier, ignore_errors=True)
        held_out.mkdir(parents=True)
        with tempfile.TemporaryDirectory(dir=out) as train:
            write_crops(held_out, HELD_OUT)
            write_crops(Path(train), TRAIN)
            # Several shards, so that what a real data set needs is used here too.
            summary = write_shards(Path(train), shards, images_per_shard=100)
        write_faces(labels)
    except OSError as error:
        raise ConfigError(f"cannot write images to {out}: {error.strerror or error}") from error
    num_held_out = sum(HELD_OUT.values())
    print(f"{summary.num_images} images to train on, {num_held_out} held out: {out}")


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


def write_crops(folder: Path, crops: dict[str, int]) -> None:
    """Write so many crops of each photograph, as JPEG."""
    for name, number in crops.items():
        image, draw = photograph(name), random.Random(name)
        for index in range(number):
            # Number first: the first N files show as many images as they can.
            path = folder / f"{index:02}_{Path(name).stem}.jpg"
            _crop(image, draw).save(path, quality=95, subsampling=0)


def write_faces(folder: Path) -> None:
    """Write scikit-image's faces, and its squares that show none, to ``SPLIT/CLASS/NUMBER.png``."""
    import numpy as np
    from PIL import Image

    (path,) = [found for it in _package_folders() if (found := it / "lfw_subset.npy").is_file()]
    for number, grey in enumerate(np.load(path)):  # [200, 25, 25] in [0, 1], faces first
        split, kind = ("train", "val")[number % 2], ("face", "other")[number // 100]
        place = folder / split / kind
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((255 * grey).round().astype(np.uint8))
        image.save(place / f"{number:03}.png")


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


if __name__ == "__main__":
    sys.exit(main())
