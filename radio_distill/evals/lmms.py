"""Reads the results file of lmms-eval: what a vision-language model with a student in it can do.

``radio-distill score MINE=20260925_results.json …`` takes such files beside ``scores.jsonl``. Of
their tasks the eleven of FeatSharp's group VILA are read; without ``MINE=`` the model is called as
its folder is. lmms-eval itself is an outside program, see docs/vlm.md.
"""

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from ..errors import DataError
from .gain import Measured
from .headlines import HEADLINES
from .protocol import named_protocol
from .score_tables import number_of

_FACTORS = {"%": 100.0, "points": 1.0}
_OCR_POINTS = 1000  # OCRBench is given as a share of its 1000 points


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
