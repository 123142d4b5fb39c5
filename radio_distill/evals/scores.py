"""The score file, ``scores.jsonl``: its one reader and its one writer.

A line is one score. It brings its own definition, and says what was scored (:mod:`.subjects`).
Results are one model's only where recipe and stage are the same but for the seed; all others have
labels that tell them apart. Lines that say no more than a name, of an earlier version, are told
apart by their file. Tables of anyone's own (:mod:`.score_tables`) may stand beside them, in which
the same model and metric in two places are two results. Nothing here needs torch.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import build
from ..errors import DataError, UnknownNameError
from ..registry import nearest
from ..system.files import reason_of, replacing
from ..types import Score
from .gain import Measured, Metric
from .score_tables import SUFFIXES, number_of, read_table, read_text
from .subjects import (
    FIELDS,
    SCORES,
    Subject,
    full_label,
    labels,
    matches,
    seeds_of_one,
    subject_of_line,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ScoreSet:
    """Results of several models, and what is known of their metrics."""

    results: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """``{label: results}``, each result ``{metric: value}``."""
    definitions: dict[str, Metric] = field(default_factory=dict)
    subjects: dict[str, list[Subject]] = field(default_factory=dict)
    """The subject of each result, for those out of JSON lines."""
    measured: dict[str, dict[str, Measured]] = field(default_factory=dict)
    """``{label: {metric: how}}``, for those out of JSON lines."""
    notes: list[str] = field(default_factory=list)
    """Remarks on the files, for the reader."""

    @property
    def teachers(self) -> frozenset[str]:
        """Labels of teachers."""
        return frozenset(label for label, of in self.subjects.items() if of[0].is_teacher)

    def add(self, model: str, run: Mapping[str, float]) -> None:
        """Add a result: to one of the model's that shares no metric with it, else as a new one."""
        runs = self.results.setdefault(model, [])
        for known in runs:
            if not known.keys() & run.keys():
                known.update(run)
                return
        runs.append(dict(run))

    def define(self, name: str, metric: Metric, where: str) -> None:
        """Add a definition; raises DataError where it contradicts an earlier one."""
        if self.definitions.setdefault(name, metric) != metric:
            raise DataError(
                f"{where}: metric {name!r} is {metric}, but was {self.definitions[name]} before; "
                "settle it with --definitions"
            )

    def named(self, wanted: str, what: str = "model") -> str:
        """Return the label that a user means: all of it, or parts that only one model has.

        For instance ``runA/stage3-tile``, ``stage3-tile`` or ``tile``; run and step may be named
        where the label has none, and a model of several seeds by any of its runs.

        Raises:
            UnknownNameError: none, or several.
        """
        if wanted in self.results:
            return wanted
        names = {
            label: [label, *(full_label(of) for of in self.subjects.get(label, []) if of.is_known)]
            for label in self.results
        }
        fitting = [label for label in names if any(matches(wanted, name) for name in names[label])]
        students = [
            label for label in fitting if not any(o.reference for o in self.subjects.get(label, []))
        ]
        if len(students) == 1:  # a run's name means its student, not its teachers
            return students[0]
        if len(fitting) > 1:
            raise UnknownNameError(f"{what} {wanted!r} may be {' or '.join(fitting)}; name one")
        if not fitting:
            raise UnknownNameError(f"no scores of {what} {wanted!r} ({_known(wanted, self)})")
        return fitting[0]

    def label_of(self, subject: Subject) -> str | None:
        """Return the label of a checkpoint's scores; None where it has none."""
        for label, members in self.subjects.items():
            if any(replace(of, name=subject.name).is_same(subject) for of in members):
                return label
        return None

    def remarks(self) -> tuple[str, ...]:
        """Say what a reader must know: files, unlike sizes and teachers, protocols."""
        unlike = []
        protocols: dict[str, None] = {}
        for name, metric in self.definitions.items():
            sizes = self._by(name, lambda how: how.pixels)
            if metric.counts and len(sizes) > 1:
                parts = "; ".join(f"{size} ({', '.join(of)})" for size, of in sizes.items())
                unlike.append(f"{name} is at different sizes in pixels: {parts}.")
            teachers = self._by(name, lambda how: how.against)
            if metric.headline and len(teachers) > 1:
                parts = " and ".join(", ".join(of) for of in teachers.values())
                unlike.append(f"{name} is to different teachers of that name: {parts}.")
            if metric.counts:
                protocols |= dict.fromkeys(self._by(name, lambda how: how.protocol))
        under = [f"Protocols: {', '.join(protocols)}."] if protocols else []
        return (*self.notes, *unlike, *under)

    def _by(self, metric: str, value: Callable[[Measured], str]) -> dict[str, list[str]]:
        """Sort labels by how their metric was measured, where that is known."""
        sorted_labels: dict[str, list[str]] = {}
        for label, metrics in self.measured.items():
            if metric in metrics and value(metrics[metric]):
                sorted_labels.setdefault(value(metrics[metric]), []).append(label)
        return sorted_labels

    def check_alike(self) -> None:
        """Raise DataError where a metric that counts is measured otherwise for some model.

        That is on other images, or under another protocol.
        """
        for name, metric in self.definitions.items():
            samples = self._by(name, lambda how: how.of)
            if metric.counts and len(samples) > 1:
                (less, one), (more, other) = list(samples.items())[:2]
                raise DataError(
                    f"{name} is of {less} for {one[0]} and of {more} for {other[0]}; score both on "
                    "the same (radio-distill eval, --evaluation.limit 0), or leave one out with "
                    "--models"
                )
            protocols = self._by(name, lambda how: how.protocol)
            if metric.counts and len(protocols) > 1:
                (first, one), (second, other) = list(protocols.items())[:2]
                raise DataError(
                    f"{name} is of protocol {first} for {one[0]} and of {second} for {other[0]}; "
                    "score both with the same section evaluation and version (radio-distill "
                    "eval), or leave one out with --models"
                )

    def only(self, chosen: Iterable[str]) -> "ScoreSet":
        """Return the results of some labels, and the metrics that these have."""
        names = list(dict.fromkeys(chosen))
        results = {name: self.results[name] for name in names}
        metrics = {metric for runs in results.values() for run in runs for metric in run}
        return ScoreSet(
            results,
            {name: metric for name, metric in self.definitions.items() if name in metrics},
            {name: self.subjects[name] for name in names if name in self.subjects},
            {name: self.measured[name] for name in names if name in self.measured},
            self.notes,
        )


def _known(wanted: str, scores: ScoreSet) -> str:
    parts = [part for label in scores.results for part in (label, *label.split("/"))]
    names = dict.fromkeys([*parts, *(part.partition("-")[2] for part in parts)])
    hint = nearest(wanted, [name for name in names if name])
    return hint if hint.startswith("did you") else f"known: {', '.join(scores.results)}"


def read_scores(paths: Iterable[str | Path], settled: Iterable[str] = ()) -> ScoreSet:
    """Read files and folders of scores into one set.

    Args:
        paths: files or folders, see the module's text.
        settled: metrics whose definition in the files does not matter, because another holds.

    Raises:
        DataError: a file that cannot be read or is not what it should be, with its line.
    """
    scores, tables, results = ScoreSet(), list[Path](), list[_Result]()
    for path in {path.resolve(): path for path in _files(paths)}.values():
        if path.suffix == ".jsonl":
            _read_json_lines(path, scores, frozenset(settled), results)
        elif path.suffix in SUFFIXES:
            tables.append(path)
        else:
            raise DataError(f"{path}: scores are read from .jsonl, .yaml, .json and .csv files")
    _add_results(scores, results)
    evaluated = {
        label: {name for run in scores.results[label] for name in run} for label in scores.subjects
    }
    for path in tables:
        own = ScoreSet()
        for model, run in read_table(path):
            own.add(model, run)
            # It may complete the scores of an evaluation, not repeat them.
            if twice := sorted(evaluated.get(model, set()) & run.keys()):
                raise DataError(
                    f"{path}: {model!r} has {twice[0]} already, of an evaluation; give the model "
                    "another name"
                )
        for model, runs in own.results.items():
            for run in runs:
                scores.add(model, run)
    return scores


def write_scores(path: str | Path, subject: Subject, scores: Sequence[Score]) -> None:
    """Write the scores of ``subject`` as JSON lines, beside those of others already in the file.

    Earlier scores of the same model by the same benchmarks are replaced, and all of an earlier
    training in the same place; so are those without run, stage and step that lie in its run folder.
    The file is swapped in whole, so a reader never sees half of it.

    Raises:
        DataError: the file that is there holds something else.
    """
    path = Path(path)
    benchmarks = {score.benchmark for score in scores}
    entries = [
        (former, line)
        for former, line in _entries(path)
        if not _replaces(subject, former)
        or (former.is_same(subject) and line["benchmark"] not in benchmarks)
    ]
    entries += [(subject, asdict(score)) for score in scores]
    known = list(dict.fromkeys(former for former, _ in entries if former.is_known))
    names = dict(zip(known, labels([[one] for one in known]), strict=True))
    with replacing(path) as draft:
        draft.write_text(
            "".join(json.dumps(_line(path, one, names, line)) + "\n" for one, line in entries),
            encoding="utf-8",
        )


def asked_in(path: Path, subject: Subject) -> frozenset[str]:
    """Return ``Score.asked`` of the scores of a model in a file; none where there is no file."""
    return frozenset(
        line.get("asked", "") for former, line in _entries(path) if former.is_same(subject)
    )


def check_can_add(path: Path) -> None:
    """Raise DataError where a file is there that scores cannot be added to."""
    _entries(path)


def _entries(path: Path) -> list[tuple[Subject, dict[str, Any]]]:
    """Return the lines of a score file, none where there is no file, each with its subject."""
    if not path.exists():
        return []
    return [
        (subject_of_line(line, path, f"{path}, line {number}"), line)
        for number, line in _json_lines(path)
    ]


def _replaces(subject: Subject, former: Subject) -> bool:
    if not former.is_known:
        return (former.folder, former.title) == (subject.folder, subject.title)
    return former.place == subject.place or former.is_same(subject)


def _line(
    path: Path, subject: Subject, names: Mapping[Subject, str], line: Mapping[str, Any]
) -> Mapping[str, Any]:
    if not subject.is_known:
        return line
    score = {key: line[key] for key in line if key not in ("subject", *FIELDS)}
    return {"subject": names[subject], **subject.to_line(path), **score}


def _files(paths: Iterable[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        yield from _below(path) if path.is_dir() else [path]


def _below(folder: Path) -> list[Path]:
    """List the files of scores below a folder; what may not be looked into is said."""
    closed: list[OSError] = []
    files = [
        Path(parent, SCORES)
        for parent, _, names in os.walk(folder, onerror=closed.append)
        if SCORES in names
    ]
    if not files and closed:
        raise DataError(f"{closed[0].filename} cannot be read: {reason_of(closed[0]).lower()}")
    if not files:
        raise DataError(f"{folder}: no {SCORES} in this folder or below it")
    for error in closed:
        logger.warning("passed over: %s cannot be read: %s", error.filename, reason_of(error))
    return sorted(files)


@dataclass(frozen=True, slots=True)
class _Result:
    """One result of one subject: its values out of a file, or out of several that agree."""

    subject: Subject
    file: Path
    values: dict[str, float]
    measured: dict[str, Measured]

    def agrees(self, other: "_Result") -> bool:
        """Return whether both may be of one evaluation: equal where they measure the same."""
        same = self.values.keys() & other.values.keys()
        return all(
            self.values[name] == other.values[name] and self.measured[name] == other.measured[name]
            for name in same
        )


def _add_results(scores: ScoreSet, results: Sequence[_Result]) -> None:
    """Join what is one model's, label the models, and add them."""
    distinct: list[_Result] = []
    for result in results:
        for known in distinct:
            if known.subject.is_same(result.subject) and known.agrees(result):
                known.values.update(result.values)
                known.measured.update(result.measured)
                break
        else:
            distinct.append(result)
    models = _models(distinct)
    for label, model in zip(_labels(models), models, strict=True):
        for result in model:
            scores.results.setdefault(label, []).append(result.values)
            scores.subjects.setdefault(label, []).append(result.subject)
            scores.measured.setdefault(label, {}).update(result.measured)
    seeds = {label: of for label, of in scores.subjects.items() if len(of) > 1 and of[0].is_known}
    for label, of in seeds.items():
        parts = ", ".join(f"{one.run} with seed {one.seed}" for one in of)
        scores.notes.append(f"Seeds of one recipe and stage: {label} is {parts}.")
    unknown = dict.fromkeys(r.file for r in distinct if not r.subject.is_known)
    if unknown:
        files = ", ".join(map(str, unknown))
        scores.notes.append(
            f"Without run, stage and step, as earlier versions wrote: {files}; models are told "
            "apart by their file, and none is taken for the seed of another."
        )


def _models(results: Sequence[_Result]) -> list[list[_Result]]:
    """Put results together that are seeds of one model; each other one is a model of its own."""
    groups: dict[Any, list[_Result]] = {}
    for result in results:
        one = result.subject
        if one.is_known:
            key: Any = (one.recipe, one.stage, one.step, one.name)
        else:  # a file that says no more may repeat a name, for several results of its own
            key = (one.place, result.file)
        groups.setdefault(key, []).append(result)
    models = []
    for group in groups.values():
        together = not group[0].subject.is_known or seeds_of_one([r.subject for r in group])
        models += [group] if together else [[result] for result in group]
    return models


def _labels(models: Sequence[Sequence[_Result]]) -> list[str]:
    """Name models; what is still called alike, by its file, then by its weights or its place."""
    names = labels([[result.subject for result in model] for model in models])
    for more in (lambda result: str(result.file), lambda result: result.subject.weights[:8]):
        names = [
            f"{name} ({more(model[0])})" if names.count(name) > 1 else name
            for name, model in zip(names, models, strict=True)
        ]
    return names


def _read_json_lines(
    path: Path, scores: ScoreSet, settled: frozenset[str], results: list[_Result]
) -> None:
    """Read a file; a subject has several results in it only where it repeats a metric."""
    own: dict[Subject, list[_Result]] = {}
    for number, score in _json_lines(path):
        where = f"{path}, line {number}"
        try:
            name = f"{score['benchmark']}/{score['metric']}"
            value = number_of(score["value"], where, finite=False)
            fields = {key: score[key] for key in ("group", "higher_is_better")}
            subject = subject_of_line(score, path, where)
            measured = _measured(score)
        except KeyError as error:
            raise DataError(f"{where}: a score needs the field {error}") from error
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: num_samples is no number ({error})") from error
        if name not in settled:
            fields["unit"] = score.get("unit", "")
            fields["headline"] = score.get("headline", True)
            # Lines from before do not say it; fidelity always was what students are trained for.
            fields["trained_for"] = score.get("trained_for", score["benchmark"] == "fidelity")
            scores.define(name, build(Metric, fields, where), where)
        for known in own.setdefault(subject, []):
            if name not in known.values:
                known.values[name], known.measured[name] = value, measured
                break
        else:
            own[subject].append(_Result(subject, path, {name: value}, {name: measured}))
    results += [result for several in own.values() for result in several]


def _measured(line: Mapping[str, Any]) -> Measured:
    details = line.get("details", {})
    return Measured(
        int(line.get("num_samples", 0)),
        str(line.get("pixels", "")),
        str(line.get("against", "")),
        ", ".join(f"{name} {value}" for name, value in dict(details).items()),
        str(line.get("protocol", "")),
    )


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            score = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({reason_of(error)})") from error
        if not isinstance(score, dict):
            raise DataError(f"{where}: a score is an object, this is {type(score).__name__}")
        yield number, score
