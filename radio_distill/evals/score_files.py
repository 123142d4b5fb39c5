"""Read scores and metric definitions: JSON lines of an evaluation, YAML or CSV of anyone's own.

* ``*.jsonl``: one score a line, as an evaluation writes it; it brings its own definitions.
* ``*.yaml``, ``*.yml``, ``*.json``: ``{model: {metric: value}}``; a list of such mappings under a
  model is several results of it.
* ``*.csv``: a heading ``model,METRIC,METRIC…``; a model on several lines has several results.
* a folder: every ``scores.jsonl`` below it.

The same model and metric in two places are two results (two seeds). Nothing here needs torch.
"""

import csv
import io
import json
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..config import build
from ..errors import DataError
from ..files import reason_of
from .mtl_gain import Metric

SCORES = "scores.jsonl"


@dataclass(frozen=True, slots=True)
class ScoreSet:
    """Results of several models, and what is known of their metrics."""

    results: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    definitions: dict[str, Metric] = field(default_factory=dict)

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


def read_scores(paths: Iterable[str | Path], settled: Iterable[str] = ()) -> ScoreSet:
    """Read files and folders of scores into one set.

    Args:
        paths: files or folders, see the module's text.
        settled: metrics whose definition in the files does not matter, because another holds.

    Raises:
        DataError: a file that cannot be read or is not what it should be, with its line.
    """
    scores = ScoreSet()
    for path in _files(paths):
        if path.suffix == ".jsonl":
            _read_json_lines(path, scores, frozenset(settled))
        elif path.suffix == ".csv":
            _read_csv(path, scores)
        elif path.suffix in (".yaml", ".yml", ".json"):
            _read_mapping(path, scores)
        else:
            raise DataError(f"{path}: scores are read from .jsonl, .yaml, .json and .csv files")
    return scores


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
            found = sorted(path.rglob(SCORES))
            if not found:
                raise DataError(f"{path}: no {SCORES} in this folder or below it")
            yield from found
        else:
            yield path


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({reason_of(error)})") from error


def _read_json_lines(path: Path, scores: ScoreSet, settled: frozenset[str]) -> None:
    repeats: dict[str, ScoreSet] = {}
    for number, line in enumerate(_text(path).split("\n"), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        score = _json_object(line, where)
        try:
            subject, name = str(score["subject"]), f"{score['benchmark']}/{score['metric']}"
            value = _number(score["value"], where)
            fields = {key: score[key] for key in ("group", "higher_is_better")}
        except KeyError as error:
            raise DataError(f"{where}: a score needs the field {error}") from error
        if name not in settled:
            fields["unit"] = score.get("unit", "")
            fields["headline"] = score.get("headline", True)
            scores.define(name, build(Metric, fields, where), where)
        repeats.setdefault(subject, ScoreSet()).add(subject, {name: value})
    for subject, own in repeats.items():
        for run in own.results[subject]:
            scores.add(subject, run)


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


def _number(value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: {value!r} is not a finite number")
    return number
