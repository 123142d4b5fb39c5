"""Make shards of a folder of pictures, or check shards.

    radio-distill shards pictures/ data/pictures
    radio-distill shards --check data/pictures

Every picture becomes one sample of a webdataset tar, its bytes unchanged. A text file of the same
name beside a picture is kept as its caption, and with --labels the name of its folder as its label.
"""

import argparse
from pathlib import Path

from radio_distill.errors import ConfigError


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
    raise NotImplementedError


def _check(source: str) -> int:
    raise NotImplementedError
