"""Read and write scores; read metric definitions: JSON lines, or YAML or CSV of anyone's own.

* ``*.jsonl``: one score a line, as an evaluation writes it; it brings its own definitions, and says
  what was scored (:mod:`.subjects`). Results are one model's only where recipe and stage are the
  same but for the seed; all others have labels that tell them apart. Lines that say no more than a
  name, of an earlier version, are told apart by their file.
* ``*.yaml``, ``*.yml``, ``*.json``: ``{model: {metric: value}}``; a list of such mappings under a
  model is several results of it.
* ``*.csv``: a heading ``model,METRIC,METRIC…``; a model on several lines has several results.
* a folder: every ``scores.jsonl`` below it.

In YAML and CSV the same model and metric in two places are two results (two seeds). Nothing here
needs torch.
"""

import csv
import io
import json
import logging
import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..config import build
from ..errors import DataError, UnknownNameError
from ..registry import nearest
from ..system.files import reason_of, replacing
from ..types import Score
from .gain import Measured, Metric
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
    """What each result is of, for those out of JSON lines."""
    measured: dict[str, dict[str, Measured]] = field(default_factory=dict)
    """``{label: {metric: how}}``, for those out of JSON lines."""
    notes: list[str] = field(default_factory=list)
    """What must be said of the files."""

    @property
    def teachers(self) -> frozenset[str]:
        """Labels of teachers."""
        return frozenset(label for label, of in self.subjects.items() if of[0].is_teacher)

    def add(self, model: str, run: Mapping[str, float]) -> None:
        """Add a result: to one of the model's that shares no metric with it, else as a new one."""
        _add_to(self.results.setdefault(model, []), run)

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
        found = [
            label
            for label in self.results
            if any(matches(wanted, one) for one in (label, *map(full_label, self._of(label))))
        ]
        students = [label for label in found if not self._is_reference(label)]
        if len(students) == 1:  # a run's name means its student, not its teachers
            return students[0]
        if len(found) > 1:
            raise UnknownNameError(f"{what} {wanted!r} may be {' or '.join(found)}; name one")
        if not found:
            raise UnknownNameError(f"no scores of {what} {wanted!r} ({_known(wanted, self)})")
        return found[0]

    def _is_reference(self, label: str) -> bool:
        return any(one.reference for one in self.subjects.get(label, []))

    def _of(self, label: str) -> list[Subject]:
        return [one for one in self.subjects.get(label, []) if one.is_known]

    def label_of(self, subject: Subject) -> str | None:
        """Return the label of a checkpoint's scores; None where it has none."""
        known = [(label, of) for label, members in self.subjects.items() for of in members]
        found = [label for label, of in known if replace(of, name=subject.name).is_same(subject)]
        return found[0] if found else None

    def remarks(self) -> tuple[str, ...]:
        """Say what a reader who compares these results must know: files, unlike sizes, teachers."""
        unlike = []
        for name, metric in self.definitions.items():
            sizes = self._by(name, lambda how: how.pixels)
            if metric.counts and len(sizes) > 1:
                parts = "; ".join(f"{size} ({', '.join(of)})" for size, of in sizes.items())
                unlike.append(f"{name} is at different sizes in pixels: {parts}.")
            teachers = self._by(name, lambda how: how.against)
            if metric.headline and len(teachers) > 1:
                parts = " and ".join(", ".join(of) for of in teachers.values())
                unlike.append(f"{name} is to different teachers of that name: {parts}.")
        return (*self.notes, *unlike)

    def _by(self, metric: str, value: Callable[[Measured], str]) -> dict[str, list[str]]:
        """Sort labels by how their metric was measured, where that is known."""
        found: dict[str, list[str]] = {}
        for label, metrics in self.measured.items():
            if metric in metrics and value(metrics[metric]):
                found.setdefault(value(metrics[metric]), []).append(label)
        return found

    def check_alike(self) -> None:
        """Raise DataError where a metric that counts is of other images for some model."""
        for name, metric in self.definitions.items():
            found = self._by(name, lambda how: how.of)
            if metric.counts and len(found) > 1:
                (less, one), (more, other) = list(found.items())[:2]
                raise DataError(
                    f"{name} is of {less} for {one[0]} and of {more} for {other[0]}; score both on "
                    "the same (radio-distill eval, --evaluation.limit 0), or leave one out with "
                    "--models"
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


def _add_to(runs: list[dict[str, float]], run: Mapping[str, float]) -> None:
    for known in runs:
        if not known.keys() & run.keys():
            known.update(run)
            return
    runs.append(dict(run))


def read_scores(paths: Iterable[str | Path], settled: Iterable[str] = ()) -> ScoreSet:
    """Read files and folders of scores into one set.

    Args:
        paths: files or folders, see the module's text.
        settled: metrics whose definition in the files does not matter, because another holds.

    Raises:
        DataError: a file that cannot be read or is not what it should be, with its line.
    """
    scores, tables, results = ScoreSet(), [], list[_Result]()
    for path in {path.resolve(): path for path in _files(paths)}.values():
        if path.suffix == ".jsonl":
            _read_json_lines(path, scores, frozenset(settled), results)
        elif path.suffix in (".csv", ".yaml", ".yml", ".json"):
            tables.append(path)
        else:
            raise DataError(f"{path}: scores are read from .jsonl, .yaml, .json and .csv files")
    _add_results(scores, results)
    for path in tables:
        own = ScoreSet()
        (_read_csv if path.suffix == ".csv" else _read_mapping)(path, own)
        for model, runs in own.results.items():
            _add_of_table(scores, path, model, runs)
    return scores


def _add_of_table(scores: ScoreSet, path: Path, model: str, runs: list[dict[str, float]]) -> None:
    """Add results that a person named; they may complete those of an evaluation, not repeat them.

    Raises:
        DataError: a metric that an evaluation has of a model of this name.
    """
    if model in scores.subjects:
        known = {name for run in scores.results[model] for name in run}
        for run in runs:
            twice = sorted(known & run.keys())
            if twice:
                raise DataError(
                    f"{path}: {model!r} has {twice[0]} already, of an evaluation; give the model "
                    "another name"
                )
    for run in runs:
        scores.add(model, run)


def write_scores(path: str | Path, subject: Subject, scores: Sequence[Score]) -> None:
    """Write the scores of ``subject`` as JSON lines, beside those of others already in the file.

    Earlier scores of the same model, or of an earlier training in the same place, are replaced; so
    are those without run, stage and step that lie in its run folder. The file is swapped in whole,
    so a reader never sees half of it.

    Raises:
        DataError: the file that is there holds something else.
    """
    path = Path(path)
    entries: list[tuple[Subject, dict[str, Any]]] = []
    if path.exists():
        for number, line in _json_lines(path):
            former = _subject_of(line, path, f"{path}, line {number}")
            if not _replaces(subject, former):
                entries.append((former, line))
    entries += [(subject, asdict(score)) for score in scores]
    known = list(dict.fromkeys(former for former, _ in entries if former.is_known))
    names = dict(zip(known, labels([[one] for one in known]), strict=True))
    with replacing(path) as draft:
        draft.write_text(
            "".join(json.dumps(_line(path, one, names, line)) + "\n" for one, line in entries),
            encoding="utf-8",
        )


def check_can_add(path: Path) -> None:
    """Raise DataError where a file is there that scores cannot be added to."""
    if path.exists():
        for number, line in _json_lines(path):
            _subject_of(line, path, f"{path}, line {number}")


def _replaces(subject: Subject, former: Subject) -> bool:
    if not former.is_known:
        return (former.folder, former.title) == (subject.folder, subject.title)
    return former.place == subject.place or former.is_same(subject)


def _line(
    path: Path, subject: Subject, names: Mapping[Subject, str], line: Mapping[str, Any]
) -> Mapping[str, Any]:
    if not subject.is_known:
        return line
    return {"subject": names[subject], **subject.to_line(path), **_without_subject(line)}


def _without_subject(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: line[key] for key in line if key not in ("subject", *FIELDS)}


def read_definitions(path: str | Path) -> dict[str, Metric]:
    """Read ``{metric: {group, higher_is_better, unit}}``, in the order of the file."""
    data = read_yaml(path)
    return {str(name): build(Metric, value, f"{path}: {name}") for name, value in data.items()}


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """Read a YAML mapping in which no key stands twice; raises DataError."""
    try:
        data = yaml.load(_text(Path(path)), _StrictLoader)
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not valid YAML: {reason_of(error)}") from error
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected a mapping of names, found {type(data).__name__}")
    return data


class _StrictLoader(yaml.SafeLoader):
    """A safe loader to which a repeated key is an error; YAML's own would drop the first value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key!r} stands twice; several results are a list under it")
        return super().construct_mapping(node, deep)


def _files(paths: Iterable[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            yield from _below(path)
        else:
            yield path


def _below(folder: Path) -> list[Path]:
    """List the files of scores below a folder; what may not be looked into is said."""
    closed: list[OSError] = []
    found = [
        Path(parent, SCORES)
        for parent, _, names in os.walk(folder, onerror=closed.append)
        if SCORES in names
    ]
    if not found and closed:
        raise DataError(f"{closed[0].filename} cannot be read: {reason_of(closed[0]).lower()}")
    if not found:
        raise DataError(f"{folder}: no {SCORES} in this folder or below it")
    for error in closed:
        logger.warning("passed over: %s cannot be read: %s", error.filename, reason_of(error))
    return sorted(found)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({reason_of(error)})") from error


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
            value = _number(score["value"], where, finite=False)
            fields = {key: score[key] for key in ("group", "higher_is_better")}
            subject = _subject_of(score, path, where)
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
    results += [result for found in own.values() for result in found]


def _measured(line: Mapping[str, Any]) -> Measured:
    details = line.get("details", {})
    return Measured(
        int(line.get("num_samples", 0)),
        str(line.get("pixels", "")),
        str(line.get("against", "")),
        ", ".join(f"{name} {value}" for name, value in dict(details).items()),
    )


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield number, _json_object(line, f"{path}, line {number}")


def _subject_of(line: Mapping[str, Any], path: Path, where: str) -> Subject:
    try:
        return subject_of_line(line, path)
    except KeyError as error:
        raise DataError(f"{where}: a score needs the field {error}") from error
    except ValueError as error:
        raise DataError(f"{where}: not a score: {error}") from error


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        score = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({reason_of(error)})") from error
    if not isinstance(score, dict):
        raise DataError(f"{where}: a score is an object, this is {type(score).__name__}")
    return score


def _read_mapping(path: Path, scores: ScoreSet) -> None:
    for model, given in read_yaml(path).items():
        for run in given if isinstance(given, list) else [given]:
            if not isinstance(run, dict):
                raise DataError(f"{path}: {model} should map metrics to values, not be {run!r}")
            where = f"{path}: {model}"
            numbers = {str(name): _number(value, f"{where}: {name}") for name, value in run.items()}
            scores.add(str(model), numbers)


def _read_csv(path: Path, scores: ScoreSet) -> None:
    lines = csv.reader(io.StringIO(_text(path), newline=""))
    names = next(lines, [])[1:]
    if not names or len(set(names)) < len(names):
        raise DataError(f"{path}: the first line should be model,METRIC,… with different metrics")
    for cells in lines:
        where = f"{path}, line {lines.line_num}"
        if not cells:
            continue
        if len(cells) != len(names) + 1:
            raise DataError(f"{where}: {len(cells)} cells under {len(names) + 1} headings")
        values = zip(names, cells[1:], strict=True)
        run = {name: _number(cell, where) for name, cell in values if cell.strip()}
        scores.add(cells[0], run)


def _number(value: Any, where: str, finite: bool = True) -> float:
    """Return a number; a student without any error has a fidelity that is not ``finite``."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number) or (finite and math.isinf(number)):
        raise DataError(f"{where}: {value!r} is not a finite number")
    return number
