"""Students and teachers of checkpoints as encoders under test, their scores, and their gains.

An untrained student has the architecture and heads of a trained one and random weights: what any
student is measured against.
"""

import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from radio_distill.config import EvaluationConfig, dtypes_of
from radio_distill.errors import ConfigError, DataError
from radio_distill.evals.checkpoint_subjects import (
    run_folder,
    student_subject,
    teacher_digest,
    teacher_subject,
    untrained_subject,
)
from radio_distill.evals.encoder import Encoder, Target, student_encoder, teacher_encoder
from radio_distill.evals.fidelity import targets_of
from radio_distill.evals.gain import MultiTaskGain, multi_task_gain
from radio_distill.evals.run import BENCHMARKS, evaluate
from radio_distill.evals.scores import check_can_add, read_scores, write_scores
from radio_distill.evals.subjects import SCORES, UNTRAINED, Subject
from radio_distill.models.backbone import as_encoder
from radio_distill.models.heads import DistilledStudent, build_student
from radio_distill.normalize.normalizers import normalizers_of
from radio_distill.protocols import Teacher
from radio_distill.report.gain_tables import gain_table
from radio_distill.system.distributed import World, choose_device
from radio_distill.system.files import write_text
from radio_distill.system.precision import emulation_warning
from radio_distill.system.progress import Progress
from radio_distill.train.checkpoint import Checkpoint
from radio_distill.train.restore import load_student
from radio_distill.types import Score
from radio_distill.weights.pretrained import initialise

from ..arguments import check_output
from ..build import build_teachers
from ..resume import changed_since

logger = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]


def score_checkpoints(
    checkpoints: Sequence[Checkpoint],
    evaluations: Sequence[EvaluationConfig],
    teachers: bool = False,
    untrained: bool = False,
    output: Path | None = None,
    labels: Sequence[str] = (),
) -> list[Path]:
    """Score checkpoints, each with its own teachers; returns the files that the scores went to.

    Args:
        checkpoints: of one run or of several.
        evaluations: what each is asked.
        teachers: score their teachers too, each once.
        untrained: score what their students were before training too, each once.
        output: one file for all; None for that of each run.
        labels: what tables call them; empty for their own names.

    Raises:
        ConfigError: they are not asked the same, or their teachers differ under one name; or a file
            cannot be written.
        DataError: a file that is there holds something else than scores.
    """
    check_alike(checkpoints, evaluations)
    for line in (line for checkpoint in checkpoints for line in changed_since(checkpoint)):
        logger.warning("%s; what is scored is the student as it was trained", line)
    paths = [output or run_folder(checkpoint) / SCORES for checkpoint in checkpoints]
    for path in dict.fromkeys(paths):
        check_output(path)
        check_can_add(path)
    built: dict[str, Teacher] = {}
    scores: dict[str, list[Score]] = {}
    for number, (checkpoint, evaluation) in enumerate(zip(checkpoints, evaluations, strict=True)):
        recipe, device = checkpoint.recipe, device_of(checkpoint)
        if number == 0 or recipe.teachers != checkpoints[number - 1].recipe.teachers:
            dtypes = dtypes_of(recipe)
            del dtypes["engine.precision"]  # students are scored in float32, whatever they saw
            if line := emulation_warning(dtypes, device):
                logger.warning("%s", line)
            built = build_teachers(recipe, device)
        targets = targets_for(checkpoint, evaluation, built)
        subject = student_subject(checkpoint, labels[number] if labels else "")
        text = f"{subject.run}/{subject.title} at step {subject.step}"
        tested: list[tuple[Subject, str, Callable[[], Encoder]]] = [
            (subject, text, partial(encoder_of, checkpoint, targets=targets))
        ]
        if untrained:
            untaught = partial(encoder_of, checkpoint, untrained=True, targets=targets)
            tested.append((untrained_subject(checkpoint), UNTRAINED, untaught))
        for name, teacher in built.items() if teachers else ():
            encoder = partial(teacher_encoder, teacher, device)
            tested.append((teacher_subject(checkpoint, name), name, encoder))
        for subject, text, make in tested:
            if subject.weights not in scores:
                scores[subject.weights] = score(make(), evaluation, text)
            write_scores(paths[number], subject, scores[subject.weights])
    return list(dict.fromkeys(paths))


def check_alike(checkpoints: Sequence[Checkpoint], evaluations: Sequence[EvaluationConfig]) -> None:
    """Raise ConfigError where checkpoints would not be asked the same, by a benchmark or of it."""
    subjects = [student_subject(checkpoint) for checkpoint in checkpoints]
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
    for name, checkpoint in zip(names[1:], checkpoints[1:], strict=True):
        for teacher in checkpoint.teachers.keys() & checkpoints[0].teachers.keys():
            if teacher_digest(checkpoint, teacher) != teacher_digest(checkpoints[0], teacher):
                raise ConfigError(
                    f"teacher {teacher!r} of {names[0]} and of {name} are not the same, so that "
                    "fidelity to them could not be compared; leave it out "
                    f"(--evaluation.benchmarks {shlex.quote(_yaml(others))}), or score them apart"
                )


def _asked(evaluation: EvaluationConfig) -> dict[str, Any]:
    """Return those fields of a recipe that its benchmarks read."""
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


def check_labels(labels: Sequence[str] | None, num_runs: int) -> None:
    """Raise ConfigError unless there are as many labels as runs, no two alike, or none."""
    if labels and len(labels) != num_runs:
        raise ConfigError(f"--labels: {len(labels)} for {num_runs} runs; give one for each run")
    if labels and len(set(labels)) < num_runs:
        raise ConfigError(f"--labels: two runs are called alike ({', '.join(labels)})")


def device_of(checkpoint: Checkpoint) -> torch.device:
    """Return the device that a checkpoint's recipe asks for."""
    return choose_device(checkpoint.recipe.engine.device, World())


def encoder_of(
    checkpoint: Checkpoint,
    name: str = "student",
    untrained: bool = False,
    targets: Mapping[str, Target] | None = None,
) -> Encoder:
    """Load the student of a checkpoint onto its device, or build it as before any training."""
    device = device_of(checkpoint)
    model = untrained_student(checkpoint) if untrained else load_student(checkpoint, device)
    encoder = as_encoder(model, checkpoint.recipe.student, checkpoint.teachers)
    return student_encoder(encoder.to(device).eval(), device, targets, name)


def untrained_student(checkpoint: Checkpoint) -> DistilledStudent:
    """Build the student of a checkpoint as it was before any training."""
    torch.manual_seed(checkpoint.recipe.seed)
    config, teachers = checkpoint.recipe.student, checkpoint.teachers
    return build_student(config, teachers, initialise=initialise)


def teacher_encoders(checkpoint: Checkpoint) -> list[Encoder]:
    """Build the teachers of a checkpoint and present them as encoders named ``teacher NAME``."""
    device = device_of(checkpoint)
    teachers = build_teachers(checkpoint.recipe, device).values()
    return [teacher_encoder(one, device, f"teacher {one.spec.name}") for one in teachers]


def targets_for(
    checkpoint: Checkpoint, config: EvaluationConfig, teachers: Mapping[str, Teacher]
) -> dict[str, Target]:
    """Return the teachers that a student's heads are compared with; none where nobody asks."""
    if "fidelity" not in config.benchmarks:
        return {}
    recipe = checkpoint.recipe
    return targets_of(
        teachers,
        recipe.teachers,
        config.size,
        recipe.student.patch_size,
        normalizers_of(checkpoint),
        {name: teacher_digest(checkpoint, name) for name in recipe.teachers},
    )


def score(encoder: Encoder, config: EvaluationConfig, label: str) -> list[Score]:
    """Score an encoder, with a progress bar for each benchmark."""
    with _bars(label) as report:
        return evaluate(encoder, config, report)


@contextmanager
def _bars(label: str) -> Iterator[Report]:
    """Give a callback that shows a progress bar for one benchmark after another."""
    current: list[tuple[str, Progress]] = []

    def close() -> None:
        for _, bar in current:
            bar.__exit__(None, None, None)
        current.clear()

    def report(benchmark: str, done: int, total: int) -> None:
        if not current or current[0][0] != benchmark:
            close()
            current.append((benchmark, Progress(f"{label}: {benchmark}", total).__enter__()))
        current[0][1].update(done)

    try:
        yield report
    finally:
        close()


def gain_of(
    path: Path,
    students: Sequence[Checkpoint],
    baseline: Checkpoint,
    references: bool = False,
) -> MultiTaskGain:
    """Compare some checkpoints with one of them, each together with its other seeds.

    Args:
        path: score file, or a folder of which all below it are read.
        students: checkpoints that were scored.
        baseline: one of them.
        references: show untrained students and teachers too, where they were scored.

    Raises:
        DataError: there are no scores of one of them.
    """
    scores = read_scores([path])
    labels = {}
    for student in students:
        label = scores.label_of(student_subject(student))
        if label is None:
            raise DataError(
                f"{path} has no scores of {student.folder}; run radio-distill eval {student.folder}"
            )
        labels[student.folder] = label
    shown = [label for label, of in scores.subjects.items() if of[0].reference and references]
    chosen = scores.only([*labels.values(), *shown])
    return multi_task_gain(
        chosen.results,
        labels[baseline.folder],
        chosen.definitions,
        may_lack=shown,
        remarks=chosen.remarks(),
    )


def write_gain(gain: MultiTaskGain, folder: Path) -> None:
    """Write the gain table in four formats, and say where."""
    table = gain_table(gain)
    for suffix, text in {
        "md": table.to_markdown(),
        "csv": table.to_csv(),
        "tex": table.to_latex(),
        "json": table.to_json(),
    }.items():
        write_text(folder / f"gain.{suffix}", text)
    print(f"also as Markdown, CSV, LaTeX and JSON: {folder}/gain.*")
