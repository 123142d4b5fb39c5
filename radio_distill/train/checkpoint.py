"""Checkpoints that are whole or absent.

::

    RUN/stage2/checkpoints/
        step-00001000/
            student.safetensors      body and heads, float32
            ema.safetensors          averaged body and heads, where the recipe has them
            optimizer.safetensors    moments and step
            statistics.safetensors   normalizers, one for each teacher: "<teacher>/<tensor>"
            loss.safetensors         dispersions and adapted weights, where the loss has them
            meta.json                step, recipe, teachers, shards, counts, versions, and sha256 of
                                     the files above

A checkpoint is written to a hidden folder, flushed to the disk, read back and compared with what
was in memory, and renamed; only then are older ones deleted. A crash or a full disk leaves the
former ones as they were. Reading verifies the sums and takes the newest that is whole. Nothing that
is read can run code.

No generator's state and no reader's position is kept, since there is none: the order of the
samples, the schedule, and what the generators of every rank draw in a step are functions of the
recipe and the step.
"""

import json
import logging
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..config import Recipe, build, dump
from ..errors import CheckpointError, ConfigError, WeightsError
from ..files import flush, reason_of, sha256_of
from ..types import TeacherSpec
from .tensor_file import verify, write_tensors

logger = logging.getLogger(__name__)

META = "meta.json"
STUDENT, EMA, OPTIMIZER, STATISTICS = "student", "ema", "optimizer", "statistics"
LOSS = "loss"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files were verified."""

    folder: Path
    step: int
    stage: str
    recipe: Recipe
    teachers: dict[str, TeacherSpec]
    shards: str = ""
    """Fingerprint of the shards that it was trained on."""
    counts: dict[str, int] = field(default_factory=dict)
    """What the run has counted so far, for instance skipped steps."""
    versions: dict[str, str] = field(default_factory=dict)

    def has(self, part: str) -> bool:
        """Return whether it holds that file (``ema`` and ``loss`` are optional)."""
        return (self.folder / f"{part}.safetensors").exists()

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Read one of its files; raises CheckpointError where it is damaged."""
        path = self.folder / f"{part}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged: {reason_of(error)}") from error

    def student_tensors(self) -> dict[str, Tensor]:
        """Weights to use: the averaged ones where there are any."""
        return self.tensors(EMA if self.has(EMA) else STUDENT)


def save(
    root: Path,
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    *,
    stage: str,
    recipe: Recipe,
    teachers: Mapping[str, TeacherSpec],
    keep_last: int,
    keep_every: int = 0,
    shards: str = "",
    counts: Mapping[str, int] | None = None,
    may_write: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint, then delete the oldest.

    Args:
        root: folder of a stage's checkpoints.
        step: steps that were done.
        parts: tensors of each file, on the host.
        keep_last: newest checkpoints that are kept.
        keep_every: those of its multiples are kept too; 0 for none.
        shards: fingerprint of the data.
        counts: what the run has counted.
        may_write: called before the checkpoint appears; raises where it must not.

    Raises:
        CheckpointError: where it cannot be written; former checkpoints are untouched.
    """
    final = root / f"step-{step:08d}"
    temporary = root / f".{final.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        sums = {}
        for part, tensors in parts.items():
            name = f"{part}.safetensors"
            sums[name] = write_tensors(temporary / name, tensors)
        meta = {
            "step": step,
            "stage": stage,
            "recipe": dump(recipe),
            "teachers": {name: asdict(spec) for name, spec in teachers.items()},
            "shards": shards,
            "counts": dict(counts or {}),
            "versions": versions(),
            "sha256": sums,
        }
        (temporary / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        flush(temporary / META)
        for name, expected in sums.items():
            verify(temporary / name, expected)
        flush(temporary)
        may_write()
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        flush(root)
    except OSError as error:
        raise CheckpointError(
            f"cannot write checkpoint {final}: {reason_of(error)}; former checkpoints are whole: "
            "make room, or choose another --output, and go on with --resume"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _drop_old(root, keep_last, keep_every)
    return final


def versions() -> dict[str, str]:
    """Return the versions of what computes the numbers of a run."""
    found = {"python": platform.python_version()}
    for name in ("radio-distill", "torch", "numpy", "timm", "deepspeed", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def clear_unfinished(root: Path) -> None:
    """Delete what a killed process has begun to write; only the owner of the folder may call."""
    for folder in root.glob(".step-*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def _drop_old(root: Path, keep_last: int, keep_every: int) -> None:
    for folder in _folders(root)[keep_last:]:
        step = int(folder.name.removeprefix("step-"))
        if not keep_every or step % keep_every:
            shutil.rmtree(folder)


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted(root.glob("step-" + "[0-9]" * 8), reverse=True)


def read(folder: Path) -> Checkpoint:
    """Open a checkpoint and verify its files.

    Raises:
        CheckpointError: where it is damaged or not a checkpoint.
    """
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        _verify_parts(folder, meta["sha256"])
        recipe: Recipe = build(Recipe, yaml.safe_load(meta["recipe"]))
        return Checkpoint(
            folder,
            _whole_number(meta["step"]),
            str(meta["stage"]),
            recipe,
            specs_of(meta["teachers"]),
            str(meta.get("shards", "")),
            {str(name): _whole_number(count) for name, count in meta.get("counts", {}).items()},
            {str(name): str(text) for name, text in meta.get("versions", {}).items()},
        )
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {reason_of(error)}") from error
    except (ConfigError, yaml.YAMLError) as error:
        reason = reason_of(error).partition("\n")[0]
        raise CheckpointError(f"{folder}: {META} holds no recipe: {reason}") from error


def _verify_parts(folder: Path, sums: Mapping[str, str]) -> None:
    present = {path.name for path in folder.glob("*.safetensors")}
    if not present or present != set(sums):
        raise CheckpointError(
            f"{folder} is not a whole checkpoint: it has the files {', '.join(sorted(present))}, "
            f"{META} names {', '.join(map(repr, sums))}"
        )
    for name in present:
        if sha256_of(folder / name) != sums[name]:
            raise CheckpointError(f"{folder / name} is damaged: its sha256 differs from {META}")


def _whole_number(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def specs_of(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, TeacherSpec]:
    """Return the specs of teachers, by name, that were written as JSON."""
    specs = {}
    for name, row in rows.items():
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in row.items()
        }
        specs[name] = TeacherSpec(**values)
    return specs


def newest(root: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint under ``root``, saying which ones were passed over."""
    for folder in _folders(root):
        try:
            return read(folder)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
    return None


def find(path: Path) -> Checkpoint:
    """Open a checkpoint folder, or the newest of a stage's or a ``checkpoints`` folder.

    Raises:
        CheckpointError: where there is none.
    """
    if (path / META).exists():
        return read(path)
    checkpoint = newest(path / "checkpoints") or newest(path)
    if checkpoint is None:
        raise CheckpointError(f"no whole checkpoint in {path}")
    return checkpoint


def check_teachers(checkpoint: Checkpoint, teachers: Mapping[str, TeacherSpec]) -> None:
    """Raise WeightsError where a student's heads do not fit the recipe's teachers."""
    if set(teachers) == set(checkpoint.teachers) and list(teachers) != list(checkpoint.teachers):
        raise WeightsError(
            f"{checkpoint.folder}: summary tokens are bound to teachers by their order, which was "
            f"{', '.join(checkpoint.teachers)}; list the recipe's teachers in that order"
        )
    for name, spec in teachers.items():
        known = checkpoint.teachers.get(name)
        if known is None:
            raise WeightsError(
                f"{checkpoint.folder} has no head for teacher {name!r} "
                f"(it knows {', '.join(checkpoint.teachers)}); train the earlier stage with it"
            )
        if (known.channels, known.summary_channels) != (spec.channels, spec.summary_channels):
            raise WeightsError(
                f"{checkpoint.folder}: the head of {name!r} predicts {known.channels} channels, "
                f"the teacher has {spec.channels}; it was trained on another teacher"
            )
