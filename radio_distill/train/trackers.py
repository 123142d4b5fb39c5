"""Where the numbers of a run go: ``metrics.jsonl``, and the trackers that the recipe names.

A tracker other than that file may fail, at its start or later, for instance without a network: it
is warned of once, left out, and the run goes on.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..protocols import Tracker
from ..stage import Stage
from ..system.files import reason_of, replacing
from ..system.nested import leaves, plain_data
from ..system.redaction import redact

logger = logging.getLogger(__name__)

LOG = "metrics.jsonl"

PROJECT = "radio-distill"
"""Name of the project or experiment, unless the tracker's own environment variable says another."""

WriteImage = Callable[[int, str, np.ndarray], None]
"""Takes step, name, and an image ``[h, w, 3]`` uint8."""

_IDS = "trackers.json"
"""Identifiers that trackers gave to the run, so that a resumed one goes on in it."""


class JsonLines:
    """``metrics.jsonl``: one object a log line, appended, so that a resumed run goes on in it.

    Args:
        path: the file.
        resume_step: lines beyond this step are dropped first: the steps are about to be run again.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        rewind(path, resume_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line."""
        row = {"step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; what a full disk did not take is lost."""
        with suppress(OSError):
            self._file.close()


def rewind(path: Path, step: int) -> None:
    """Keep the lines of a log up to a step: those beyond are about to be written again.

    It becomes a new file: an earlier process that has lost the folder, and does not know it yet,
    goes on to write into the old one, which has no name now.
    """
    kept = [row for row in read_json_lines(path) if row["step"] <= step]
    with replacing(path) as temporary:
        text = "".join(json.dumps(row) + "\n" for row in kept)
        temporary.write_text(text, encoding="utf-8")


def read_json_lines(path: Path) -> list[dict[str, float]]:
    """Read what :class:`JsonLines` wrote, up to the first line that it did not."""
    rows: list[dict[str, float]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                break
            rows.append(row)
    return rows


class TensorBoard:
    """TensorBoard events under ``tensorboard/``."""

    def __init__(self, stage: Stage, resume_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(stage.folder / "tensorboard", purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add each value as a scalar."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Add ``[h, w, 3]`` uint8."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class _Run:
    """The run that was begun last with wandb, or with trackio, which has the same functions."""

    def __init__(self, library: Any):
        self._library = library

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log all values of a step."""
        self._library.log(dict(values), step=step)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Log ``[h, w, 3]`` uint8."""
        self._library.log({name: self._library.Image(image)}, step=step)

    def close(self) -> None:
        """Upload, or write, what is left."""
        self._library.finish()


def wandb_run(stage: Stage, resume_step: int) -> Tracker:
    """Begin a run of Weights & Biases, for which WANDB_PROJECT, _ENTITY and _MODE hold."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or PROJECT,
        group=stage.recipe.name,
        name=_run_name(stage),
        id=_earlier_id(stage, "wandb", resume_step),
        resume="allow",
        dir=stage.folder,
        config=_settings(stage),
    )
    _keep_id(stage, "wandb", run.id)
    return _Run(wandb)


def trackio_run(stage: Stage, resume_step: int) -> Tracker:
    """Begin a run of trackio, in TRACKIO_DIR, or in the space of TRACKIO_SPACE_ID."""
    import trackio

    name = _earlier_id(stage, "trackio", resume_step)
    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT") or PROJECT,
        name=name or f"{_run_name(stage)} {time.strftime('%Y-%m-%d %H:%M:%S')}",
        group=stage.recipe.name,
        space_id=os.environ.get("TRACKIO_SPACE_ID") or None,
        resume="allow",
        config=_settings(stage),
        embed=False,
    )
    _keep_id(stage, "trackio", run.name)
    return _Run(trackio)


class MLflow:
    """A run of MLflow, on the server or in the files of MLFLOW_TRACKING_URI."""

    def __init__(self, stage: Stage, resume_step: int):
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = client.get_experiment_by_name(name)
        run = _earlier_id(stage, "mlflow", resume_step)
        if run is None:
            number = experiment.experiment_id if experiment else client.create_experiment(name)
            run = client.create_run(number, run_name=_run_name(stage)).info.run_id
            fields = leaves(_settings(stage), "whole")
            settings = [Param(".".join(path), str(value)[:500]) for path, value in fields]
            for start in range(0, len(settings), 100):  # the most that a server takes at once
                client.log_batch(run, params=settings[start : start + 100])
        else:
            client.update_run(run, status="RUNNING")
        self._id = run
        _keep_id(stage, "mlflow", run)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log all values of a step."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Log ``[h, w, 3]`` uint8."""
        self._client.log_image(self._id, image, key=name, step=step)

    def close(self) -> None:
        """Say that the run has ended."""
        self._client.set_terminated(self._id)


TRACKERS: dict[str, Callable[[Stage, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": wandb_run,
    "trackio": trackio_run,
    "mlflow": MLflow,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker whose package is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(
                f"log.trackers: {name} is not installed; run `pip install radio-distill[{name}]`, "
                "or take it out of log.trackers"
            )


class Trackers:
    """``metrics.jsonl`` and several trackers as one; none at all on processes that do not log."""

    def __init__(self, log: JsonLines | None = None, others: Mapping[str, Tracker] | None = None):
        self._log, self._others = log, dict(others or {})

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._log is not None:
            self._log.close()
        self._tell(lambda tracker: tracker.close())

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write to all; raises OSError where ``metrics.jsonl`` cannot be written."""
        if self._log is not None:
            self._log.write(step, values)
        self._tell(lambda tracker: tracker.write(step, values))

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write ``[h, w, 3]`` uint8 to those trackers that take images."""
        self._tell(lambda tracker: tracker.write_image(step, name, image))

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._others.items()):
            try:
                call(tracker)
            except Exception as error:  # whatever a tracker's package raises
                _warn(name, error)
                del self._others[name]


def open_trackers(stage: Stage, is_main: bool, resume_step: int = 0) -> Trackers:
    """Open the log and the trackers of a stage; processes other than the main one get none.

    Raises ConfigError where ``metrics.jsonl`` cannot be written.
    """
    if not is_main:
        return Trackers()
    try:
        log = JsonLines(stage.folder / LOG, resume_step)
    except OSError as error:
        raise ConfigError(
            f"cannot write logs in {stage.folder}: {reason_of(error)}; make room, or move what is "
            "in the way"
        ) from error
    others: dict[str, Tracker] = {}
    for name in stage.log.trackers:
        try:
            others[name] = TRACKERS[name](stage, resume_step)
        except Exception as error:  # whatever a tracker's package raises
            _warn(name, error)
    return Trackers(log, others)


def _warn(name: str, error: Exception) -> None:
    logger.warning("log.trackers: %s failed and is left out: %s", name, reason_of(error))


def _run_name(stage: Stage) -> str:
    return f"{stage.recipe.name}/{stage.folder.name}"


def _settings(stage: Stage) -> dict[str, Any]:
    """Return the resolved recipe as plain values, with nothing in it that looks like a secret."""
    settings: dict[str, Any] = _redacted(plain_data(stage.recipe))
    return settings


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def _earlier_id(stage: Stage, name: str, resume_step: int) -> str | None:
    """Return what a tracker called the run that is resumed; None for a new run."""
    if not resume_step:
        return None
    with suppress(OSError, ValueError, AttributeError):
        earlier = json.loads((stage.folder / _IDS).read_text(encoding="utf-8")).get(name)
        return earlier if isinstance(earlier, str) else None
    return None


def _keep_id(stage: Stage, name: str, value: str) -> None:
    path, ids = stage.folder / _IDS, {}
    with suppress(OSError, ValueError):
        ids = json.loads(path.read_text(encoding="utf-8"))
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({**ids, name: value}), encoding="utf-8")
