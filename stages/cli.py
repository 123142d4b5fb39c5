"""``radio-distill``: one command for everything; each sub-command lives in a file of its own.

Nothing heavy is imported before a sub-command runs, so ``--help`` answers at once.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

if __package__ in (None, ""):  # run as a file: put the checkout, and only it, first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from radio_distill import __version__
from radio_distill.errors import ConfigError
from radio_distill.registry import nearest
from stages.arguments import Parser, run_command, run_module

COMMANDS = {
    "demo": (
        "stages.commands.demo",
        "run the whole path on real photographs: train, score, report",
    ),
    "upsample": ("stages.commands.upsample", "a teacher's features of your photographs, finer"),
    "init": ("stages.commands.init", "write a recipe to begin with"),
    "plan": ("stages.commands.plan", "what a recipe costs, before anything runs"),
    "train": ("stages.commands.train", "train stages of a recipe, one after another"),
    "eval": ("stages.commands.evaluate", "score a student, or the teachers"),
    "sweep": (
        "stages.commands.sweep",
        "stage 3 and scores for several upsamplers, and their gain table",
    ),
    "fit-upsampler": ("stages.fit_upsampler", "fit an upsampler to a teacher, and measure it"),
    "convert-upsampler": (
        "stages.commands.convert_upsampler",
        "use FeatUp's or FeatSharp's checkpoint",
    ),
    "score": ("stages.commands.score", "gain table (Δm) of scores"),
    "export": ("stages.commands.export", "write a student so that transformers, timm, ... load it"),
    "report": ("stages.commands.report", "one HTML page of a run"),
    "upsampler-report": (
        "stages.commands.upsampler_report",
        "one HTML page that compares upsamplers",
    ),
    "mode-switching": (
        "stages.commands.mode_switching",
        "what students see in one image at many sizes",
    ),
    "shards": ("stages.commands.shards", "make shards of a folder of images, or check shards"),
    "curate": (
        "stages.commands.curate",
        "which images of shards to train on: no duplicates, balanced, nothing that scores are of",
    ),
    "data": ("stages.commands.data", "published data sets: list them, or check a folder of one"),
    "slurm": ("stages.commands.submission", "submit the stages of a recipe to Slurm"),
    "list": (
        "stages.commands.listing",
        "names: teachers, upsamplers, normalizers, benchmarks, recipes",
    ),
    "fields": ("stages.commands.fields", "every field of a recipe, with unit and default"),
    "doctor": ("stages.commands.doctor", "check this machine and this installation"),
}


def build_parser() -> Parser:
    """Make the top parser; sub-commands parse their own arguments."""
    width = max(map(len, COMMANDS)) + 2
    listing = "\n".join(f"  {name:{width}}{text}" for name, (_, text) in COMMANDS.items())
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
    module = import_module(COMMANDS[name][0])
    return run_module(module, argv, prog=f"radio-distill {name}")


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
