"""Make shards of a folder of images, or check shards.

    radio-distill shards images/ data/images
    radio-distill shards --check data/images

Every image becomes one sample of a webdataset tar, its bytes unchanged. A text file of the same
name beside an image is kept as its caption, and with --labels the name of its class folder as its
label. What is passed over or left out is counted and said.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from radio_distill.config import DataConfig, build, parse_yaml
from radio_distill.errors import ConfigError
from radio_distill.system.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill shards``."""
    parser.add_argument("source", help="folder of images; with --check: shards, folder or pattern")
    parser.add_argument("out", nargs="?", type=Path, help="folder for the shards")
    parser.add_argument("--images-per-shard", type=int, default=1000, metavar="N")
    parser.add_argument(
        "--labels", action="store_true", help="keep names of class folders as labels"
    )
    parser.add_argument(
        "--hold-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="pack a share of the images into OUT_held_out, for evaluation.images",
    )
    defaults = DataConfig(shards=())
    parser.add_argument(
        "--data.min_size",
        type=int,
        default=defaults.min_size,
        metavar="PX",
        dest="min_size",
        help=f"shortest side that an image must have (default {defaults.min_size})",
    )
    parser.add_argument(
        "--data.max_pixels",
        type=int,
        default=defaults.max_pixels,
        metavar="N",
        dest="max_pixels",
        help=f"largest image that is taken (default {defaults.max_pixels})",
    )
    parser.add_argument(
        "--data.bands", metavar="N", dest="bands", default=defaults.bands,
        help="bands of an image: others than 3 are arrays (.npy, .npz) or multi-band TIFFs",
    )  # fmt: skip
    parser.add_argument(
        "--data.band_range", metavar="[[LOW, HIGH]]", dest="band_range", default="[]",
        help="numbers that become 0 and 1, of all bands or of each (default: 8 or 16 bits)",
    )  # fmt: skip
    parser.add_argument(
        "--data.index",
        metavar="FOLDER",
        dest="index",
        help="with --check: folder for the indexes of shards (default: beside them)",
    )
    parser.add_argument(
        "--data.cache", metavar="FOLDER", dest="cache", default=defaults.cache,
        help="with --check: folder for copies of shards that lie elsewhere",
    )  # fmt: skip
    parser.add_argument(
        "--data.cache_gb", metavar="GB", dest="cache_gb", type=float, default=defaults.cache_gb,
        help=f"size that the copies may take together (default {defaults.cache_gb:g})",
    )  # fmt: skip
    parser.add_argument(
        "--data.commands", dest="commands", action="store_true",
        help="with --check: let pipe: run a shell",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="read shards whole and report")


def run(arguments: argparse.Namespace) -> int:
    """Make or check shards."""
    asked = {
        "bands": parse_yaml(str(arguments.bands)),
        "band_range": parse_yaml(arguments.band_range),
    }
    limits = replace(
        build(DataConfig, {"shards": [], **asked}, "data"),
        min_size=arguments.min_size,
        max_pixels=arguments.max_pixels,
        index=(arguments.index,) if arguments.index else "auto",
        cache=arguments.cache,
        cache_gb=arguments.cache_gb,
        commands=arguments.commands,
    )
    if limits.min_size < 1 or limits.max_pixels < 1 or limits.cache_gb <= 0:
        raise ConfigError(
            "shards: --data.min_size and --data.max_pixels are at least 1, and --data.cache_gb is "
            "above 0"
        )
    if arguments.check:
        return _check(arguments.source, limits)
    if arguments.out is None:
        raise ConfigError("shards: name the folder to write to: radio-distill shards SOURCE OUT")
    return _write(arguments, limits)


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
        print(
            f"train with --data.shards '[{arguments.out}]' "
            f"--evaluation.images {held_out_folder(arguments.out)}"
        )
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
