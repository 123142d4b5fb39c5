"""What a teacher says of an image that reached it by another way than straight from the photograph.

The reference is the teacher's features of a crop cut out of the photograph and resized to the
teacher's own size. Compared with it, as squared error over the variance of the features, three ways
to make a teacher's view out of what the loader renders:

* **enlarged** from the view of a student that is smaller by the ratio;
* **resized** down, antialiased, from the view of another encoder that is larger by the ratio;
* **rendered** at the teacher's size beside those two: what training does.

    python -m benchmarks.views PHOTOGRAPHS [--size 224] [--ratios 1.05 1.48 2 3]

PHOTOGRAPHS is a folder or shards; those with a side below 400 px are left out, and counted.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from radio_distill.config import DataConfig, TeacherConfig
from radio_distill.data.folder import load_images
from radio_distill.data.loader import ShardBatches, StepSlice, in_every_step
from radio_distill.data.rendering import to_float
from radio_distill.data.shards import write_shards
from radio_distill.distill.views import resize
from radio_distill.evals.encoder import open_image
from radio_distill.protocols import Teacher
from radio_distill.report.tables import Cell, Column, Table, print_tables
from radio_distill.types import ImageBatch, View
from stages.arguments import run_script
from teachers import build_teacher

TEACHERS = ("vits14_packaged", "efficientnet_lite0_packaged")
LEAST = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photographs", metavar="PHOTOGRAPHS", help="folder or shards")
    parser.add_argument("--teachers", nargs="+", default=TEACHERS, metavar="PRESET")
    parser.add_argument("--size", type=int, default=224, help="of the teachers' input, px")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.05, 1.14, 1.48, 2.0, 3.0])
    parser.add_argument("--limit", type=int, default=10, help="most photographs (default: 10)")


def run(arguments: argparse.Namespace) -> int:
    """Print one table."""
    every = [open_image(photo) for _, photo in load_images(arguments.photographs, None)]
    images = [image for image in every if min(image.size) >= LEAST][: arguments.limit]
    teachers = [
        build_teacher(preset, TeacherConfig(preset=preset, dtype="float32"))
        for preset in arguments.teachers
    ]
    rows: dict[str, list[tuple[Cell, ...]]] = {teacher.spec.name: [] for teacher in teachers}
    own = (arguments.size, arguments.size)
    for ratio in arguments.ratios:
        small, large = (round(arguments.size * scale) for scale in (1 / ratio, ratio))
        batch = _load(images, [(small, small), own, (large, large)])
        reference = to_float(torch.stack(_direct(images, batch, arguments.size)))
        ways = [
            resize(to_float(batch.views[View((small, small))]), own),
            resize(to_float(batch.views[View((large, large))]), own),
            to_float(batch.views[View(own)]),
        ]
        for teacher in teachers:
            right = _spatial(teacher, reference)
            errors = [_error(_spatial(teacher, pixels), right) for pixels in ways]
            rows[teacher.spec.name].append((teacher.spec.name, ratio, *errors))
    columns = [Column("teacher"), Column("ratio", ".2f")]
    columns += [Column(f"{way}, %", ".2f", "lower") for way in ("enlarged", "resized", "rendered")]
    note = f"{len(images)} of the {len(every)} photographs: sides of {LEAST} px or more"
    title = f"Error of features at {arguments.size} px, over their variance"
    print_tables([Table(title, tuple(columns), tuple(itertools.chain(*rows.values())), (note,))])
    return 0


def _load(images: Sequence[Image.Image], sizes: Sequence[tuple[int, int]]) -> ImageBatch:
    """Put photographs into a shard, and let the loader render one step of them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "photographs")
        source.mkdir()
        for index, image in enumerate(images):
            image.save(source / f"{index}.png")
        write_shards(source, Path(folder, "shards"))
        views = {View(size): None for size in sizes}
        slices = in_every_step([StepSlice(0, len(images), sizes[1], views)])
        config = DataConfig(shards=(str(Path(folder, "shards")),), workers=0)
        (batch,) = next(
            ShardBatches(config, seed=0, images_per_step=len(images), slices=slices).batches(0)
        )
        return batch


def _direct(images: Sequence[Image.Image], batch: ImageBatch, side: int) -> list[Tensor]:
    """Cut each image of a batch out of its photograph, and resize it once."""
    pixels = []
    for key, origin in zip(batch.keys, batch.origins, strict=True):
        array = np.asarray(images[int(Path(key.rpartition("-")[2]).stem)])
        array = array[origin.top :, origin.left :][: origin.height, : origin.width]
        view = Image.fromarray(array[:, ::-1] if origin.flipped else array)
        resized = np.array(view.resize((side, side), Image.Resampling.BICUBIC))
        pixels.append(torch.from_numpy(resized).permute(2, 0, 1))
    return pixels


def _spatial(teacher: Teacher, pixels: Tensor) -> Tensor:
    return teacher.encode(pixels).spatial.double()


def _error(found: Tensor, reference: Tensor) -> float:
    """Return the squared error over the variance of the reference, in %."""
    variance = (reference - reference.mean(dim=(0, 2, 3), keepdim=True)).square().sum()
    return float(100 * (found - reference).square().sum() / variance)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main())
