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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import build
from ..errors import DataError
from ..system.files import locked, reason_of, replacing
from ..types import Score
from .gain import Measured, Metric
from .headlines import HEADLINES
from .score_set import ScoreSet
from .score_tables import (
    SUFFIXES,
    called_file,
    is_lmms,
    number_of,
    read_json,
    read_lmms,
    read_table,
    read_text,
)
from .subjects import (
    FIELDS,
    SCORES,
    Subject,
    labels,
    seeds_of_one,
    subject_of_line,
)

logger = logging.getLogger(__name__)


def read_scores(paths: Iterable[str | Path], settled: Iterable[str] = ()) -> ScoreSet:
    """Read files and folders of scores into one set.

    Args:
        paths: files or folders, see the module's text.
        settled: metrics whose definition in the files does not matter, because another holds.

    Raises:
        DataError: a file that cannot be read or is not what it should be, with its line, or no
            score in any of them.
    """
    scores, tables, results = ScoreSet(), list[Path](), list[_Result]()
    given = frozenset(settled)
    called = dict(map(called_file, paths))
    for path in {path.resolve(): path for path in _files(called)}.values():
        if path.suffix.lower() == ".jsonl":
            _read_json_lines(path, scores, given, results)
        elif path.suffix.lower() in SUFFIXES:
            tables.append(path)
        else:
            problem = "scores are read from .jsonl, .yaml, .json and .csv files"
            raise DataError(f"{path}: {problem if path.exists() else 'nothing is there'}")
    _add_results(scores, results)
    evaluated = {
        label: {name for run in scores.results[label] for name in run} for label in scores.subjects
    }
    for path in tables:
        own = _read_table(path, called.get(path, ""))
        for model, runs in own.results.items():
            # It may complete the scores of an evaluation, not repeat them.
            if twice := sorted(
                evaluated.get(model, set()) & {name for run in runs for name in run}
            ):
                raise DataError(
                    f"{path}: {model!r} has {twice[0]} already, of an evaluation; give the model "
                    "another name"
                )
            for run in runs:
                scores.add(model, run)
            for name in HEADLINES.keys() & {name for run in runs for name in run} - given:
                scores.define(name, HEADLINES[name], str(path))
            scores.measured.setdefault(model, {}).update(own.measured.get(model, {}))
        scores.notes.extend(own.notes)
    if not scores.results:
        where = ", ".join(map(str, called))
        raise DataError(f"no scores in {where}; radio-distill eval makes them")
    return scores


def _read_table(path: Path, name: str) -> ScoreSet:
    """Read a table of anyone's own, or a results file of lmms-eval, whose model has ``name``."""
    own = ScoreSet()
    if path.suffix.lower() == ".json" and is_lmms(data := read_json(path)):
        read = read_lmms(data, str(path))
        model = name or read.model
        own.add(model, read.values)
        own.measured[model] = read.measured
        if read.passed_over:
            own.notes.append(f"{path}: not read: {', '.join(read.passed_over)}.")
        return own
    if name:
        raise DataError(f"{path}: NAME=FILE is for results of lmms-eval; a table names its models")
    for model, run in read_table(path):
        own.add(model, run)
    return own


def write_scores(path: str | Path, subject: Subject, scores: Sequence[Score]) -> None:
    """Write the scores of ``subject`` as JSON lines, beside those of others already in the file.

    Earlier scores of the same model by the same benchmarks are replaced, and all of an earlier
    training in the same place; so are those without run, stage and step that lie in its run folder.
    The file is swapped in whole, so a reader never sees half of it.

    Raises:
        DataError: the file that is there holds something else.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):  # others may add theirs to the same file
        _add_scores(path, subject, scores)


def _add_scores(path: Path, subject: Subject, scores: Sequence[Score]) -> None:
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
        raise DataError(f"{folder}: no {SCORES} here or below; radio-distill eval makes one")
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
            scores.files.setdefault(label, []).append(result.file)
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
