"""The format of checkpoints, and reading them; :mod:`.checkpointer` writes them.

::

    RUN/stage2/checkpoints/
        step-00001000/
            student.safetensors      body and heads, float32
            ema.safetensors          EMA of body and heads, where the recipe has one
            anchor.safetensors       the stage's start, where the loss is anchored to it
            optimizer.safetensors    moments and step
            statistics.safetensors   normalizers, one for each teacher: "<teacher>/<tensor>"
            loss.safetensors         dispersions and adapted weights, where the loss has them
            meta.json                step, recipe, teachers, shards, counts, versions, and sha256 of
                                     the files above and of itself
        best                         link to the checkpoint with the best score, where one is kept

The checkpoint of a fit has upsampler.safetensors and optimizer.safetensors. Reading verifies the
checksums and takes the newest checkpoint that is whole. Nothing that is read can run code.

No generator's state and no reader's position is kept, since there is none: the order of the
samples, the schedule, and what the generators of every rank draw in a step are functions of the
recipe and the step.
"""

import hashlib
import json
import logging
import platform
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .. import __version__
from ..config import Recipe, build, parse_yaml, with_new_names
from ..errors import CheckpointError, ConfigError, UnreadableError, WeightsError
from ..system.files import is_there, reason_of, refuse_unreadable, sha256_of, unreadable
from ..types import TeacherSpec

logger = logging.getLogger(__name__)

META, BEST = "meta.json", "best"
STUDENT, EMA, OPTIMIZER, STATISTICS = "student", "ema", "optimizer", "statistics"
ANCHOR = "anchor"
LOSS = "loss"

_SEAL = "seal"
_NAME = re.compile(r"step-\d{8}")
_MOST_CHANNELS = 1 << 20
_MOST_META = 64 << 20  # bytes


@dataclass(frozen=True)
class Origin:
    """Where a student came from, beside its recipe, its shards and its teachers."""

    start: str = ""
    """Checksum of the student that its stage started from; empty for a new one."""
    changed: tuple[str, ...] = ()
    """What was changed on the way because that was allowed, each with the step it was after."""


@dataclass(frozen=True)
class Best:
    """The best score of a run so far, and the step that had it."""

    metric: str
    """``BENCHMARK/METRIC``."""
    score: float
    step: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder: one that was read, or one that is about to be written."""

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
    world_size: int = 1
    """Processes that it was trained on."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Checksum of each of its files."""
    origin: Origin = field(default_factory=Origin)
    best: Best | None = None
    """Where the recipe has ``evaluation.best``."""

    def has(self, part: str) -> bool:
        """Return whether it holds that file (``ema`` and ``loss`` are optional)."""
        return (self.folder / f"{part}.safetensors").exists()

    def tensors(self, part: str, names: Collection[str] = ()) -> dict[str, Tensor]:
        """Read one of its files, or some tensors of it; raises CheckpointError where damaged."""
        path = self.folder / f"{part}.safetensors"
        refuse_unreadable(path, UnreadableError)
        try:
            if not names:
                return load_file(path)
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged: {reason_of(error)}") from error

    def student_tensors(self, names: Collection[str] = ()) -> dict[str, Tensor]:
        """Weights to use, or some of them: those of the EMA where there is one."""
        return self.tensors(EMA if self.has(EMA) else STUDENT, names)

    @property
    def weights_sha256(self) -> str:
        """Checksum of the weights to use: it is equal for equal students, wherever they lie."""
        return _weights_of(self.sha256)


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``meta.json`` with a sha256 over all of it."""
    content = {name: value for name, value in meta.items() if name != _SEAL}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    return {**content, _SEAL: digest.hexdigest()}


def versions() -> dict[str, str]:
    """Return the versions of what computes the numbers of a run."""
    found = {"radio-distill": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "timm", "deepspeed", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def folder_of(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint after ``step`` steps."""
    return root / f"step-{step:08d}"


def checkpoint_folders(root: Path) -> list[Path]:
    """List what has the name of a checkpoint, newest first."""
    return sorted(root.glob("step-" + "[0-9]" * 8), reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def read(folder: Path, verified: bool = True) -> Checkpoint:
    """Open a checkpoint and verify its files; else they must be there, and are not read.

    Raises:
        CheckpointError: where it is damaged or not a checkpoint.
    """
    meta = _read_meta(folder)
    try:
        _check_parts(folder, meta["sha256"])
        if verified:
            _verify_parts(folder, meta["sha256"])
        recipe: Recipe = build(Recipe, with_new_names(parse_yaml(meta["recipe"])))
        return Checkpoint(
            folder,
            _whole_number(meta["step"]),
            str(meta["stage"]),
            recipe,
            specs_of(meta["teachers"]),
            str(meta.get("shards", "")),
            {str(name): _whole_number(count) for name, count in meta.get("counts", {}).items()},
            {str(name): str(text) for name, text in meta.get("versions", {}).items()},
            _whole_number(meta.get("world_size", 1)),
            dict(meta["sha256"]),
            _origin_of(meta.get("origin", {})),
            _best_of(meta.get("best")),
        )
    except CheckpointError:
        raise
    except PermissionError as error:
        raise UnreadableError(unreadable(error)) from error
    except ConfigError as error:
        reason = reason_of(error).partition("\n")[0]
        raise CheckpointError(f"{folder}: {META} holds no recipe: {reason}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {reason_of(error)}") from error


def _origin_of(row: Mapping[str, Any]) -> Origin:
    return Origin(str(row.get("start", "")), tuple(map(str, row.get("changed", ()))))


def _best_of(row: Mapping[str, Any] | None) -> Best | None:
    if row is None:
        return None
    return Best(str(row["metric"]), float(row["score"]), _whole_number(row["step"]))


def _weights_of(sums: Mapping[str, str]) -> str:
    return sums.get(f"{EMA}.safetensors") or sums[f"{STUDENT}.safetensors"]


def student_checksum(path: Path) -> str:
    """Return ``weights_sha256`` of a stage's newest checkpoint, or of a checkpoint's folder.

    As its ``meta.json`` has it: no file is verified. Empty where there is no checkpoint.
    """
    folders = (
        [path]
        if is_there(path / META)
        else checkpoint_folders(path / "checkpoints") or checkpoint_folders(path)
    )
    for folder in folders:
        try:
            return _weights_of(_read_meta(folder)["sha256"])
        except (CheckpointError, KeyError):
            continue
    return ""


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META
    try:
        if not path.is_file() or path.stat().st_size > _MOST_META:  # a pipe would never end
            raise ValueError("missing, or no file of a checkpoint")
        meta = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(meta, dict) or meta != sealed(meta):
            raise ValueError("its sha256 over itself differs")
        if _NAME.fullmatch(folder.name) and meta["step"] != step_of(folder):
            raise ValueError(f"it is of step {meta['step']!r}")
    except PermissionError as error:
        raise UnreadableError(unreadable(error)) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = reason_of(error)
        raise CheckpointError(f"{folder} is not a whole checkpoint: {META}: {reason}") from error
    return meta


def _check_parts(folder: Path, sums: Mapping[str, str]) -> None:
    present = {path.name for path in folder.glob("*.safetensors") if path.is_file()}
    if not present or present != set(sums):
        raise CheckpointError(
            f"{folder} is not a whole checkpoint: it has the files {', '.join(sorted(present))}, "
            f"{META} names {', '.join(map(repr, sums))}"
        )


def _verify_parts(folder: Path, sums: Mapping[str, str]) -> None:
    for name, expected in sums.items():
        if sha256_of(folder / name) != expected:
            raise CheckpointError(f"{folder / name} is damaged: its sha256 differs from {META}")


def _whole_number(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a count")
    return value


def specs_of(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, TeacherSpec]:
    """Return the specs of teachers, by name, that were written as JSON.

    Raises ValueError for names and sizes that no teacher has.
    """
    specs = {}
    for name, row in rows.items():
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in row.items()
        }
        spec = specs[name] = TeacherSpec(**values)
        if not isinstance(spec.name, str):
            raise ValueError(f"teacher {name} is called {spec.name!r}")
        for size in (spec.channels, spec.summary_channels or 1, spec.patch_size):
            if not isinstance(size, int) or not 0 < size <= _MOST_CHANNELS:
                raise ValueError(f"teacher {name} has {size!r} channels or pixels")
    return specs


def newest(root: Path, stage: str = "", verified: bool = True) -> Checkpoint | None:
    """Return the newest whole checkpoint under ``root``, saying which ones were passed over.

    Where a stage is named, those of another are passed over too. ``verified`` as for :func:`read`.

    Raises:
        UnreadableError: where one may not be read; it may be the newest.
    """
    refuse_unreadable(root, UnreadableError)
    for folder in checkpoint_folders(root):
        try:
            checkpoint = read(folder, verified)
            if stage and checkpoint.stage != stage:
                raise CheckpointError(f"{folder} is of {checkpoint.stage!r}, not of {stage}")
            return checkpoint
        except UnreadableError:
            raise
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
    return None


def find(path: Path, verified: bool = True) -> Checkpoint:
    """Open a checkpoint folder, or the newest of a stage's or a ``checkpoints`` folder.

    ``verified`` as for :func:`read`.

    Raises:
        CheckpointError: where there is none, or where it may not be read.
    """
    refuse_unreadable(path, UnreadableError)
    if not is_there(path):
        raise CheckpointError(f"no whole checkpoint in {path}, which is not there")
    if is_there(path / META):
        return read(path, verified)
    folders = path / "checkpoints", path
    checkpoint = newest(folders[0], verified=verified) or newest(folders[1], verified=verified)
    if checkpoint is None:
        raise CheckpointError(f"no whole checkpoint in {path}")
    return checkpoint


def check_teachers(
    checkpoint: Checkpoint, teachers: Mapping[str, TeacherSpec], with_heads: bool = True
) -> None:
    """Raise WeightsError where a student's tokens, or its heads, do not fit a recipe's teachers."""
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
        widths = known.channels, known.summary_channels
        if with_heads and widths != (spec.channels, spec.summary_channels):
            raise WeightsError(
                f"{checkpoint.folder}: the head of {name!r} predicts {known.channels} channels, "
                f"the teacher has {spec.channels}; it was trained on another teacher"
            )
