"""Students and teachers of checkpoints as encoders under test, their scores, and their gains.

An untrained student has the architecture and heads of a trained one and random weights: what any
student is measured against.
"""

import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from radio_distill.config import EvaluationConfig, dtypes_of, yaml_line
from radio_distill.errors import ConfigError, DataError
from radio_distill.evals.checkpoint_subjects import (
    run_folder,
    student_subject,
    teacher_digest,
    teacher_subject,
    untrained_subject,
)
from radio_distill.evals.encoder import (
    Encoder,
    Target,
    student_encoder,
    targets_of,
    teacher_encoder,
)
from radio_distill.evals.examples import Shown
from radio_distill.evals.gain import MultiTaskGain, multi_task_gain
from radio_distill.evals.headlines import in_order
from radio_distill.evals.run import BENCHMARKS, asked_of, check_data, evaluate, source_value
from radio_distill.evals.scores import asked_in, check_can_add, read_scores, write_scores
from radio_distill.evals.subjects import SCORES, UNTRAINED, Subject
from radio_distill.models.backbone import as_encoder
from radio_distill.models.heads import DistilledStudent, build_student
from radio_distill.normalize.normalizers import normalizers_of
from radio_distill.protocols import Teacher
from radio_distill.registry import nearest
from radio_distill.report.examples import draw, write_examples
from radio_distill.report.gain_tables import gain_table
from radio_distill.system.distributed import choose_device, current_world, run_on_main, world_from
from radio_distill.system.files import write_text
from radio_distill.system.precision import emulation_warning
from radio_distill.system.progress import Progress
from radio_distill.train.checkpoint import Checkpoint
from radio_distill.train.restore import load_student
from radio_distill.types import Score
from radio_distill.weights.pretrained import initialise
from teachers.text import text_tower

from ..arguments import check_output
from ..build import build_teachers
from ..resume import changed_since
from .named_models import NamedModel, check_model, encoder_with_text, model_under_test

logger = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]


def score_checkpoints(
    checkpoints: Sequence[Checkpoint],
    evaluations: Sequence[EvaluationConfig],
    teachers: bool = False,
    untrained: bool = False,
    output: Path | None = None,
    labels: Sequence[str] = (),
    again: bool = False,
    head: str = "",
) -> list[Path]:
    """Score checkpoints, each with its own teachers; returns the files that the scores went to.

    What is in such a file already, of the same weights and asked the same, is not scored again.

    Args:
        checkpoints: of one run or of several.
        evaluations: what each is asked.
        teachers: score their teachers too, each once.
        untrained: score what their students were before training too, each once.
        output: one file for all; None for that of each run.
        labels: what tables call them; empty for their own names.
        again: score anew what is there already.
        head: teacher whose head gives the students' summary, and whose texts go with it.

    Raises:
        ConfigError: they are not asked the same, or their teachers differ under one name; or a file
            cannot be written.
        DataError: a file that is there holds something else than scores.
    """
    check_alike(checkpoints, evaluations)
    check_data(evaluations[0])
    for line in (line for checkpoint in checkpoints for line in changed_since(checkpoint)):
        logger.warning("%s; what is scored is the student as it was trained", line)
    paths = [output or run_folder(checkpoint) / SCORES for checkpoint in checkpoints]
    for path in dict.fromkeys(paths):
        check_output(path)
        check_can_add(path)
    built: dict[str, Teacher] = {}
    known: dict[str, list[Score]] = {}
    for number, (checkpoint, evaluation) in enumerate(zip(checkpoints, evaluations, strict=True)):
        recipe, device = checkpoint.recipe, device_of(checkpoint)
        imitates = "fidelity" in evaluation.benchmarks
        is_new = number == 0 or recipe.teachers != checkpoints[number - 1].recipe.teachers
        if (teachers or imitates) and is_new:
            dtypes = dtypes_of(recipe)
            del dtypes["engine.precision"]  # students are scored in float32, whatever they saw
            if line := emulation_warning(dtypes, device):
                logger.warning("%s", line)
            built = build_teachers(recipe, device)
        targets = targets_for(checkpoint, evaluation.size, built) if imitates else {}
        subject = with_head(student_subject(checkpoint, labels[number] if labels else ""), head)
        text = f"{subject.run}/{subject.title} at step {subject.step}"
        tested: list[tuple[Subject, str, Callable[[], Encoder]]] = [
            (subject, text, partial(encoder_of, checkpoint, targets=targets, head=head))
        ]
        if untrained:
            untaught = partial(encoder_of, checkpoint, untrained=True, targets=targets)
            tested.append((untrained_subject(checkpoint), UNTRAINED, untaught))
        for name, teacher in built.items() if teachers else ():
            encoder = partial(encoder_with_text, name, recipe.teachers[name], teacher, device)
            tested.append((teacher_subject(checkpoint, name), name, encoder))
        against = [target.digest for target in targets.values()]
        for subject, text, make in tested:
            asked = {name: asked_of(name, evaluation, against) for name in evaluation.benchmarks}
            scores = known.setdefault(subject.weights, [])
            score_into(paths[number], subject, text, make, evaluation, asked, scores, again)
    return list(dict.fromkeys(paths))


def score_models(
    models: Sequence[NamedModel],
    evaluation: EvaluationConfig,
    device: torch.device,
    path: Path,
    again: bool = False,
) -> None:
    """Score models that were named without a run into one file.

    What is there already, of the same weights and asked the same, is not scored again.

    Raises:
        ConfigError: a model that cannot be built, or data that is not named.
        DataError: a file that is there holds something else than scores.
    """
    check_data(evaluation)
    check_output(path)
    check_can_add(path)
    asked = {name: asked_of(name, evaluation) for name in evaluation.benchmarks}
    for model in models:
        check_model(model)

    def score_one(model: NamedModel) -> None:  # when it returns, the model's memory is free
        subject, encoder = model_under_test(model, device, path.absolute().parent)
        score_into(path, subject, model.name, lambda: encoder, evaluation, asked, [], again)

    for model in models:
        score_one(model)


def score_into(
    path: Path,
    subject: Subject,
    text: str,
    make: Callable[[], Encoder],
    evaluation: EvaluationConfig,
    asked: Mapping[str, str],
    known: list[Score],
    again: bool,
) -> None:
    """Write to a file what it lacks of a model's scores, each benchmark's as soon as it is done.

    Args:
        path: score file.
        subject: the model.
        text: what progress bars call it.
        make: builds its encoder, where something is lacking.
        evaluation: what is asked.
        asked: by benchmark, see :func:`asked_of`.
        known: its scores that another file got; what is new is added.
        again: take for lacking what the file has.
    """
    world = current_world()
    there = run_on_main(world, lambda: frozenset[str]() if again else asked_in(path, subject))
    if found := [name for name in asked if asked[name] in there]:
        logger.info("%s: %s already in %s (--again scores anew)", text, ", ".join(found), path)

    shown: dict[str, list[Image.Image]] = {}

    def show(benchmark: str, example: Shown) -> None:
        shown.setdefault(benchmark, []).append(draw(example))

    def write(scores: list[Score]) -> None:
        examples = {one: shown.pop(one, []) for one in {score.benchmark for score in scores}}

        def keep() -> None:
            write_scores(path, subject, scores)
            for benchmark, images in examples.items():
                write_examples(path, subject, benchmark, images)

        run_on_main(world, keep)

    elsewhere = {score.asked for score in known} - there
    if elsewhere:
        write([score for score in known if score.asked in elsewhere])
    lacking = tuple(name for name in asked if asked[name] not in there | elsewhere)
    if lacking:
        with _bars(text) as report:
            config = replace(evaluation, benchmarks=lacking)
            encoder = replace(make(), weights=subject.weights)
            new = evaluate(encoder, config, report, asked, write, show)
        known += new
        given = {score.asked for score in new}
        if left := [name for name in lacking if asked[name] not in given]:
            logger.info("%s: not asked %s, which it cannot answer", text, ", ".join(left))


def check_alike(checkpoints: Sequence[Checkpoint], evaluations: Sequence[EvaluationConfig]) -> None:
    """Raise ConfigError where checkpoints would not be asked the same, by a benchmark or of it."""
    subjects = [student_subject(checkpoint) for checkpoint in checkpoints]
    names = [f"{subject.run}/{subject.title}" for subject in subjects]
    first = _asked(evaluations[0])
    for name, evaluation in zip(names[1:], evaluations[1:], strict=True):
        for field, value in _asked(evaluation).items():
            if value != first.get(field, value):
                wanted = shlex.quote(yaml_line(first[field]))
                raise ConfigError(
                    f"{field} is {yaml_line(first[field])} in the recipe of {names[0]} and "
                    f"{yaml_line(value)} in that of {name}, so that their scores could not be "
                    f"compared; set it for all, for instance --{field} {wanted}"
                )
    if "fidelity" not in evaluations[0].benchmarks:
        return
    others = [benchmark for benchmark in evaluations[0].benchmarks if benchmark != "fidelity"]
    without = shlex.quote(yaml_line(others))
    for name, checkpoint in zip(names[1:], checkpoints[1:], strict=True):
        for teacher in checkpoint.teachers.keys() & checkpoints[0].teachers.keys():
            if teacher_digest(checkpoint, teacher) != teacher_digest(checkpoints[0], teacher):
                raise ConfigError(
                    f"teacher {teacher!r} of {names[0]} and of {name} are not the same, so that "
                    "fidelity to them could not be compared; leave it out "
                    f"(--evaluation.benchmarks {without}), or score them apart"
                )


def _asked(evaluation: EvaluationConfig) -> dict[str, Any]:
    """Return those fields of a recipe that its benchmarks read."""
    fields = {"limit"}
    for name in evaluation.benchmarks:
        fields |= set(BENCHMARKS.get(name).sources.values())
    asked = {"evaluation.benchmarks": list(evaluation.benchmarks)}
    for field in sorted(fields):
        value = source_value(evaluation, field)
        is_place = isinstance(value, str) and os.path.exists(value)
        asked[f"evaluation.{field}"] = os.path.realpath(value) if is_place else value
    for name in evaluation.benchmarks:
        asked[f"evaluation.options.{name}"] = evaluation.options.get(name, {})
    return asked


def check_labels(labels: Sequence[str] | None, num_runs: int) -> None:
    """Raise ConfigError unless there are as many labels as runs, no two alike, or none."""
    if labels and len(labels) != num_runs:
        raise ConfigError(f"--labels: {len(labels)} for {num_runs} runs; give one for each run")
    if labels and len(set(labels)) < num_runs:
        raise ConfigError(f"--labels: two runs are called alike ({', '.join(labels)})")


def device_of(checkpoint: Checkpoint) -> torch.device:
    """Return the device that a checkpoint's recipe asks for."""
    return choose_device(checkpoint.recipe.engine.device, world_from(os.environ))


def encoder_of(
    checkpoint: Checkpoint,
    name: str = "student",
    untrained: bool = False,
    targets: Mapping[str, Target] | None = None,
    head: str = "",
) -> Encoder:
    """Load the student of a checkpoint onto its device, or build it as before any training.

    With ``head`` its summary is that head's, and the text tower that teacher's.
    """
    device = device_of(checkpoint)
    text = None
    if head:
        check_head(checkpoint, head)
        text = text_tower(head, checkpoint.recipe.teachers[head], device)
    model = untrained_student(checkpoint) if untrained else load_student(checkpoint, device)
    encoder = as_encoder(model, checkpoint.recipe.student, checkpoint.teachers)
    encoder = encoder.to(device).eval()
    return replace(student_encoder(encoder, device, targets, name, head), text=text)


def with_head(subject: Subject, head: str) -> Subject:
    """Tell a student whose summary is a head's from the student itself."""
    if not head:
        return subject
    return replace(subject, name=f"{subject.title} ({head})", weights=f"{subject.weights}/{head}")


def check_head(checkpoint: Checkpoint, head: str) -> None:
    """Raise ConfigError unless a student has a head of that name, with a summary."""
    specs = checkpoint.teachers
    if head not in specs:
        raise ConfigError(
            f"--head {head}: no such teacher of {checkpoint.folder} ({nearest(head, list(specs))})"
        )
    if specs[head].summary_channels is None:
        raise ConfigError(f"--head {head}: that teacher has no summary; name another")


def untrained_student(checkpoint: Checkpoint) -> DistilledStudent:
    """Build the student of a checkpoint as it was before any training."""
    torch.manual_seed(checkpoint.recipe.seed)
    config, teachers = checkpoint.recipe.student, checkpoint.teachers
    return build_student(config, teachers, initialise=initialise)


def teacher_encoders(
    checkpoint: Checkpoint, teachers: Mapping[str, Teacher] | None = None
) -> list[Encoder]:
    """Present the teachers of a checkpoint, built unless given, as encoders ``teacher NAME``."""
    device = device_of(checkpoint)
    found = build_teachers(checkpoint.recipe, device) if teachers is None else teachers
    return [teacher_encoder(one, device, f"teacher {one.spec.name}") for one in found.values()]


def targets_for(
    checkpoint: Checkpoint, size: int, teachers: Mapping[str, Teacher]
) -> dict[str, Target]:
    """Return the teachers that a student's heads are compared with, for inputs of a size in px."""
    recipe = checkpoint.recipe
    return targets_of(
        teachers,
        recipe.teachers,
        size,
        recipe.student.patch_size,
        normalizers_of(checkpoint),
        {name: teacher_digest(checkpoint, name) for name in recipe.teachers},
    )


@contextmanager
def _bars(label: str) -> Iterator[Report]:
    """Give a callback that shows a progress bar for one benchmark after another."""
    bars: dict[str, Progress] = {}
    with ExitStack() as shown:

        def report(benchmark: str, done: int, total: int) -> None:
            if benchmark not in bars:
                shown.close()
                bars.clear()
                bar = Progress(f"{label}: {benchmark}", total, visible=current_world().is_main)
                bars[benchmark] = shown.enter_context(bar)
            bars[benchmark].update(done)

        yield report


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
    chosen.check_alike()
    return multi_task_gain(
        chosen.results,
        labels[baseline.folder],
        in_order(chosen.definitions),
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
