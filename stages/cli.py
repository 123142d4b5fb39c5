"""``radio-distill``: one command for everything; each sub-command lives in a file of its own.

Nothing heavy is imported before a sub-command runs, so ``--help`` answers at once.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

if __package__ in (None, ""):  # run as a file: put the checkout, and only it, first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from radio_distill import __version__
from radio_distill.errors import ConfigError
from radio_distill.registry import nearest
from stages.arguments import Parser, run_command, run_module

COMMANDS = {
    "demo": "run the whole path on real photographs: train, score, report",
    "upsample": "a teacher's features of your photographs, finer",
    "init": "write a recipe to begin with",
    "plan": "what a recipe costs, before anything runs",
    "train": "train stages of a recipe, one after another",
    "eval": "score a student, or the teachers",
    "sweep": "stage 3 and scores for several upsamplers, and their gain table",
    "fit-upsampler": "fit an upsampler to a teacher, and measure it",
    "convert-upsampler": "use FeatUp's or FeatSharp's checkpoint",
    "score": "gain table (Δm) of scores",
    "export": "write a student so that transformers, timm, ... load it",
    "report": "one HTML page of a run",
    "upsampler-report": "one HTML page that compares upsamplers",
    "mode-switching": "what students see in one image at many sizes",
    "shards": "make shards of a folder of images, or check shards",
    "curate": "which images of shards to train on: no duplicates, balanced, nothing that scores "
    "are of",
    "data": "published data sets: list them, or check a folder of one",
    "slurm": "submit the stages of a recipe to Slurm",
    "list": "names: teachers, upsamplers, normalizers, benchmarks, recipes",
    "fields": "every field of a recipe, with unit and default",
    "doctor": "check this machine and this installation",
}
"""What each says of itself in a line."""

_ELSEWHERE = {
    "eval": "stages.commands.evaluate",
    "fit-upsampler": "stages.fit_upsampler",
    "slurm": "stages.commands.submission",
    "list": "stages.commands.listing",
}
"""Modules that are not called like their command."""


def module_of(name: str) -> ModuleType:
    """Import the module of a command."""
    return import_module(_ELSEWHERE.get(name, f"stages.commands.{name.replace('-', '_')}"))


def build_parser() -> Parser:
    """Make the top parser; sub-commands parse their own arguments."""
    width = max(map(len, COMMANDS)) + 2
    listing = "\n".join(f"  {name:{width}}{text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="radio-distill",
        description="Train RADIO-style agglomerative vision backbones from your own teachers and "
        "images.",
        epilog=f"commands:\n{listing}\n\n`radio-distill COMMAND --help` explains each.",
        usage="radio-distill [--version] COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"radio-distill {__version__}")
    parser.add_argument("command", metavar="COMMAND", nargs="?", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def run_subcommand(name: str, argv: Sequence[str]) -> int:
    """Import a sub-command's module and run it."""
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r} ({nearest(name, list(COMMANDS))})")
    return run_module(module_of(name), argv, prog=f"radio-distill {name}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``radio-distill``; returns the exit status."""
    parser = build_parser()

    def command() -> int:
        arguments = parser.parse_args(argv)
        if arguments.command is None:
            parser.print_help()
            return 0
        return run_subcommand(arguments.command, arguments.arguments)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
