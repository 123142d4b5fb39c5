"""Checkpoints that are whole or absent.

::

    RUN/stage2/checkpoints/
        step-00001000/
            student.safetensors      body and heads, float32
            ema.safetensors          averaged body and heads, where the recipe has them
            optimizer.safetensors    moments and step
            statistics.safetensors   normalizers, one for each teacher: "<teacher>/<tensor>"
            loss.safetensors         dispersions and adapted weights, where the loss has them
            meta.json                step, recipe, teachers, versions, sha256 of the files above

A checkpoint is written to a hidden folder, flushed to the disk, and renamed: a crash or a full disk
leaves the former ones as they were. Reading verifies the sums and takes the newest that is whole.
Nothing that is read can run code. The data's position is the step alone, since the order of samples
is a function of seed and step.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import __version__
from ..config import Recipe, build, dump
from ..errors import CheckpointError, WeightsError
from ..files import flush, reason_of, sha256_of
from ..types import TeacherSpec
from .distributed import World, from_main

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
) -> Path:
    """Write a checkpoint, then delete the oldest beyond ``keep_last``.

    Raises:
        CheckpointError: where it cannot be written; former checkpoints are untouched.
    """
    final = root / f"step-{step:08d}"
    temporary = root / f".{final.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        for part, tensors in parts.items():
            contiguous = {name: value.contiguous() for name, value in tensors.items()}
            save_file(contiguous, temporary / f"{part}.safetensors")
        meta = {
            "step": step,
            "stage": stage,
            "recipe": dump(recipe),
            "teachers": {name: asdict(spec) for name, spec in teachers.items()},
            "versions": {"radio_distill": __version__, "torch": torch.__version__},
            "sha256": {
                f"{part}.safetensors": sha256_of(temporary / f"{part}.safetensors")
                for part in parts
            },
        }
        (temporary / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        _flush(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        flush(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"cannot write checkpoint {final}: {reason_of(error)}; former checkpoints are whole"
        ) from error
    _drop_old(root, keep_last)
    return final


def save_from_main(
    world: World, root: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], **meta: Any
) -> Path:
    """Write a checkpoint on rank 0 alone; every rank must call, and gets its folder.

    ``meta`` are the keyword arguments of :func:`save`.

    Raises:
        CheckpointError: on every rank, where rank 0 cannot write.
    """
    folder, problem = Path(), ""
    if world.is_main:
        try:
            folder = save(root, step, parts, **meta)
        except CheckpointError as error:
            problem = str(error)
    # Every process must learn of a failure, or the others would wait for rank 0 for ever.
    folder, problem = from_main((folder, problem))
    if problem:
        raise CheckpointError(problem)
    return folder


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        flush(path)
    flush(folder)


def _drop_old(root: Path, keep_last: int) -> None:
    for folder in _folders(root)[max(keep_last, 1) :]:
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
        for name, expected in meta["sha256"].items():
            if sha256_of(folder / name) != expected:
                raise CheckpointError(f"{folder / name} is damaged: its sha256 differs from {META}")
        return Checkpoint(
            folder, meta["step"], meta["stage"], _recipe(meta), specs_of(meta["teachers"])
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {reason_of(error)}") from error


def _recipe(meta: Mapping[str, Any]) -> Recipe:
    import yaml

    recipe: Recipe = build(Recipe, yaml.safe_load(meta["recipe"]))
    return recipe


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
