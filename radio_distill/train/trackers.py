"""Where the numbers of a run go: always a JSON-lines file, TensorBoard when the recipe asks."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..protocols import MetricSink
from ..system.distributed import all_reduce_sum
from ..system.files import reason_of, replacing


class JsonLines:
    """``metrics.jsonl``: one object a log line, appended, so that a resumed run goes on in it.

    Args:
        path: the file.
        resume_step: lines beyond this step are dropped first: the steps are about to be run again.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        kept = [row for row in read_json_lines(path) if row["step"] <= resume_step]
        # A new file: a process of before, that does not know yet that it is none any more, goes on
        # to write into the old one, which has no name now.
        with replacing(path) as temporary:
            text = "".join(json.dumps(row) + "\n" for row in kept)
            temporary.write_text(text, encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line."""
        row = {"step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write nothing: the file is for numbers."""

    def close(self) -> None:
        """Close the file; what a full disk did not take is lost."""
        with suppress(OSError):
            self._file.close()


def read_json_lines(path: Path) -> list[dict[str, float]]:
    """Read what :class:`JsonLines` wrote, up to the first line that is none of its."""
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

    def __init__(self, folder: Path, resume_step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=resume_step + 1)

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


class Sinks:
    """Several sinks as one; none at all on processes that do not log."""

    def __init__(self, sinks: tuple[MetricSink, ...]):
        self._sinks = sinks

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for sink in self._sinks:
            sink.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write to each sink."""
        for sink in self._sinks:
            sink.write(step, values)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write to each sink."""
        for sink in self._sinks:
            sink.write_image(step, name, image)


def open_sinks(folder: Path, tensorboard: bool, is_main: bool, resume_step: int = 0) -> Sinks:
    """Open the sinks of a stage's folder; processes other than the main one get none."""
    if not is_main:
        return Sinks(())
    try:
        sinks: list[MetricSink] = [JsonLines(folder / "metrics.jsonl", resume_step)]
        if tensorboard:
            sinks.append(TensorBoard(folder / "tensorboard", resume_step))
    except OSError as error:
        raise ConfigError(
            f"cannot write logs in {folder}: {reason_of(error)}; make room, or move what is in "
            "the way"
        ) from error
    return Sinks(tuple(sinks))


class Meter:
    """Weighted means of named values; a name may be absent from a micro-batch or from a rank.

    Args:
        names: all names that any rank will report, in the same order on every rank.
        device: where the values live; nothing is copied to the host before :meth:`means`.
    """

    def __init__(self, names: Sequence[str], device: torch.device):
        self._names = list(names)
        self._sums = torch.zeros(2, len(self._names), dtype=torch.float64, device=device)

    def add(self, values: Mapping[str, Tensor], weight: float) -> None:
        """Add scalar means that stand for ``weight`` images."""
        for name, value in values.items():
            index = self._names.index(name)
            self._sums[0, index] += value.detach().double() * weight
            self._sums[1, index] += weight

    def means(self) -> dict[str, float]:
        """Return the means over all ranks since the last call, and start anew."""
        totals, weights = all_reduce_sum(self._sums).tolist()
        self._sums.zero_()
        return {
            name: total / weight
            for name, total, weight in zip(self._names, totals, weights, strict=True)
            if weight
        }
