"""Scores and metric definitions that people write themselves: YAML, JSON and CSV.

* ``*.yaml``, ``*.yml``, ``*.json``: ``{model: {metric: value}}``; a list of such mappings under a
  model is several results of it.
* ``*.csv``: a heading ``model,METRIC,METRIC…``; a model on several lines has several results.
"""

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import build, parse_yaml
from ..errors import ConfigError, DataError
from ..system.files import reason_of
from .gain import Metric

SUFFIXES = (".csv", ".yaml", ".yml", ".json")


def read_table(path: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield a model and a result of it, one after another.

    Raises:
        DataError: the file cannot be read or is not what it should be, with its line.
    """
    yield from _read_csv(path) if path.suffix == ".csv" else _read_mapping(path)


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
