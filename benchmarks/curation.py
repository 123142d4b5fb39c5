"""What `radio-distill curate` finds of copies that were planted, and how even a long tail becomes.

Copies: of every fourth image of some folders a copy is added, of one of five kinds in turn: half
the side, JPEG at quality 30, mirrored, a crop of 80 % and one of 60 % of the area. By threshold,
recall is the share of the copies that land in one group with their original, by kind too;
precision is the share of the images left out whose group's kept image is of the same original. What
a set holds of near-duplicates of its own counts as wrong.

Balance: a long tail is drawn from the classes of the first folder (40, 34, 29, … images of its
classes in an order that the seed draws), and a part of it is kept: at random, evenly over one level
of clusters, or over two. Measured by the labels, which curation does not see: exp(entropy) of the
classes' shares, the share of the largest, and the classes that are left.

    python -m benchmarks.curation CLASS_FOLDERS PHOTOGRAPHS [--teachers …] [--output runs/curation]

CLASS_FOLDERS holds CLASS/*.jpg. Summaries are kept, so a second call takes seconds. Written to the
output: curation.md and curation.json.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from radio_distill.config import DataConfig
from radio_distill.curation.clusters import Clusters, balanced, level_sizes, next_level
from radio_distill.curation.duplicates import groups_of, kept_of_groups, near_pairs
from radio_distill.curation.summaries import Summaries, encode_shards, read_summaries
from radio_distill.data.order import random_stream
from radio_distill.data.shards import write_shards
from radio_distill.data.sources import open_sources
from radio_distill.errors import ConfigError
from radio_distill.evals.encoder import teacher_encoder
from radio_distill.report.curation import effective_number
from radio_distill.report.tables import Column, Table, print_tables, render
from radio_distill.system.files import write_text
from stages.arguments import run_script
from teachers import build_teacher
from teachers.names import teacher_named

CPU = torch.device("cpu")
KINDS = ("half", "jpeg 30", "mirrored", "crop 80 %", "crop 60 %")
THRESHOLDS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
LONGEST, FALL = 40, 0.85
"""Images of the most frequent class, and of each class in relation to the one before."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("classes", type=Path, metavar="CLASS_FOLDERS")
    parser.add_argument("photographs", type=Path, metavar="PHOTOGRAPHS")
    names = ["vits14_packaged", "efficientnet_lite0_packaged"]
    parser.add_argument("--teachers", nargs="+", default=names, metavar="TEACHER")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="N")
    parser.add_argument("--keep", type=int, default=80, help="images of a long tail (default: 80)")
    parser.add_argument("--size", type=int, default=224, metavar="PX")
    parser.add_argument("--output", type=Path, default=Path("runs/curation"), metavar="DIR")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    tables = []
    planted = [_plant(it, arguments.output) for it in (arguments.classes, arguments.photographs)]
    for name in arguments.teachers:
        found = [_summaries(shards, name, arguments) for _, shards, _ in planted]
        for (source, _, keys), summaries in zip(planted, found, strict=True):
            title = f"Copies among {len(keys)} images of {source.name}: {name}"
            tables.append(copies_table(title, keys, summaries))
        tables.append(balance_table(name, planted[0][2], found[0], arguments))
    print_tables(tables)
    write_text(arguments.output / "curation.md", render(tables, "markdown"))
    plain = {table.title: [list(row) for row in table.rows] for table in tables}
    write_text(arguments.output / "curation.json", json.dumps(plain, indent=1))
    return 0


Key = tuple[str, int, str]
"""Class, number of the original, and kind of the copy; empty for the original itself."""


def _plant(source: Path, output: Path) -> tuple[Path, Path, list[Key]]:
    """Make shards of a folder's images and their copies; returns source, shards and keys."""
    paths = sorted(source.rglob("*.jpg"))
    folder = output / "images" / sha256(str(source).encode()).hexdigest()[:8]
    keys: list[Key] = []
    for number, path in enumerate(paths):
        images = {"": Image.open(path).convert("RGB")}
        if number % 4 == 0:
            kind = KINDS[number // 4 % len(KINDS)]
            images[kind] = copy_of(images[""], kind, number)
        for kind, image in images.items():
            keys.append((path.parent.name, number, kind))
            place = folder / f"{len(keys):06}.png"
            if not place.exists():
                folder.mkdir(parents=True, exist_ok=True)
                image.save(place, compress_level=1)
    shards = folder.with_name(f"{folder.name}-shards")
    if not shards.is_dir():
        write_shards(folder, shards, images_per_shard=100)
    return source, shards, keys


def copy_of(image: Image.Image, kind: str, seed: int) -> Image.Image:
    """Return a copy of a kind."""
    if kind == "half":
        return image.resize((image.width // 2, image.height // 2))
    if kind == "mirrored":
        return ImageOps.mirror(image)
    if kind == "jpeg 30":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=30)
        return Image.open(buffer).convert("RGB")
    side = (int(kind.split()[1]) / 100) ** 0.5
    width, height = int(image.width * side), int(image.height * side)
    left, top = (random_stream(seed).random_raw(2) / 2.0**64).tolist()
    x, y = int(left * (image.width - width)), int(top * (image.height - height))
    return image.crop((x, y, x + width, y + height))


def _summaries(shards: Path, name: str, arguments: argparse.Namespace) -> Summaries:
    config = DataConfig(shards=(str(shards),), workers=0)
    encoder = teacher_encoder(build_teacher(name, teacher_named(name)))
    size = encoder.nearest_size((arguments.size, arguments.size))
    folder = arguments.output / "summaries" / f"{name}-{size[0]}"
    opened = open_sources(config).shards
    encode_shards(opened, encoder, size, config, folder)
    return read_summaries(opened, folder)


def copies_table(title: str, keys: Sequence[Key], summaries: Summaries) -> Table:
    """Return precision and recall by threshold."""
    originals = np.array([number for _, number, _ in keys])
    kinds = np.array([kind for *_, kind in keys])
    copies = np.flatnonzero(kinds != "")
    first_of = {number: index for index, (_, number, kind) in enumerate(keys) if not kind}
    sources = np.array([first_of[originals[copy]] for copy in copies])
    rows = []
    for threshold in THRESHOLDS:
        try:
            groups = groups_of(len(keys), near_pairs(summaries.vectors, None, threshold, CPU))
        except ConfigError:  # nearly all images are as much alike
            continue
        stands = kept_of_groups(groups, summaries.pixels)
        left_out = np.flatnonzero(stands != np.arange(len(keys)))
        right = originals[left_out] == originals[stands[left_out]]
        together = groups[copies] == groups[sources]
        by_kind = (100 * together[kinds[copies] == kind].mean() for kind in KINDS)
        precision = 100 * right.mean() if len(right) else None
        largest = int(np.bincount(groups).max())
        rows.append((threshold, precision, 100 * together.mean(), *by_kind, len(left_out), largest))
    percent = ("precision (%)", "recall (%)", *KINDS)
    columns = [Column("cosine", ".2f"), *(Column(name, ".1f") for name in percent)]
    columns += [Column("left out", "d"), Column("largest group", "d")]
    return Table(title, tuple(columns), tuple(tuple(_plain(row)) for row in rows))


def _plain(row: Sequence) -> Iterator[float | int | None]:
    """Return numbers that JSON takes."""
    return (item.item() if hasattr(item, "item") else item for item in row)


WAYS: dict[str, tuple[int, ...] | None] = {
    "at random": (),
    "clusters by default": None,
    "5 clusters": (5,),
    "25 clusters": (25,),
    "50 clusters, 10 above": (50, 10),
    "80 clusters, 25 above": (80, 25),
}


def balance_table(
    name: str, keys: Sequence[Key], summaries: Summaries, arguments: argparse.Namespace
) -> Table:
    """Return how even the classes of long tails are, before and after, means over the seeds."""
    names = sorted({label for label, _, _ in keys})
    classes = np.array([names.index(label) for label, _, _ in keys])
    originals = np.array([not kind for *_, kind in keys])
    measured: dict[str, list[tuple[float, float, int, int]]] = {}
    for seed in arguments.seeds:
        members = _long_tail(classes, originals, seed)
        labels = classes[members]
        measured.setdefault("the long tail", []).append(_evenness(labels))
        points = summaries.vectors[torch.from_numpy(members)]
        for way, asked in WAYS.items():
            sizes = level_sizes(len(members)) if asked is None else asked
            levels: list[Clusters] = []
            for size in sizes:
                levels.append(next_level(points, levels, size, seed, CPU))
            labels_of = [level.labels.numpy() for level in levels]
            drawn = balanced(labels_of or [np.zeros(len(members), int)], arguments.keep, seed)
            measured.setdefault(way, []).append(_evenness(labels[drawn]))
    rows = [(way, *np.mean(values, axis=0).tolist()) for way, values in measured.items()]
    columns = (
        *(Column("kept"), Column("images", ".0f"), Column("effective classes", ".1f", "higher")),
        *(Column("largest class (%)", ".1f", "lower"), Column("classes left", ".1f", "higher")),
    )
    title = f"Balance of long tails of {len(names)} classes, {len(arguments.seeds)} seeds: {name}"
    return Table(title, columns, tuple(rows))


def _long_tail(classes: np.ndarray, originals: np.ndarray, seed: int) -> np.ndarray:
    """Draw images whose classes are as frequent as ``LONGEST * FALL ** rank``, sorted."""
    draws, chosen = random_stream(seed), []
    order = np.argsort(draws.random_raw(classes.max() + 1), kind="stable")
    for rank, label in enumerate(order):
        members = np.flatnonzero((classes == label) & originals)
        shuffled = members[np.argsort(draws.random_raw(len(members)), kind="stable")]
        chosen.append(shuffled[: max(1, round(LONGEST * FALL**rank))])
    return np.sort(np.concatenate(chosen))


def _evenness(labels: np.ndarray) -> tuple[int, float, float, int]:
    """Return the images, exp(entropy) of the classes, the largest one's share in %, the classes."""
    shares = np.bincount(labels) / len(labels)
    number = len(np.unique(labels))
    return len(labels), effective_number(shares), 100 * float(shares.max()), number


if __name__ == "__main__":
    sys.exit(run_script(sys.modules[__name__]))
