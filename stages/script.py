"""The command line of a script that trains one stage: ``stages/stage1.py`` and its like."""

from collections.abc import Sequence

from radio_distill.system.trust import trusting_pickles

from .arguments import FIELDS_HELP, Parser, run_command
from .recipes import add_stage_arguments, recipe_from


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
            recipe, asked = recipe_from(arguments, fields, name)
            from .build import train_stage
            from .launch import Options

            options = Options(
                resume=arguments.resume,
                allow_changed=arguments.allow_changed_recipe,
                take_over=arguments.take_over,
                asked=asked,
            )
            train_stage(name, recipe, options)

    return run_command(command)
