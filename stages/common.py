"""What every stage does: find the recipe, check the packages, build the parts, train.

The only code that knows teachers, upsamplers and the library at once.
"""

import argparse
import itertools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from radio_distill.config import Recipe, StageConfig, describe, differences, dump, load
from radio_distill.errors import CheckpointError, ConfigError, RadioDistillError
from radio_distill.registry import nearest

if TYPE_CHECKING:
    from radio_distill.train.checkpoint import Checkpoint

RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the project."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: a path, or the name of one that comes with the project."""
    if Path(name).suffix in (".yaml", ".yml") or os.sep in name:
        if not Path(name).is_file():
            raise ConfigError(f"no recipe file {name}")
        return Path(name)
    if name not in recipe_names():
        raise ConfigError(f"unknown recipe {name!r} ({nearest(name, recipe_names())})")
    return RECIPES / f"{name}.yaml"


def load_recipe(name: str, overrides: Sequence[str] = (), stage: str = "") -> Recipe:
    """Load a recipe by name or path, with overrides of the form ``field.name=value``."""
    return load(find_recipe(name), overrides, stage)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest valid name."""

    def __init__(self, **settings: Any):
        # --stage.steps is a field, not short for --stages.
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings
        )

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage."""
        raise ConfigError(f"{message} (`{self.prog} --help` lists the arguments)")

    def parse(
        self, argv: Sequence[str] | None, takes_fields: bool
    ) -> tuple[argparse.Namespace, list[str]]:
        """Return the parsed arguments and the recipe fields as ``field.name=value``."""
        plain = list(sys.argv[1:] if argv is None else argv)
        plain, fields = split_fields(plain) if takes_fields else (plain, [])
        arguments, unknown = self.parse_known_args(plain)
        if unknown:
            flag = unknown[0].partition("=")[0]
            known = [name for action in self._actions for name in action.option_strings]
            known += [f"--{row[0]}" for row in describe()] if takes_fields else []
            raise ConfigError(f"unknown argument {flag!r} ({_nearest_flag(flag, known)})")
        return arguments, fields


def _nearest_flag(flag: str, known: list[str]) -> str:
    same_ending = [name for name in known if name.rpartition(".")[2] == flag.lstrip("-")]
    if same_ending:
        return f"did you mean {same_ending[0]}?"
    return nearest(flag, known) if len(known) < 20 else nearest(flag, known).partition(",")[0]


def split_fields(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take ``--field.name value`` and ``--field.name=value`` out of a command line.

    A field is known by the dot in its name; of those without one, by the name itself.

    Returns:
        What is left, and the fields as ``field.name=value``.
    """
    rest, fields, arguments = [], [], list(argv)
    while arguments:
        flag = arguments.pop(0)
        name, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or ("." not in name and name not in ("name", "seed")):
            rest.append(flag)
            continue
        if not equals:
            if not arguments:
                raise ConfigError(f"--{name} needs a value")
            value = arguments.pop(0)
        fields.append(f"{name}={value}")
    return rest, fields


def stage_folder(recipe: Recipe, stage: str) -> Path:
    """Return the folder of a stage, named after its upsampler too where it uses one."""
    config = stage_of(recipe, stage)
    upsampled = any(partition.upsample for partition in config.partitions)
    return recipe.folder / (f"{stage}-{config.upsampler.name}" if upsampled else stage)


def stage_of(recipe: Recipe, stage: str) -> StageConfig:
    """Return a stage's section of the recipe."""
    if stage not in recipe.stages:
        raise ConfigError(
            f"recipe {recipe.name!r} has no {stage} ({nearest(stage, list(recipe.stages))})"
        )
    return recipe.stages[stage]


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command; an error of the user's becomes one line on stderr and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("DeepSpeed", "timm", "torch", "PIL", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        return command() or 0
    except RadioDistillError as error:
        print(f"radio-distill: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("radio-distill: stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130


def run_module(module: ModuleType, argv: Sequence[str] | None, prog: str | None = None) -> int:
    """Parse the arguments of a command's module and run it.

    The module has ``add_arguments(parser)`` and ``run(arguments) -> int``. Where it takes recipe
    fields, its ``TAKES_FIELDS`` is true, ``--help`` explains them, and they arrive in
    ``arguments.fields`` as ``field.name=value``.
    """
    takes_fields = getattr(module, "TAKES_FIELDS", False)
    parser = Parser(
        prog=prog,
        description=module.__doc__,
        epilog=fields_help() if takes_fields else None,
    )
    module.add_arguments(parser)
    arguments, fields = parser.parse(argv, takes_fields)
    arguments.fields = fields
    return int(module.run(arguments) or 0)


def run_script(module: ModuleType, argv: Sequence[str] | None = None) -> int:
    """Run a command's module as a script of its own."""
    return run_command(lambda: run_module(module, argv))


def fields_help() -> str:
    """Explain every field of a recipe, for the end of ``--help``."""
    lines = ["every field of the recipe can be set, as --FIELD VALUE:"]
    for name, default, unit, text in describe():
        lines.append(f"  --{name}")
        lines.append(f"        {text} (default: {default}{' ' + unit if unit else ''})")
    return "\n".join(lines)


def add_stage_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a stage script and ``radio-distill train`` take."""
    parser.add_argument(
        "--teacher-upsampler", metavar="NAME", help="upsampler of the upsampled teachers"
    )
    parser.add_argument("--output", metavar="DIR", help="folder for run folders (default: runs)")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the stage's newest checkpoint"
    )
    parser.add_argument(
        "--allow-changed-recipe",
        action="store_true",
        help="resume although the recipe differs from the checkpoint's",
    )


def stage_main(stage: str, argv: Sequence[str] | None = None) -> int:
    """Run one stage from the command line."""
    parser = Parser(
        prog=f"stages/{stage}.py",
        description=f"Train {stage} of a recipe.",
        epilog=fields_help() + "\n\nIn FIELD, `stage` stands for this stage: --stage.steps 100.",
    )
    parser.add_argument("--recipe", default="demo", help="name or file (default: demo)")
    add_stage_arguments(parser)

    def command() -> None:
        arguments, fields = parser.parse(argv, takes_fields=True)
        recipe = recipe_from(arguments, fields, stage)
        train_stage(stage, recipe, arguments.resume, arguments.allow_changed_recipe)

    return run_command(command)


def recipe_from(arguments: argparse.Namespace, fields: Sequence[str], stage: str = "") -> Recipe:
    """Load the recipe that parsed arguments and further ``field.name=value`` describe."""
    overrides = list(fields)
    if arguments.teacher_upsampler:
        from upsamplers import UPSAMPLERS

        UPSAMPLERS.get(arguments.teacher_upsampler)  # an unknown name ends here
        target = stage or "stage3"
        overrides.insert(0, f"stages.{target}.upsampler.name={arguments.teacher_upsampler}")
    if arguments.output:
        overrides.insert(0, f"output={arguments.output}")
    return load_recipe(arguments.recipe, overrides, stage)


def train_stage(
    stage: str, recipe: Recipe, resume: bool = False, allow_changed: bool = False
) -> Path:
    """Build the parts of a stage and train it; returns the last checkpoint's folder.

    With ``resume`` a stage that is complete returns at once.
    """
    from radio_distill.train.distributed import choose_device, join, leave, world_from
    from radio_distill.train.engine import engine_name

    from .build import build_run
    from .doctor import check_packages

    check_packages()
    config = stage_of(recipe, stage)
    folder = stage_folder(recipe, stage)
    world = world_from(os.environ)
    engine_name(recipe.engine, config, world.world_size)  # a combination that cannot be ends here
    if not world.is_main:
        logging.getLogger().setLevel(logging.WARNING)
    device = choose_device(recipe.engine.device, world)
    join(world, device)
    try:
        checkpoint = _checkpoint_to_resume(folder, recipe, stage, allow_changed) if resume else None
        if checkpoint is not None and checkpoint.step >= config.steps:
            logging.info("%s is complete: %s", stage, checkpoint.folder)
            return checkpoint.folder
        if world.is_main:
            prepare_folder(folder, recipe, fresh=checkpoint is None)
        from radio_distill.train.loop import train

        last = train(build_run(stage, recipe, folder, world, device, checkpoint))
        logging.info("%s: %s", stage, last)
        return last
    finally:
        leave()


def changes_that_matter(old: Recipe, new: Recipe, stage: str) -> list[str]:
    """List the fields in which two recipes differ and that change a stage's numbers."""
    without_effect = ("output:", "log.", "evaluation.", "data.workers:", "data.max_bad_share:")
    return [
        line
        for line in differences(old, new)
        if not line.startswith(without_effect)
        and (not line.startswith("stages.") or line.startswith(f"stages.{stage}."))
    ]


def _checkpoint_to_resume(
    folder: Path, recipe: Recipe, stage: str, allow_changed: bool
) -> "Checkpoint | None":
    from radio_distill.train import checkpoint as checkpoints

    checkpoint = checkpoints.newest(folder / "checkpoints")
    if checkpoint is None:
        logging.info("nothing to resume in %s; starting anew", folder)
        return None
    changed = changes_that_matter(checkpoint.recipe, recipe, stage)
    if changed and not allow_changed:
        raise ConfigError(
            f"the recipe differs from that of {checkpoint.folder} ({'; '.join(changed)}); "
            "take the change back, or add --allow-changed-recipe"
        )
    for line in changed:
        logging.warning("changed since the checkpoint: %s", line)
    return checkpoint


def prepare_folder(folder: Path, recipe: Recipe, fresh: bool) -> None:
    """Make a stage's folder and write the resolved recipe into it.

    A fresh run never writes over an earlier one: that one's folder is moved aside first.

    Raises:
        ConfigError: where it cannot be written.
    """
    try:
        if fresh and any((folder / "checkpoints").glob("step-*")):
            aside = next(
                path
                for number in itertools.count(1)
                if not (path := folder.with_name(f"{folder.name}.{number}")).exists()
            )
            folder.rename(aside)
            logging.info("moved the earlier run to %s (--resume would have gone on with it)", aside)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write to {folder}: {error.strerror}; choose another folder with --output"
        ) from error


def start_checkpoint(recipe: Recipe, stage: str) -> "Checkpoint | None":
    """Open the checkpoint that a stage starts from, or return None for a new student.

    Raises:
        ConfigError: where the stage before has not been run, with the command that runs it.
    """
    from radio_distill.train import checkpoint as checkpoints

    start = stage_of(recipe, stage).start_from
    if not start:
        return None
    path = stage_folder(recipe, start) if start in recipe.stages else Path(start)
    try:
        return checkpoints.find(path)
    except CheckpointError as error:
        mend = (
            f"run it first: python stages/{start}.py --recipe {recipe.name}"
            if start in recipe.stages
            else f"set stages.{stage}.start_from"
        )
        raise ConfigError(f"{stage} starts from {start}, but {error}; {mend}") from error
