"""How long one core takes to decode an image and to render a view of it, and how pixels moved.

For each size the CPU time of an image, of four ways that take turns in one run:

* Pillow: decodes, crops, flips and resizes, as versions up to 0.2 did;
* ours: ``decode_pixels``, ``random_origin`` and ``render``, into a row of a batch;
* bare: the same calls of simplejpeg and torch in a loop, with nothing around them;
* decode: simplejpeg alone, the bound that no resizing reaches.

Then the difference of views that Pillow and we make of the same crops, in steps of 255. The last
line is what ``radio-distill plan`` reckons with: seconds = A for the photograph + B for each pixel
rendered.

    python -m benchmarks.decoding --images FOLDER [--shape 640 427] [--sizes 224 432 1024]

FOLDER is searched for JPEG files. Times are medians over repeats.
"""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from radio_distill.config import DataConfig
from radio_distill.data.images import decode_pixels
from radio_distill.data.order import view_generator
from radio_distill.data.rendering import random_origin, render
from radio_distill.report.tables import Column, Table, print_tables
from radio_distill.types import ViewOrigin
from stages.arguments import run_script

CONFIG = DataConfig(shards=())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", required=True, metavar="FOLDER", help="with JPEG files")
    parser.add_argument(
        "--shape", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"),
        help="take only photographs of this size, give or take 4 px",
    )  # fmt: skip
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 432, 1024], metavar="PX")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=int, default=48, help="most photographs (default: 48)")


@dataclass(frozen=True)
class Photograph:
    """A file, and where the view of one size lies in it."""

    data: bytes
    origin: ViewOrigin


def by_pillow(photograph: Photograph, side: int) -> Tensor:
    """Make the view with Pillow alone, ``[3, side, side]``."""
    origin = photograph.origin
    image = Image.open(io.BytesIO(photograph.data)).convert("RGB")
    right, bottom = origin.left + origin.width, origin.top + origin.height
    view = image.crop((origin.left, origin.top, right, bottom))
    view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if origin.flipped else view
    resized = np.array(view.resize((side, side), Image.Resampling.BICUBIC))
    return torch.from_numpy(resized).permute(2, 0, 1).contiguous()


def bare(photograph: Photograph, side: int) -> Tensor:
    """Make the view, not flipped, with the calls alone that do the work."""
    origin = photograph.origin
    decoded = torch.from_numpy(simplejpeg.decode_jpeg(photograph.data))[None].permute(0, 3, 1, 2)
    bottom, right = origin.top + origin.height, origin.left + origin.width
    view = decoded[:, :, origin.top : bottom, origin.left : right]
    return F.interpolate(view, (side, side), mode="bicubic", antialias=True)


def decode(photograph: Photograph, side: int) -> np.ndarray:
    """Decode alone."""
    pixels: np.ndarray = simplejpeg.decode_jpeg(photograph.data)
    return pixels


def ours(side: int) -> Callable[[Photograph, int], None]:
    """Return what the loader does for a view, into the row of a batch."""
    batch = torch.empty((1, 3, side, side), dtype=torch.uint8, memory_format=torch.channels_last)

    def make(photograph: Photograph, position: int) -> None:
        image = decode_pixels(photograph.data)
        source = image.shape[1], image.shape[2]
        origin = random_origin(source, (side, side), CONFIG, view_generator(0, position))
        render(image, origin, (side, side), out=batch[0])

    return make


def measure(files: Sequence[bytes], side: int, repeats: int) -> dict[str, float]:
    """Return the median CPU time of an image in seconds, by way."""
    photographs = _photographs(files, side)
    make = ours(side)
    ways: dict[str, Callable[[Photograph, int], object]] = {
        "pillow": lambda photograph, _: by_pillow(photograph, side),
        "ours": make,
        "bare": lambda photograph, _: bare(photograph, side),
        "decode": lambda photograph, _: decode(photograph, side),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = time.process_time()
            for position, photograph in enumerate(photographs):
                way(photograph, position)
            if turn:  # the first allocates
                taken[name].append((time.process_time() - start) / len(files))
    return {name: statistics.median(values) for name, values in taken.items()}


def differences(files: Sequence[bytes], side: int) -> tuple[int, float, float]:
    """Return largest and mean difference from Pillow, of 255, and the share of those above 1."""
    found = []
    for photograph in _photographs(files, side):
        view = render(decode_pixels(photograph.data), photograph.origin, (side, side))
        found.append((view.int() - by_pillow(photograph, side).int()).abs())
    every = torch.stack(found)
    return int(every.max()), float(every.double().mean()), float((every > 1).double().mean())


def _photographs(files: Sequence[bytes], side: int) -> list[Photograph]:
    photographs = []
    for position, data in enumerate(files):
        width, height = Image.open(io.BytesIO(data)).size
        generator = view_generator(0, position)
        origin = random_origin((height, width), (side, side), CONFIG, generator)
        photographs.append(Photograph(data, origin))
    return photographs


def _read(arguments: argparse.Namespace) -> list[bytes]:
    files: list[bytes] = []
    for path in sorted(Path(arguments.images).rglob("*.jpg")):
        with Image.open(path) as image:
            shape, wanted = image.size, arguments.shape or image.size
            fits = all(abs(a - b) <= 4 for a, b in zip(shape, wanted, strict=True))
            if fits and image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1:
                files.append(path.read_bytes())
        if len(files) == arguments.limit:
            break
    if not files:
        raise SystemExit(f"{arguments.images} holds no such JPEG files")
    return files


def run(arguments: argparse.Namespace) -> int:
    """Print the times, the differences, and the line through the times."""
    torch.set_num_threads(1)
    files = _read(arguments)
    times = {side: measure(files, side, arguments.repeats) for side in arguments.sizes}
    columns = (
        Column("size, px"),
        *(Column(f"{name}, ms", ".2f") for name in ("Pillow", "ours", "bare", "decode")),
        Column("times Pillow", ".2f"),
        Column("of bare, %", ".0f"),
        Column("images / s", ".0f"),
    )
    rows = tuple(
        (
            str(side),
            *(1e3 * taken[name] for name in ("pillow", "ours", "bare", "decode")),
            taken["pillow"] / taken["ours"],
            100 * taken["bare"] / taken["ours"],
            1 / taken["ours"],
        )
        for side, taken in times.items()
    )
    note = f"{len(files)} photographs, {np.mean([*map(len, files)]) / 1e3:.0f} kB; CPU time, 1 core"
    moved = tuple((str(side), *differences(files, side)) for side in arguments.sizes)
    print_tables(
        [
            Table("Decode and render", columns, rows, (note,)),
            Table(
                "Difference from Pillow, of 255",
                (Column("size, px"), Column("largest"), Column("mean", ".4f"),
                 Column("share above 1", ".6f")),
                moved,
            ),
        ]
    )  # fmt: skip
    if len(times) > 1:
        pixels = [side**2 for side in times]
        slope, intercept = np.polyfit(pixels, [taken["ours"] for taken in times.values()], 1)
        print(f"A = {1e3 * intercept:.2f} ms, B = {1e9 * slope:.1f} ns")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main())
