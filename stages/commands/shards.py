"""Make shards of a folder of images, or check shards.

    radio-distill shards images/ data/images
    radio-distill shards --check data/images

Every image becomes one sample of a webdataset tar, its bytes unchanged. A text file of the same
name beside an image is kept as its caption, and with --labels the name of its class folder as its
label. What is passed over or left out is counted and said. Fields of the section data can be set:
--data.min_size and --data.max_pixels say which images are taken, --data.bands of how many bands.
"""

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path

from radio_distill.config import DataConfig, build, override, yaml_line
from radio_distill.errors import ConfigError
from radio_distill.system.progress import Progress

TAKES_FIELDS = True


@dataclass(frozen=True)
class Section:
    """The section of a recipe that has a say here."""

    data: DataConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill shards``."""
    add = parser.add_argument
    add("source", help="folder of images; with --check: shards, folder or pattern")
    add("out", nargs="?", type=Path, help="folder for the shards")
    add("--images-per-shard", type=int, default=1000, metavar="N", help="(default: %(default)s)")
    add("--labels", action="store_true", help="keep names of class folders as labels")
    add(
        "--hold-out", type=float, default=0.0, metavar="SHARE",
        help="pack a share of the images into OUT_held_out, for evaluation.images",
    )  # fmt: skip
    add("--check", action="store_true", help="read shards whole and report")


def run(arguments: argparse.Namespace) -> int:
    """Make or check shards."""
    section: Section = build(Section, override({"data": {"shards": []}}, arguments.fields))
    if arguments.check:
        return _check(arguments.source, section.data)
    if arguments.out is None:
        raise ConfigError("shards: name the folder to write to: radio-distill shards SOURCE OUT")
    return _write(arguments, section.data)


def _write(arguments: argparse.Namespace, limits: DataConfig) -> int:
    from radio_distill.data.shards import held_out_folder, write_shards

    source = Path(arguments.source)
    if not source.is_dir():
        raise ConfigError(f"shards: {source} is not a folder")
    with Progress("shards", 1) as bar:
        summary = write_shards(
            source,
            arguments.out,
            images_per_shard=arguments.images_per_shard,
            labels=arguments.labels,
            limits=limits,
            hold_out=arguments.hold_out,
            progress=bar.report,
        )
    for line in summary.describe():
        print(line)
    if summary.held_out:
        flags = ["--data.shards", yaml_line([str(arguments.out)])]
        flags += ["--evaluation.images", yaml_line(str(held_out_folder(arguments.out)))]
        print("train with", shlex.join(flags))
    return 0


def _check(source: str, config: DataConfig) -> int:
    """Print what is in the shards; the status is 1 where anything in them is bad."""
    from radio_distill.data.check import check_shards, limits_of

    with Progress("shards", 1, unit="shards") as bar:
        report = check_shards([source], config, progress=bar.report)
    print(
        f"{report.num_images} images in {report.num_shards} shards, "
        f"{report.num_bytes / 1e6:.1f} MB; {report.num_bad} bad images, "
        f"{report.left_out.total()} samples left out, {len(report.damaged)} damaged shards"
        + (f", {len(report.not_fetched)} not fetched" if report.not_fetched else "")
    )
    for sides in sorted(report.sizes, key=lambda name: int(name.rstrip("+").partition("-")[0])):
        print(f"  shortest side {sides} px: {report.sizes[sides]}")
    for name, numbers in zip(("mean", "std"), report.statistics or (), strict=False):
        print(f"  {name}: [{', '.join(f'{number:.4f}' for number in numbers)}]")
    for name in report.empty:
        print(f"no images: {name}")
    for note in report.notes:
        print(note)
    for line in report.damaged:
        print(f"damaged: {line}")
    for line in report.not_fetched:
        print(f"not fetched: {line}")
    for kind, count in sorted(report.left_out.items()):
        names = report.left_out_names[kind]
        for name in names:
            print(f"left out ({kind}): {name}")
        if count > len(names):
            print(f"left out ({kind}): {count - len(names)} more")
    for kind, lines in sorted(report.bad.items()):
        for line in lines:
            print(f"bad ({kind}): {line}")
        if limit := limits_of(kind, config):
            option = f"--{limit.split()[0]}"
            print(f"{len(lines)} {kind}: {limit}; to change it, here and in training: {option}")
    return int(not report.is_clean)
