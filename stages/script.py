"""The command line of a script that trains one stage: ``stages/stage1.py`` and its like."""

import argparse
from collections.abc import Sequence

from radio_distill.config import Recipe
from radio_distill.system.trust import trusting_pickles

from .arguments import FIELDS_HELP, Parser, run_command
from .recipes import Asked, add_stage_arguments, recipe_from


def stage_main(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one stage from the command line; returns the exit status."""
    parser = Parser(
        prog=f"stages/{name}.py",
        description=f"Train {name} of a recipe.",
        epilog=f"{FIELDS_HELP}\nIn FIELD, `stage` stands for this stage: --stage.steps 100.",
    )
    add_stage_arguments(parser)

    def command() -> None:
        arguments, fields = parser.parse(argv, takes_fields=True)
        with trusting_pickles(arguments.trust_checkpoint):
            train_stages([name], *recipe_from(arguments, fields, name), arguments)

    return run_command(command)


def train_stages(
    names: Sequence[str], recipe: Recipe, asked: Asked, arguments: argparse.Namespace
) -> None:
    """Train stages one after another as the arguments say."""
    from .build import train_stage
    from .launch import Options

    options = Options(
        resume=arguments.resume,
        allow_changed=arguments.allow_changed_recipe,
        take_over=arguments.take_over,
        asked=asked,
    )
    for name in names:
        train_stage(name, recipe, options)
