"""Train stages of a recipe, one after another, in this process or in all processes of a launcher.

radio-distill train demo
torchrun --nproc-per-node 8 -m stages.cli train my_recipe.yaml --stages stage1 stage2
"""

import argparse

from ..recipes import add_stage_arguments, recipe_from
from ..script import train_stages

TAKES_FIELDS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill train``."""
    add_stage_arguments(parser)
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="default: all of the recipe")


def run(arguments: argparse.Namespace) -> int:
    """Train the stages; with ``--resume``, those that are complete are passed over."""
    from .missing import check_stages

    recipe, asked = recipe_from(arguments, arguments.fields)
    stages = arguments.stages or list(recipe.stages)
    check_stages(recipe, stages, asked, arguments.resume)
    train_stages(stages, recipe, asked, arguments)
    return 0
