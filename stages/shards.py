"""Make shards of a folder of pictures, or check shards.

    radio-distill shards pictures/ data/pictures
    radio-distill shards --check data/pictures

Every picture becomes one sample of a webdataset tar, its bytes unchanged. A text file of the same
name beside a picture is kept as its caption, and with --labels the name of its folder as its label.
"""

import argparse
from pathlib import Path

from radio_distill.config import DataConfig
from radio_distill.errors import ConfigError
from radio_distill.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill shards``."""
    parser.add_argument(
        "source", help="folder of pictures; with --check: shards, folder or pattern"
    )
    parser.add_argument("out", nargs="?", type=Path, help="folder for the shards")
    parser.add_argument("--images-per-shard", type=int, default=1000, metavar="N")
    parser.add_argument("--labels", action="store_true", help="keep folder names as labels")
    parser.add_argument("--check", action="store_true", help="read shards whole and report")


def run(arguments: argparse.Namespace) -> int:
    """Make or check shards."""
    if arguments.check:
        return _check(arguments.source)
    if arguments.out is None:
        raise ConfigError("shards: name the folder to write to: radio-distill shards SOURCE OUT")
    return _write(arguments)


def _write(arguments: argparse.Namespace) -> int:
    from radio_distill.data.shards import find_pictures, write_shards

    source = Path(arguments.source)
    if not source.is_dir():
        raise ConfigError(f"shards: {source} is not a folder")
    with Progress("shards", len(find_pictures(source))) as bar:
        summary = write_shards(
            source,
            arguments.out,
            images_per_shard=arguments.images_per_shard,
            labels=arguments.labels,
            progress=lambda done, total: bar.update(done),
        )
    print(f"{summary.num_images} pictures in {len(summary.shards)} shards: {arguments.out}")
    for name, reason in summary.bad.items():
        print(f"left out {name}: {reason}")
    return 0


def _check(source: str) -> int:
    """Print what is in the shards; the status is 1 where anything in them is bad."""
    from radio_distill.data.check import check_shards

    with Progress("shards", 1, unit="shards") as bar:
        report = check_shards(
            [source],
            DataConfig(shards=(source,)),
            progress=lambda done, total: bar.update(done, total=total),
        )
    print(
        f"{report.num_images} images in {report.num_shards} shards, "
        f"{report.num_bytes / 1e6:.1f} MB; {report.num_bad} bad images, "
        f"{report.left_out.total()} samples left out, {len(report.damaged)} damaged shards"
    )
    for sides in sorted(report.sizes, key=lambda name: int(name.rstrip("+").partition("-")[0])):
        print(f"  shortest side {sides} px: {report.sizes[sides]}")
    for line in report.damaged:
        print(f"damaged: {line}")
    for kind, count in sorted(report.left_out.items()):
        names = report.left_out_names[kind]
        for name in names:
            print(f"left out ({kind}): {name}")
        if count > len(names):
            print(f"left out ({kind}): {count - len(names)} more")
    for kind, lines in sorted(report.bad.items()):
        for line in lines:
            print(f"bad ({kind}): {line}")
    return int(not report.is_clean)
