"""Recipes on command lines: found, loaded, and named again in messages. Imports no torch."""

import argparse
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from radio_distill.config import Recipe, for_stage, load
from radio_distill.config.recipes import find_recipe
from radio_distill.errors import ConfigError
from radio_distill.stage import Stage, check_has_stage, resolve_stage
from teachers import teacher_specs

from .arguments import add_training_arguments


@dataclass(frozen=True)
class Asked:
    """The words that named a recipe on a command line, for the commands in messages."""

    recipe: str
    fields: tuple[str, ...] = ()
    """As ``field.name=value``."""

    def flags(self, *without: str) -> list[str]:
        """Return the fields as arguments, but for those that begin with one of some texts."""
        words = []
        for field in self.fields:
            if not field.startswith(without):
                name, _, value = field.partition("=")
                words += [f"--{name}", value]
        return words

    def train(self, stage: str) -> str:
        """Return the command that trains a stage, as it can be pasted."""
        words = ["radio-distill", "train", self.recipe, "--stages", stage, *self.flags()]
        return shlex.join(words)


def load_recipe(name: str, overrides: Sequence[str] = (), stage: str = "") -> Recipe:
    """Load a recipe by name or path, with overrides of the form ``field.name=value``."""
    return load(find_recipe(name), overrides, stage)


def describe_stage(recipe: Recipe, name: str) -> Stage:
    """Resolve a stage as far as its recipe alone says; what is `auto` stays so.

    Raises ConfigError or WeightsError for a teacher that cannot be described, and for one that
    cannot give what a partition asks of it.
    """
    return resolve_stage(recipe, name, teacher_specs(recipe, name))


def untrained_teachers(
    recipe: Recipe, name: str, before: Collection[str], asked: Asked
) -> Iterator[str]:
    """Say which students of earlier stages teach a stage, and are neither there nor trained before.

    Args:
        recipe: whose stage it is.
        name: of the stage.
        before: stages, or their folders, that are trained before.
        asked: how the recipe was named on the command line, for the command in the line.
    """
    for teacher, config in for_stage(recipe, name).teachers.items():
        stage = recipe.teachers[teacher].stage
        has_weights = any(Path(config.weights, "checkpoints").glob("step-*"))
        if stage and stage not in before and not has_weights:
            yield (
                f"teachers.{teacher} is the student of {stage}, and there is no checkpoint in "
                f"{config.weights}; train that stage first: {asked.train(stage)}"
            )


def add_stage_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a stage script and ``radio-distill train`` take."""
    add_training_arguments(parser)
    parser.add_argument(
        "--teacher-upsampler", metavar="NAME", help="upsampler of the upsampled teachers"
    )


def recipe_from(
    arguments: argparse.Namespace, fields: Sequence[str], own_stage: str = ""
) -> tuple[Recipe, Asked]:
    """Load the recipe that parsed arguments and further ``field.name=value`` describe.

    ``own_stage`` is the stage of a script that trains only one; fields may call it ``stage``.
    """
    overrides, target = list(fields), own_stage or "stage3"
    if arguments.teacher_upsampler:
        from upsamplers import UPSAMPLERS

        UPSAMPLERS.get(arguments.teacher_upsampler)  # an unknown name ends here
        overrides.insert(0, f"stages.{target}.upsampler.name={arguments.teacher_upsampler}")
    recipe = load_recipe(arguments.recipe, overrides, own_stage)
    if arguments.teacher_upsampler:
        check_has_stage(recipe, target)
        if not any(item.upsample for item in recipe.stages[target].partitions):
            raise ConfigError(
                f"--teacher-upsampler: no partition of {target} upsamples a teacher; name some in "
                f"stages.{target}.partitions.N.upsample"
            )
    named = [
        f"stages.{own_stage}{item[5:]}" if item.startswith("stage.") else item for item in overrides
    ]
    return recipe, Asked(arguments.recipe, tuple(named))
