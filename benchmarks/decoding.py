"""How long one core takes to decode an image and to render its views.

For each size the CPU time of an image: decoded, cropped, rendered once. The last line is what
``radio-distill plan`` reckons with: seconds = A for the photograph + B for each pixel rendered.

    python -m benchmarks.decoding PHOTOGRAPHS [--sizes 224 432 1024] [--repeats 5]

PHOTOGRAPHS is a folder of image files. Times are medians over repeats, in
which the sizes take turns.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from radio_distill.config import DataConfig
from radio_distill.data.images import cut, decode_image, random_origin, render
from radio_distill.data.order import view_generator
from radio_distill.report.tables import Column, Table, print_tables
from stages.arguments import run_script


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photographs", metavar="PHOTOGRAPHS", help="folder of files")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 432, 1024], metavar="PX")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=int, default=64, help="most photographs (default: 64)")


def run(arguments: argparse.Namespace) -> int:
    """Print a table and the line through it."""
    paths = [path for path in sorted(Path(arguments.photographs).iterdir()) if path.is_file()]
    files = [path.read_bytes() for path in paths[: arguments.limit]]
    config = DataConfig(shards=())

    def seconds(side: int) -> float:
        start = time.process_time()
        for index, data in enumerate(files):
            image = decode_image(data)
            origin = random_origin(image, (side, side), config, view_generator(0, index))
            render(cut(image, origin), (side, side))
        return (time.process_time() - start) / len(files)

    for side in arguments.sizes:  # the first pass reads files and allocates
        seconds(side)
    taken: dict[int, list[float]] = {side: [] for side in arguments.sizes}
    for _ in range(arguments.repeats):
        for side in arguments.sizes:
            taken[side].append(seconds(side))
    medians = {side: statistics.median(values) for side, values in taken.items()}
    slope, intercept = np.polyfit([side**2 for side in medians], list(medians.values()), 1)
    columns = (
        Column("size, px"),
        Column("ms / image", ".2f", "lower"),
        Column("images / s", ".0f"),
    )
    rows = tuple((str(side), 1e3 * value, 1 / value) for side, value in medians.items())
    pixels = statistics.median(np.prod(decode_image(data).size) for data in files)
    note = f"{len(files)} photographs, median {pixels / 1e6:.2f} megapixels; CPU time of one core"
    print_tables([Table("Decoding", columns, rows, (note,))])
    print(f"A = {1e3 * intercept:.2f} ms, B = {1e9 * slope:.1f} ns")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main())
