"""How much the neighbours in a mosaic change what a teacher says of a view.

Pretrained teachers that come inside Python packages see photographs in three ways: in a full
mosaic, alone at the same place of an otherwise empty canvas, and plain, without a canvas. Printed
is the RMS of the difference of two maps over the RMS of the second about the mean of each channel.
Equal maps give 0, maps of unrelated images about 1.4. "Rim" and "inside" split the cells of a
view into the outermost ring and the rest. Two columns are yardsticks: the plain map against that of
the mirrored view, mirrored back, and against that of another image.

    python -m benchmarks.mosaic [--images FOLDER] [--view 224] [--threads 1]

A mosaic equals the view alone only where no layer mixes cells of two views: for a patch embedding,
or attention in windows of which none touches two views; the tests of mosaics build
such encoders. It cannot for the two teachers here: a ViT attends to the whole canvas, so that a
neighbour reaches every cell, and the receptive field of a deep CNN crosses into the next view. Nor
can it for SAM, for which the mosaic is made, because of its four global blocks; its weights are in
no package. Both teachers here take any size and so show what the canvas alone
does (``alone, plain``): a position table for a larger grid, and padding that layers can see. They
were not trained on padded canvases as SAM was, so their figures say little about SAM's.
"""

import argparse
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from radio_distill.config import TeacherConfig
from radio_distill.data.find import list_tree
from radio_distill.distill.targets import pack, unpack
from radio_distill.protocols import Teacher
from radio_distill.teacher_view import Mosaic, plan_mosaic
from teachers import build_teacher
from tools.demo_images import photograph

TEACHERS = ("vits14_packaged", "efficientnet_lite0_packaged")
PHOTOGRAPHS = (
    "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "camera.png",
    "hubble_deep_field.jpg", "retina.jpg", "coins.png",
)  # fmt: skip
"""Those of scikit-image."""
SIDES = (2, 3)
"""Views a side of the mosaics."""
MOSAICS = 3
"""Of each size; the images change places between them."""


def read_views(folder: Path | None, number: int, side: int) -> Tensor:
    """Return ``[number, 3, side, side]`` in [0, 1]: the middle squares of images."""
    if folder is None:
        photographs = [photograph(name) for name in PHOTOGRAPHS[:number]]
    else:
        photographs = [
            Image.open(path).convert("RGB") for path in list_tree(folder).images[:number]
        ]
    if len(photographs) < number:
        raise SystemExit(f"{folder} holds {len(photographs)} images; {number} are needed")
    return torch.stack([_pixels(ImageOps.fit(image, (side, side))) for image in photographs])


def _pixels(image: Image.Image) -> Tensor:
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) / 255
    return rearrange(values, "(h w c) -> c h w", h=image.height, c=3)


def in_mosaic(teacher: Teacher, mosaic: Mosaic, views: Tensor) -> Tensor:
    """Return the features of the views of one canvas, ``[B, C, h, w]``."""
    canvas = pack(mosaic, views, teacher.spec.mean)
    return unpack(mosaic, teacher.encode(canvas).spatial, len(views))


def alone(teacher: Teacher, mosaic: Mosaic, views: Tensor) -> Tensor:
    """Return the features of each view at its place of a canvas without the others."""
    features = []
    for index in range(len(views)):
        canvas = (
            torch.tensor(teacher.spec.mean).view(1, 3, 1, 1).repeat(len(views), 1, *mosaic.view)
        )
        canvas[index] = views[index]
        features.append(in_mosaic(teacher, mosaic, canvas)[index])
    return torch.stack(features)


def difference(features: Tensor, reference: Tensor, cells: Tensor | None = None) -> float:
    """Return the RMS difference on ``cells [h, w]``, relative to the reference about its mean."""
    change = features - reference
    centred = reference - reference.mean((0, 2, 3), keepdim=True)
    if cells is not None:
        change, centred = change[..., cells], centred[..., cells]
    return float(change.norm() / centred.norm())


def measure(teacher: Teacher, photographs: Tensor, side: int) -> dict[str, float]:
    """Compare mosaic, alone and plain for ``side`` views a side."""
    height, width = photographs.shape[-2:]
    canvas, patch = (side * height, side * width), teacher.spec.patch_size
    mosaic = plan_mosaic(teacher.spec.name, canvas, (height, width), patch)
    groups = [photographs.roll(-2 * turn, 0)[: mosaic.images] for turn in range(MOSAICS)]
    views = torch.cat(groups)
    mixed = torch.cat([in_mosaic(teacher, mosaic, group) for group in groups])
    single = torch.cat([alone(teacher, mosaic, group) for group in groups])
    plain, mirrored = (teacher.encode(seen).spatial for seen in (views, views.flip(-1)))
    inside = torch.zeros(plain.shape[-2:], dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    return {
        "mosaic, alone": difference(mixed, single),
        "rim": difference(mixed, single, ~inside),
        "inside": difference(mixed, single, inside),
        "mosaic, plain": difference(mixed, plain),
        "alone, plain": difference(single, plain),
        "mirrored": difference(mirrored.flip(-1), plain),
        "another": difference(plain.roll(1, 0), plain),
    }


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--images", type=Path, help="folder; default: scikit-image's photographs")
    parser.add_argument("--view", type=int, default=224, help="side of a view in pixels")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    photographs = read_views(arguments.images, max(SIDES) ** 2, arguments.view)
    for name in TEACHERS:
        teacher = build_teacher(name, TeacherConfig(preset=name))
        rows = {f"{side}x{side}": measure(teacher, photographs, side) for side in SIDES}
        columns = next(iter(rows.values()))
        table = Table("views", *columns, title=name, title_justify="left", box=None)
        for views, row in rows.items():
            table.add_row(views, *(f"{value:.2f}" for value in row.values()))
        Console().print(table)


if __name__ == "__main__":
    main()
