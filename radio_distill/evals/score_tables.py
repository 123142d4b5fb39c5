"""Scores that this project has not measured: tables that people write, and lmms-eval's results.

* ``*.yaml``, ``*.yml``, ``*.json``: ``{model: {metric: value}}``; a list of such mappings under a
  model is several results of it.
* ``*.csv``: a heading ``model,METRIC,METRIC…``; a model on several lines has several results.
* a results file of lmms-eval, an outside program (docs/vlm.md): what a vision-language model with a
  student in it can do. The eleven tasks of FeatSharp's group VILA are read. Without ``MINE=``
  before the file's name the model is called as its folder is.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from ..config import build, parse_yaml
from ..errors import ConfigError, DataError
from ..system.files import reason_of
from .gain import Measured, Metric
from .headlines import HEADLINES
from .protocol import named_protocol

SUFFIXES = (".csv", ".yaml", ".yml", ".json")
_FACTORS = {"%": 100.0, "points": 1.0}
_OCR_POINTS = 1000  # OCRBench is given as a share of its 1000 points


def read_table(path: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield a model and a result of it, one after another.

    Raises:
        DataError: the file cannot be read or is not what it should be, with its line.
    """
    yield from _read_csv(path) if path.suffix.lower() == ".csv" else _read_mapping(path)


def read_definitions(path: str | Path) -> dict[str, Metric]:
    """Read ``{metric: {group, higher_is_better, unit}}``, in the order of the file."""
    data = read_yaml(path)
    return {str(name): build(Metric, value, f"{path}: {name}") for name, value in data.items()}


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """Read a YAML mapping in which no key stands twice; raises DataError."""
    try:
        data = parse_yaml(read_text(Path(path)))
    except ConfigError as error:
        raise DataError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected a mapping of names, found {type(data).__name__}")
    return data


def read_json(path: Path) -> Any:
    """Read a JSON file; raises DataError."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {reason_of(error)}") from error


def read_text(path: Path) -> str:
    """Return the text of a file; raises DataError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({reason_of(error)})") from error


def number_of(value: Any, where: str, finite: bool = True) -> float:
    """Return a number; a student without any error has a fidelity that is not ``finite``."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number) or (finite and math.isinf(number)):
        raise DataError(f"{where}: {value!r} is not a finite number")
    return number


def _read_mapping(path: Path) -> Iterator[tuple[str, dict[str, float]]]:
    for model, given in read_yaml(path).items():
        for run in given if isinstance(given, list) else [given]:
            if not isinstance(run, dict):
                raise DataError(f"{path}: {model} should map metrics to values, not be {run!r}")
            yield (
                str(model),
                {str(k): number_of(v, f"{path}: {model}: {k}") for k, v in run.items()},
            )


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, float]]]:
    lines = csv.reader(io.StringIO(read_text(path), newline=""))
    names = next(lines, [])[1:]
    if not names or len(set(names)) < len(names):
        raise DataError(f"{path}: the first line should be model,METRIC,… with different metrics")
    for cells in filter(None, lines):
        where = f"{path}, line {lines.line_num}"
        if len(cells) != len(names) + 1:
            raise DataError(f"{where}: {len(cells)} cells under {len(names) + 1} headings")
        values = zip(names, cells[1:], strict=True)
        yield cells[0], {name: number_of(cell, where) for name, cell in values if cell.strip()}


class LmmsResults(NamedTuple):
    """One results file."""

    model: str
    values: dict[str, float]
    """By ``task/metric``, in the units of the published tables."""
    measured: dict[str, Measured]
    passed_over: tuple[str, ...]
    """Tasks that are none of the eleven."""


def called_file(path: str | Path) -> tuple[Path, str]:
    """Split ``NAME=FILE``, where no file is called so, into the file and what its model is called.

    The name is empty where none is given.
    """
    name, equals, file = str(path).partition("=")
    if equals and file and not Path(path).exists() and Path(file).exists():
        return Path(file), name
    return Path(path), ""


def is_lmms(data: Any) -> bool:
    """Return whether a JSON value is a results file of lmms-eval, and not a table of scores."""
    return isinstance(data, dict) and {"results", "configs", "n-samples"} <= data.keys()


def read_lmms(data: Mapping[str, Any], where: str) -> LmmsResults:
    """Read a results file.

    Args:
        data: what :func:`is_lmms` says yes to.
        where: its name, for errors.

    Raises:
        DataError: none of the eleven tasks, or a task without its metric.
    """
    values, measured = dict[str, float](), dict[str, Measured]()
    tasks = {name.partition("/")[0]: name for name in HEADLINES if HEADLINES[name].group == "VILA"}
    for task, name in tasks.items():
        if task not in data["results"]:
            continue
        metric = name.partition("/")[2]
        # A key is METRIC,FILTER, and which filter a task has depends on its version.
        found = [v for key, v in data["results"][task].items() if key.split(",")[0] == metric]
        if not found:
            raise DataError(f"{where}: task {task} has no {metric}; has lmms-eval renamed it?")
        factor = _OCR_POINTS if task == "ocrbench" else _FACTORS[HEADLINES[name].unit]
        values[name] = factor * number_of(found[0], f"{where}: {task}")
        samples = data["n-samples"].get(task, {})
        count = int(samples.get("effective", 0))
        measured[name] = Measured(count, protocol=_protocol(task, data))
    if not values:
        raise DataError(f"{where}: none of the tasks of group VILA ({', '.join(tasks)})")
    others = tuple(task for task in data["results"] if task not in tasks)
    model = PurePath(str(data.get("model_name", "") or PurePath(where).stem)).name
    return LmmsResults(model, values, measured, others)


def _protocol(task: str, data: Mapping[str, Any]) -> str:
    """Sum up a task's configuration, less what is a place in somebody's memory."""
    config = {
        key: value
        for key, value in data["configs"].get(task, {}).items()
        if not str(value).startswith("<function") and key != "metric_list"
    }
    return named_protocol(task, config)
