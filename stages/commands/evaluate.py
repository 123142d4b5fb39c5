"""Score students, what they were before training, their teachers, and any public model.

    radio-distill eval runs/demo/stage3-tile --teachers --untrained
    radio-distill eval runs/mine/stage2 runs/other/stage2 --output two.jsonl
    radio-distill eval runs/mine/stage1/checkpoints/step-*
    radio-distill eval --models dinov2_l_reg clip=open_clip:ViT-B-16/openai \
        sharp=dinov2_l_reg+featsharp:2 --evaluation.benchmarks '[knn]' --evaluation.labels ~/flowers
    radio-distill eval runs/mine --suite quick --evaluation.data '{voc: ~/VOCdevkit, coco: ~/coco}'

The recipe is each checkpoint's own; every field of its section `evaluation` can be set anew
(--evaluation.limit 50). Checkpoints that are scored together must be asked the same: where their
sections differ in what a benchmark reads, nothing is scored. The scores go to `scores.jsonl` in the
run folder of each, one line a number, with run, stage and step, and `radio-distill score` makes
tables of them. A student is encoded at the size asked for, as `radio_distill.load` does.

A model is a preset (`radio-distill list teachers`), PRESET:WEIGHTS, SOURCE:MODEL (`radio-distill
list sources`) such as student:runs/mine, or a teacher of --recipe; +UPSAMPLER:FACTOR[:FILE] puts it
behind an upsampler. NAME= before it is what tables call it. Models are asked what the first run is
asked; without a run, what --recipe says, or `evaluation` at its defaults.

A suite asks every benchmark whose data is named: `published` those of FeatSharp's Table 2 as their
protocols have it, `quick` all at small size, in minutes, for the order of models.

Each benchmark's scores are written as soon as they are there. What is there already, of the same
weights and asked the same, is not scored again: a command that was stopped goes on where it was.
Several processes (torchrun --nproc-per-node 8 -m stages.cli eval …) share the images.
"""

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import get_args

import yaml

from radio_distill.config import (
    EngineConfig,
    EvaluationConfig,
    Recipe,
    TeacherConfig,
    build,
    dump,
    override,
    plain_teacher,
)
from radio_distill.errors import ConfigError
from radio_distill.evals.scores import read_scores
from radio_distill.evals.subjects import SCORES
from radio_distill.report.gain_tables import headline_table, score_tables
from radio_distill.report.tables import print_tables
from radio_distill.types import Suite

from ..arguments import add_trust_argument
from ..recipes import load_recipe

TAKES_FIELDS = True


@dataclass(frozen=True)
class Sections:
    """The sections of a recipe that models are scored by, where there is none."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill eval``."""
    add = parser.add_argument
    add_trust_argument(parser)
    add(
        "runs",
        nargs="*",
        type=Path,
        help="folders of runs (their last stage), of stages (their newest checkpoint), checkpoints",
    )
    add(
        "--models",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="[NAME=]PRESET or [NAME=]SOURCE:MODEL, with +UPSAMPLER:FACTOR behind an upsampler",
    )
    add("--recipe", help="what models are asked, and teachers that may be named, without a run")
    add("--teachers", action="store_true", help="score the teachers too")
    add("--untrained", action="store_true", help="score an untrained student too")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"(default: {SCORES} of each run, of models here)",
    )
    add(
        "--labels",
        nargs="+",
        metavar="NAME",
        help="what tables call them, one for each (default: STAGE, or RUN/STAGE/step-N)",
    )
    add(
        "--head",
        default="",
        metavar="TEACHER",
        help="take the students' summary from this head, with the teacher's texts",
    )
    add_suite_argument(parser)
    add("--again", action="store_true", help="score anew what is there already")


def add_suite_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--suite``."""
    parser.add_argument(
        "--suite",
        choices=get_args(Suite),
        help="benchmarks whose data is named: as published, or quick at small size (minutes); "
        "--evaluation.benchmarks takes some of them",
    )


def run(arguments: argparse.Namespace) -> int:
    """Score what is asked for, and show the numbers."""
    from radio_distill.data.find import say_once
    from radio_distill.system.distributed import choose_device, join, world_from
    from radio_distill.weights.files import find_checkpoint

    from .named_models import named_models
    from .scoring import check_labels, score_checkpoints, score_models

    if not (arguments.runs or arguments.models):
        raise ConfigError("nothing to score: name a run, or --models")
    of_runs = ("teachers", "untrained", "head")
    if not arguments.runs and (given := [name for name in of_runs if getattr(arguments, name)]):
        raise ConfigError(f"--{given[0]} is of runs, and none is named; drop it, or name a run")
    if arguments.runs and arguments.recipe:
        raise ConfigError("--recipe is for models without a run; runs have recipes of their own")
    for path in arguments.runs:
        if (path / "config.json").is_file():
            raise ConfigError(
                f"{path} is a model and no run: score it as --models "
                f"{shlex.quote(f'student:{path}')}, or, for one in timm's format without heads, "
                f"{shlex.quote(f'timm:local-dir:{path}')}"
            )
    checkpoints = [find_checkpoint(path) for path in arguments.runs]
    check_labels(arguments.labels, len(checkpoints))
    suited = partial(in_suite, arguments.suite, fields=arguments.fields)
    evaluations = [suited(evaluation_with(one.recipe, arguments.fields)) for one in checkpoints]
    asked: Recipe | Sections
    if checkpoints:
        asked = replace(checkpoints[0].recipe, evaluation=evaluations[0])
    else:
        if arguments.recipe:
            recipe = load_recipe(arguments.recipe, arguments.fields)
            teachers = {name: plain_teacher(recipe, name) for name in recipe.teachers}
            asked = replace(recipe, teachers=teachers)
        else:
            asked = build(Sections, override({}, arguments.fields))
        asked = replace(asked, evaluation=suited(asked.evaluation))
    for line in unread_data(asked.evaluation, arguments.fields):
        say_once(line)
    models = named_models(arguments.models, asked.teachers)
    world = world_from(os.environ)
    device = choose_device(asked.engine.device, world)
    join(world, device)
    paths = []
    if checkpoints:
        paths += score_checkpoints(
            checkpoints,
            evaluations,
            arguments.teachers,
            arguments.untrained,
            arguments.output,
            arguments.labels or (),
            arguments.again,
            arguments.head,
        )
    if models:
        paths.append(arguments.output or Path(SCORES))
        score_models(models, asked.evaluation, device, paths[-1], arguments.again)
    if not world.is_main:
        return 0
    written = [path for path in dict.fromkeys(paths) if path.exists()]
    if not written:
        names = ", ".join(asked.evaluation.benchmarks)
        raise ConfigError(f"nothing was scored: none of these can be asked {names}")
    show(*written)
    return 0


def evaluation_with(recipe: Recipe, fields: Sequence[str]) -> EvaluationConfig:
    """Return a recipe's section ``evaluation`` with ``evaluation.field=value`` applied."""
    data = override(yaml.safe_load(dump(recipe)), fields)
    changed: Recipe = build(Recipe, data)
    return changed.evaluation


def chosen_benchmarks(evaluation: EvaluationConfig, fields: Sequence[str]) -> tuple[str, ...]:
    """Return the benchmarks that fields of the command line take of a suite; none for all."""
    is_chosen = any(field.startswith("evaluation.benchmarks") for field in fields)
    return tuple(evaluation.benchmarks) if is_chosen else ()


def unread_data(evaluation: EvaluationConfig, fields: Sequence[str]) -> list[str]:
    """Return a line for each place of data on the command line that no benchmark asked reads."""
    from radio_distill.evals.run import BENCHMARKS

    def reading(names: Sequence[str], given: set[str]) -> list[str]:
        return [name for name in names if given & {*BENCHMARKS.get(name).sources.values()}]

    lines = []
    for path in dict.fromkeys(one.partition("=")[0] for one in fields):
        section, _, source = path.partition(".")
        given = {f"data.{name}" for name in evaluation.data} if source == "data" else {source}
        is_place = source.partition(".")[0] in ("images", "labels", "segmentation", "data")
        if section != "evaluation" or not is_place or reading(evaluation.benchmarks, given):
            continue
        if others := reading(BENCHMARKS.names(), given):
            lines.append(
                f"{path} is read by none of {', '.join(evaluation.benchmarks)}; name one that does "
                f"in --evaluation.benchmarks: {', '.join(others)}"
            )
    return lines


def in_suite(
    suite: Suite | None, evaluation: EvaluationConfig, fields: Sequence[str]
) -> EvaluationConfig:
    """Return what a suite asks, and say which of its benchmarks have no data.

    ``fields`` of the command line, if they name benchmarks, take those alone.
    """
    if suite is None:
        return evaluation
    from radio_distill.data.find import say_once
    from radio_distill.evals.suites import with_suite

    asked, left_out = with_suite(evaluation, suite, chosen_benchmarks(evaluation, fields))
    if left_out:
        reasons = "; ".join(
            f"{', '.join(name for name in left_out if left_out[name] == reason)} ({reason})"
            for reason in dict.fromkeys(left_out.values())
        )
        say_once(f"suite {suite}: {', '.join(asked.benchmarks)}; left out: {reasons}")
    return asked


def show(*paths: Path) -> None:
    """Print all scores of some files, a table for each group."""
    scores = read_scores(paths)
    read = scores.results, scores.definitions, scores.measured
    print_tables([headline_table(*read), *score_tables(*read)])
    for text in (*scores.notes, *(f"scores: {path}" for path in paths)):
        print(text)
