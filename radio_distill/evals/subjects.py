"""What was scored, so that two results are never taken for one, nor one model for two.

A score line names its run, stage and step, the seed, a digest of the recipe without the seed, and
a digest of the weights. Labels in tables are made of these for all results that are read together:
a stage's name alone where that is enough, with the run before it and the step behind it where it is
not. Nothing here needs torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError

SCORES = "scores.jsonl"
"""File of a run folder."""
TEACHER, MODEL = "teacher", "model"
UNTRAINED = "untrained student"


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A student at one step of its training, an untrained student, or a teacher."""

    folder: str
    """Run folder, absolute. Of a score file that does not say it: the file's."""
    stage: str = ""
    """Name of the stage's folder; empty for an untrained student and a teacher."""
    step: int = 0
    seed: int = 0
    recipe: str = ""
    """Digest of what decides the training but for the seed; empty where not known."""
    weights: str = ""
    """Digest of the model; empty where not known."""
    reference: str = ""
    """``teacher NAME``, ``untrained student`` or ``model TEXT``; empty for a trained student."""
    name: str = ""
    """Label that the user gave; empty for one of run, stage and step."""

    @property
    def run(self) -> str:
        """Name of the run folder."""
        return Path(self.folder).name

    @property
    def is_known(self) -> bool:
        """False for one out of a file that says no more than a name."""
        return bool(self.weights)

    @property
    def is_teacher(self) -> bool:
        """Whether it is a teacher, or a model that was named without a run."""
        return self.reference.startswith((f"{TEACHER} ", f"{MODEL} "))

    @property
    def title(self) -> str:
        """What it is called where there is one run and one step."""
        return self.name or self.reference or self.stage

    @property
    def place(self) -> tuple[str, str, int, str]:
        """Where it lies: another training in the same place replaces it."""
        return self.folder, self.reference or self.stage, self.step, self.name

    def is_same(self, other: "Subject") -> bool:
        """Return whether both are the same weights of the same run, wherever it lies.

        A teacher or an untrained student is the same in every run.
        """
        return (
            self.is_known
            and (self.weights, *self.place[1:]) == (other.weights, *other.place[1:])
            and (self.run == other.run or not self.stage)
        )

    def to_line(self, file: Path) -> dict[str, Any]:
        """Return the fields of a score line; in a run's own file they do not say where it lies."""
        fields = {key: value for key, value in asdict(self).items() if value != ""}
        if file.name == SCORES and Path(self.folder) == file.resolve().parent:
            fields["folder"] = _HERE
        return {"run": self.run, **fields}


_HERE = "."
FIELDS = ("run", *Subject.__dataclass_fields__)


def subject_of_line(line: Mapping[str, Any], file: Path, where: str) -> Subject:
    """Return the subject of a score line; of one from before, what its name and its file say.

    Raises:
        DataError: a field that is missing or of another kind; the message begins with ``where``.
    """
    if "weights" not in line:
        if "subject" not in line:
            raise DataError(f"{where}: a score needs the field 'subject'")
        return _unknown(str(line["subject"]), file)
    values = {name: line[name] for name in Subject.__dataclass_fields__ if name in line}
    for name, value in values.items():
        kind = int if name in ("step", "seed") else str
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DataError(
                f"{where}: not a score: {name} {value!r} is not of the kind {kind.__name__}"
            )
    if "folder" not in values or not (values.get("stage") or values.get("reference")):
        raise DataError(f"{where}: not a score: it names no run or no stage")
    if values["folder"] == _HERE:
        parent = file.resolve().parent
        moved = parent if file.name == SCORES else parent / str(line.get("run", file.stem))
        values["folder"] = str(moved)
    return Subject(**values)


def _unknown(name: str, file: Path) -> Subject:
    path = file.resolve()
    folder = path.parent if path.name == SCORES else path.with_suffix("")
    if name == UNTRAINED or name.startswith(f"{TEACHER} "):
        return Subject(folder=str(folder), reference=name)
    return Subject(folder=str(folder), stage=name)


def seeds_of_one(subjects: Sequence[Subject]) -> bool:
    """Return whether results of these may be averaged: one recipe and stage, each seed once."""
    first = subjects[0]
    alike = all(
        (subject.recipe, subject.stage, subject.step, subject.name)
        == (first.recipe, first.stage, first.step, first.name)
        for subject in subjects
    )
    seeds = {subject.seed for subject in subjects}
    return alike and bool(first.recipe and first.stage) and len(seeds) == len(subjects)


def labels(models: Sequence[Sequence[Subject]]) -> list[str]:
    """Name models for a table, each by the subjects that its results are of.

    ``STAGE``, or ``RUN/STAGE`` where there are several runs, and ``/step-N`` behind it where there
    are several steps of a stage. Teachers and untrained students are called by their run only where
    there are different ones of a name.
    """
    runs = _run_names(subject for model in models for subject in model)
    owners = [
        _owner(list(dict.fromkeys(runs[subject.folder] for subject in model))) for model in models
    ]
    titles = [model[0].title for model in models]
    several_runs = len({o for o, m in zip(owners, models, strict=True) if m[0].stage}) > 1
    result = []
    for model, owner, title in zip(models, owners, titles, strict=True):
        first = model[0]
        if first.name:
            result.append(first.name)
            continue
        with_run = several_runs if first.stage else titles.count(title) > 1
        steps = {
            other[0].step
            for other, its_owner in zip(models, owners, strict=True)
            if (its_owner, other[0].title) == (owner, title)
        }
        step = f"step-{first.step}" if len(steps) > 1 and first.is_known else ""
        result.append("/".join(filter(None, (owner if with_run else "", title, step))))
    return result


def _owner(runs: Sequence[str]) -> str:
    """Name the runs of one model, a long list of seeds by its first."""
    return "+".join(runs) if len(runs) <= 2 else f"{runs[0]}+{len(runs) - 1} more"


def full_label(subject: Subject) -> str:
    """Return a label that says run, stage and step, whether that is needed or not."""
    parts = [subject.run, subject.title, f"step-{subject.step}" if subject.stage else ""]
    return "/".join(filter(None, parts))


def _run_names(subjects: Iterable[Subject]) -> dict[str, str]:
    """Name each run folder by its last part, or by as many as tell it from the others."""
    parts = {subject.folder: Path(subject.folder).parts for subject in subjects}
    names = {}
    for folder, own in parts.items():
        length = 1
        while length < len(own) and any(
            other != own and other[-length:] == own[-length:] for other in parts.values()
        ):
            length += 1
        names[folder] = "/".join(own[-length:])
    return names


def matches(wanted: str, label: str) -> bool:
    """Return whether a label may be meant by ``wanted``: some of its parts, in a row.

    A part may be called by what stands behind its first dash: ``tile`` means ``stage3-tile``.
    """
    parts, asked = label.split("/"), wanted.split("/")
    return any(
        all(
            name in (part, part.partition("-")[2])
            for name, part in zip(asked, parts[start:], strict=False)
        )
        for start in range(len(parts) - len(asked) + 1)
    )
