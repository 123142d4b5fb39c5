"""The README of an exported student: what it is, from whom it learned, what follows from that.

Only what the checkpoint and the run folder hold is said; a section without content is left out.
"""

import re
from collections.abc import Iterable

from ..config import Recipe, StageConfig, dump, partition_sizes
from ..evals.scores import SCORES, ScoreSet, read_scores
from ..evals.subjects import Subject
from ..train.checkpoint import Checkpoint
from ..types import Size, TeacherSpec
from .folded import FoldedStudent

PERMISSIVE = frozenset({"apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "mit"})
_RESEARCH = re.compile(r"research|non-?commercial|\bnc\b", re.IGNORECASE)


def model_card(student: FoldedStudent, usage: str, library: str) -> str:
    """Write the card as Markdown, with the hub's front matter.

    Args:
        student: what is exported.
        usage: how this format is loaded, Markdown.
        library: the hub's name of the library that loads it.
    """
    checkpoint = student.checkpoint
    sections = {
        "Use": f"{usage}\n\n{sizes_in_words(student)}",
        "Teachers": _teachers(checkpoint),
        "Training": _training(checkpoint),
        "Scores": _scores(checkpoint),
        "Recipe": f"```yaml\n{dump(checkpoint.recipe).strip()}\n```",
    }
    parts = [
        _front_matter(checkpoint, library),
        f"# {checkpoint.recipe.name}",
        _introduction(student),
    ]
    parts += [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    return "\n\n".join(parts) + "\n"


def _front_matter(checkpoint: Checkpoint, library: str) -> str:
    lines = [f"library_name: {library}", "pipeline_tag: image-feature-extraction"]
    if _research_only(checkpoint.teachers.values()):
        lines.append("license: other")
    return "\n".join(["---", *lines, "tags: [radio, distillation, vision-backbone]", "---"])


def _introduction(student: FoldedStudent) -> str:
    body, config = student.model.student, student.config
    millions = sum(parameter.numel() for parameter in body.parameters()) / 1e6
    names = list(student.checkpoint.teachers)
    return (
        f"A vision transformer ({config.architecture}, patch {config.patch_size}, "
        f"{millions:.1f} M parameters) that learned the features of {_listed(names)}, trained with "
        "radio_distill. One pass gives a summary and a feature map; a head for each teacher turns "
        "them into that teacher's own features."
    )


def sizes_in_words(student: FoldedStudent) -> str:
    """Say which image sizes a student takes."""
    body = student.model.student
    trained = sorted({_times(size) for size in _trained_sizes(student.checkpoint)})
    return (
        f"Images are RGB in [0, 1]; height and width are any multiples of {body.size_step} px. It "
        f"was trained at {_listed(trained)} px, and its table of positions spans "
        f"{student.config.max_size} px."
    )


def _teachers(checkpoint: Checkpoint) -> str:
    rows = ["| teacher | model | channels | summary | licence |", "| --- | --- | --- | --- | --- |"]
    for name, spec in checkpoint.teachers.items():
        summary = spec.summary_channels or "none"
        model = _model_of(checkpoint.recipe, name)
        rows.append(f"| {name} | {model} | {spec.channels} | {summary} | {spec.licence} |")
    return "\n".join(rows) + "\n\n" + licence_note(checkpoint)


def _model_of(recipe: Recipe, name: str) -> str:
    config = recipe.teachers[name]
    model = config.options.get("model")
    return f"{config.preset}: {model}" if model else config.preset


def licence_note(checkpoint: Checkpoint) -> str:
    """Say in plain sentences what follows for the student from its teachers' licences."""
    specs = checkpoint.teachers
    research = _research_only(specs.values())
    unknown = [name for name, spec in specs.items() if spec.licence in ("", "unknown")]
    others = [
        f"{name} ({spec.licence})"
        for name, spec in specs.items()
        if name not in (*research, *unknown) and not _is_permissive(spec.licence)
    ]
    sentences = []
    if research:
        sentences.append(
            f"The licence of {_listed(research)} allows research only, so this student is for "
            "research only."
        )
    if unknown:
        sentences.append(
            f"The licence of {_listed(unknown)} is not known: find it out before you share or sell "
            "this student."
        )
    if others:
        sentences.append(
            f"Own conditions come with {_listed(others)}: read what they say of models that learn "
            "from them before you share or sell this student."
        )
    recipe = checkpoint.recipe
    first = recipe.stages[stages_before(recipe, checkpoint.stage)[0]]
    if start := first.start_from or recipe.student.pretrained:
        sentences.append(f"It started from other weights ({start}), whose licence counts too.")
    return " ".join(sentences) or "All of these licences allow any use, with attribution."


def _research_only(specs: Iterable[TeacherSpec]) -> list[str]:
    return [spec.name for spec in specs if _RESEARCH.search(spec.licence)]


def _is_permissive(licence: str) -> bool:
    """Say whether all licences of a list like ``mit (package), apache-2.0 (weights)`` are free."""
    names = {re.sub(r"\(.*?\)", "", part).strip().lower() for part in licence.split(",")}
    return licence == "none" or names <= PERMISSIVE  # none: random weights


def _training(checkpoint: Checkpoint) -> str:
    rows = ["| stage | steps | images a step | sizes (px) |", "| --- | --- | --- | --- |"]
    for name in stages_before(checkpoint.recipe, checkpoint.stage):
        stage = checkpoint.recipe.stages[name]
        steps = f"{stage.steps}"
        if name == checkpoint.stage and checkpoint.step != stage.steps:
            steps = f"{checkpoint.step} of {stage.steps}"
        images = sum(partition.batch_size for partition in stage.partitions)
        sizes = ", ".join(dict.fromkeys(map(_times, _sizes(stage))))
        rows.append(f"| {name} | {steps} | {images} | {sizes} |")
    return "\n".join(rows)


def stages_before(recipe: Recipe, stage: str) -> list[str]:
    """Return the stages of a recipe that led to ``stage``, itself the last."""
    chain = [stage]
    while (start := recipe.stages[chain[0]].start_from) in recipe.stages:
        chain.insert(0, start)
    return chain


def _trained_sizes(checkpoint: Checkpoint) -> list[Size]:
    recipe = checkpoint.recipe
    names = stages_before(recipe, checkpoint.stage)
    return [size for name in names for size in _sizes(recipe.stages[name])]


def _sizes(stage: StageConfig) -> list[Size]:
    return [size for partition in stage.partitions for size in partition_sizes(partition)]


def _scores(checkpoint: Checkpoint) -> str:
    """Return the table of the run's scores, or nothing where this student was not scored."""
    folder = checkpoint.folder.resolve()
    run = folder.parents[2]
    if not (run / SCORES).is_file():
        return ""
    scores = read_scores([run / SCORES])
    label = scores.label_of(_subject(checkpoint)) or _label_without_step(checkpoint, scores)
    if label is None:
        return ""
    rows = ["| metric | value | unit | better |", "| --- | --- | --- | --- |"]
    for name, value in scores.results[label][-1].items():
        metric = scores.definitions[name]
        better = "higher" if metric.higher_is_better else "lower"
        rows.append(f"| {name} | {value:.4g} | {metric.unit} | {better} |")
    return "\n".join(rows)


def _subject(checkpoint: Checkpoint) -> Subject:
    folder = checkpoint.folder.resolve()
    return Subject(
        folder=str(folder.parents[2]),
        stage=folder.parents[1].name,
        step=checkpoint.step,
        weights=checkpoint.weights_sha256,
    )


def _label_without_step(checkpoint: Checkpoint, scores: ScoreSet) -> str | None:
    """Return the label of scores that an earlier version wrote; those are of the newest step."""
    folder = checkpoint.folder.resolve()
    if folder != max(folder.parent.glob("step-*"), default=folder):
        return None
    for label, (first, *_) in scores.subjects.items():
        if not first.is_known and first.stage == folder.parents[1].name:
            return label
    return None


def _times(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
