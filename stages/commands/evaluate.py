"""Score students, what they were before training, and their teachers.

    radio-distill eval runs/demo/stage3-tile --teachers --untrained
    radio-distill eval runs/mine/stage2 runs/other/stage2 --output two.jsonl
    radio-distill eval runs/mine/stage1/checkpoints/step-*

The recipe is each checkpoint's own; every field of its section `evaluation` can be set anew
(--evaluation.limit 50). Checkpoints that are scored together must be asked the same: where their
sections differ in what a benchmark reads, nothing is scored. The scores go to `scores.jsonl` in the
run folder of each, one line a number, with run, stage and step, and `radio-distill score` makes
tables of them. A student is encoded at the size asked for, as `radio_distill.load` does.
"""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from radio_distill.config import EvaluationConfig, Recipe, build, dtypes_of, dump, override
from radio_distill.errors import ConfigError
from radio_distill.evals.scores import SCORES
from radio_distill.evals.subjects import UNTRAINED

from ..arguments import add_trust_argument, check_output, run_script
from ..common import warn_of_emulation

if TYPE_CHECKING:
    from radio_distill.protocols import Teacher
    from radio_distill.train.checkpoint import Checkpoint
    from radio_distill.types import Score

logger = logging.getLogger(__name__)

TAKES_FIELDS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill eval``."""
    add_trust_argument(parser)
    parser.add_argument(
        "checkpoints",
        nargs="+",
        type=Path,
        help="folders of runs (their last stage), of stages (their newest checkpoint), checkpoints",
    )
    parser.add_argument("--teachers", action="store_true", help="score the teachers too")
    parser.add_argument("--untrained", action="store_true", help="score an untrained student too")
    parser.add_argument("--output", type=Path, help=f"file (default: {SCORES} in each run folder)")
    # Taken out of the command line with the fields, of which `name` is one.
    parser.add_argument(
        "--name",
        help="what tables call a checkpoint, once for each (default: STAGE, or RUN/STAGE/step-N)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Score what is asked for, and show the numbers."""
    from radio_distill.loading import find_checkpoint

    names, fields = names_in(arguments.fields)
    found = [find_checkpoint(path) for path in arguments.checkpoints]
    if names and len(names) != len(found):
        raise ConfigError(f"--name: {len(names)} for {len(found)} checkpoints; give one for each")
    if len(set(names)) < len(names):
        raise ConfigError(f"--name: two checkpoints are called alike ({', '.join(names)})")
    evaluations = [evaluation_with(checkpoint.recipe, fields) for checkpoint in found]
    paths = score_checkpoints(
        found, evaluations, arguments.teachers, arguments.untrained, arguments.output, names
    )
    show(*paths)
    return 0


def names_in(fields: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take labels, ``name=LABEL``, out of recipe fields; returns them, and the other fields."""
    names = [field.partition("=")[2] for field in fields if field.startswith("name=")]
    return names, [field for field in fields if not field.startswith("name=")]


def evaluation_with(recipe: Recipe, fields: Sequence[str]) -> EvaluationConfig:
    """Return a recipe's section ``evaluation`` with ``evaluation.field=value`` applied."""
    data = override(yaml.safe_load(dump(recipe)), fields)
    changed: Recipe = build(Recipe, data)
    return changed.evaluation


def score_checkpoints(
    found: "Sequence[Checkpoint]",
    evaluations: Sequence[EvaluationConfig],
    teachers: bool = False,
    untrained: bool = False,
    output: Path | None = None,
    names: Sequence[str] = (),
) -> list[Path]:
    """Score checkpoints, each with its own teachers; returns the files that the scores went to.

    Args:
        found: of one run or of several.
        evaluations: what each is asked.
        teachers: score their teachers too, each once.
        untrained: score what their students were before training too, each once.
        output: one file for all; None for that of each run.
        names: what tables call them; empty for their own names.

    Raises:
        ConfigError: they are not asked the same, or their teachers differ under one name.
    """
    from radio_distill.evals.scores import write_scores
    from radio_distill.system.distributed import World, choose_device

    from ..build import build_teachers
    from ..upsampler_files import changed_since
    from .scoring import encoder_of, score, targets_for, teacher_encoder
    from .subjects import run_folder, student_subject, teacher_subject, untrained_subject

    check_alike(found, evaluations)
    for line in (line for checkpoint in found for line in changed_since(checkpoint)):
        logger.warning("%s; what is scored is the student as it was trained", line)
    for checkpoint in found:
        check_scores_file(output or run_folder(checkpoint) / SCORES)
    paths: list[Path] = []
    known: dict[str, Teacher] = {}
    recipe: Recipe | None = None
    references: dict[str, list[Score]] = {}
    for index, (checkpoint, evaluation) in enumerate(zip(found, evaluations, strict=True)):
        device = choose_device(checkpoint.recipe.engine.device, World())
        if recipe is None or recipe.teachers != checkpoint.recipe.teachers:
            dtypes = dtypes_of(checkpoint.recipe)
            del dtypes["engine.precision"]  # students are scored in float32, whatever they saw
            warn_of_emulation(dtypes, device)
            known = build_teachers(checkpoint.recipe, device)
        recipe = checkpoint.recipe
        paths.append(output or run_folder(checkpoint) / SCORES)
        subject = student_subject(checkpoint, names[index] if names else "")
        targets = targets_for(checkpoint, evaluation, known)
        label = f"{subject.run}/{subject.title} at step {subject.step}"
        encoder = encoder_of(checkpoint, device, targets=targets)
        write_scores(paths[-1], subject, score(encoder, evaluation, label))
        if untrained:
            subject = untrained_subject(checkpoint)
            if subject.weights not in references:
                encoder = encoder_of(checkpoint, device, untrained=True, targets=targets)
                references[subject.weights] = score(encoder, evaluation, UNTRAINED)
            write_scores(paths[-1], subject, references[subject.weights])
        for name, teacher in known.items() if teachers else ():
            subject = teacher_subject(checkpoint, name)
            if subject.weights not in references:
                encoder = teacher_encoder(teacher, device)
                references[subject.weights] = score(encoder, evaluation, name)
            write_scores(paths[-1], subject, references[subject.weights])
    return list(dict.fromkeys(paths))


def check_scores_file(path: Path) -> None:
    """Check that scores can be added to a file, before anything is scored.

    Raises:
        ConfigError: it cannot be written.
        DataError: it holds something else than scores.
    """
    from radio_distill.evals.scores import check_can_add

    check_output(path)
    check_can_add(path)


def check_alike(found: "Sequence[Checkpoint]", evaluations: Sequence[EvaluationConfig]) -> None:
    """Raise ConfigError where checkpoints would not be asked the same, by a benchmark or of it."""
    from .subjects import student_subject, teacher_digest

    subjects = [student_subject(checkpoint) for checkpoint in found]
    names = [f"{subject.run}/{subject.title}" for subject in subjects]
    first = _asked(evaluations[0])
    for name, evaluation in zip(names[1:], evaluations[1:], strict=True):
        for field, value in _asked(evaluation).items():
            if value != first.get(field, value):
                wanted = shlex.quote(_yaml(first[field]))
                raise ConfigError(
                    f"{field} is {_yaml(first[field])} in the recipe of {names[0]} and "
                    f"{_yaml(value)} in that of {name}, so that their scores could not be "
                    f"compared; set it for all, for instance --{field} {wanted}"
                )
    if "fidelity" not in evaluations[0].benchmarks:
        return
    others = [benchmark for benchmark in evaluations[0].benchmarks if benchmark != "fidelity"]
    for name, checkpoint in zip(names[1:], found[1:], strict=True):
        for teacher in checkpoint.teachers.keys() & found[0].teachers.keys():
            if teacher_digest(checkpoint, teacher) != teacher_digest(found[0], teacher):
                raise ConfigError(
                    f"teacher {teacher!r} of {names[0]} and of {name} are not the same, so that "
                    "fidelity to them could not be compared; leave it out "
                    f"(--evaluation.benchmarks {shlex.quote(_yaml(others))}), or score them apart"
                )


def _asked(evaluation: EvaluationConfig) -> dict[str, Any]:
    """Return those fields of a recipe that its benchmarks read."""
    from radio_distill.evals.run import BENCHMARKS

    fields = {"limit"}
    for name in evaluation.benchmarks:
        fields |= set(BENCHMARKS.get(name).sources.values())
    asked = {"evaluation.benchmarks": list(evaluation.benchmarks)}
    for field in sorted(fields):
        value = getattr(evaluation, field)
        is_place = isinstance(value, str) and os.path.exists(value)
        asked[f"evaluation.{field}"] = os.path.realpath(value) if is_place else value
    for name in evaluation.benchmarks:
        asked[f"evaluation.options.{name}"] = evaluation.options.get(name, {})
    return asked


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def show(*paths: Path) -> None:
    """Print all scores of some files, a table for each group."""
    from radio_distill.evals.scores import read_scores
    from radio_distill.report.gain_tables import score_tables
    from radio_distill.report.tables import print_tables

    scores = read_scores(paths)
    print_tables(score_tables(scores.results, scores.definitions, scores.measured))
    for text in (*scores.notes, *(f"scores: {path}" for path in paths)):
        print(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run as a script; returns the exit status."""
    return run_script(sys.modules[__name__], argv)
