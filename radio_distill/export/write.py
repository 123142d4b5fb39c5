"""Writes a student in any format: checked first, read back and compared, whole or absent."""

import json
import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..errors import ExportError
from ..system.files import flush, reason_of
from ..types import Size
from .folded import FoldedStudent
from .model_card import model_card

logger = logging.getLogger(__name__)


class Format(ABC):
    """What one library reads: how a student is written for it, and read back."""

    name: ClassVar[str]
    tolerance: ClassVar[float] = 0.0
    """Largest difference from the student, see :func:`check_equal`."""

    def for_student(self, student: FoldedStudent) -> "Format":
        """Return what writes this student: itself, or what a library has for other bodies."""
        return self

    @abstractmethod
    def check(self, student: FoldedStudent) -> None:
        """Raise ExportError where the format cannot hold a student, with the reason."""

    @abstractmethod
    def write(self, student: FoldedStudent, folder: Path) -> str:
        """Write the files; returns the name of the main one, or nothing for the folder itself."""

    @abstractmethod
    def usage(self, student: FoldedStudent) -> str:
        """Return how the files are loaded, as Markdown."""

    def read_back(
        self, student: FoldedStudent, folder: Path
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Yield the student's outputs and those of what was written, for several images.

        Of nothing, where no reader is at hand.
        """
        yield from ()


@torch.no_grad()
def export(student: FoldedStudent, folder: Path, form: Format) -> Path:
    """Write a student with its model card into a new folder; returns the main file.

    The log says the largest difference of what the format's library reads from the student.

    Raises:
        ExportError: where the format cannot hold the student, its library reads another model than
            was written, or the folder cannot be written.
        ConfigError, UnknownNameError: an option of the format that does not fit the student.
    """
    form = form.for_student(student)
    form.check(student)
    with new_folder(folder) as draft:
        file = form.write(student, draft)
        card = model_card(student, form.usage(student), form.name)
        (draft / "README.md").write_text(card, encoding="utf-8")
        differences = [
            check_equal(form.name, expected, found, form.tolerance)
            for expected, found in form.read_back(student, draft)
        ]
    if differences:
        logger.info(
            "read back with %s: largest difference from the student %.1e (allowed: %.0e)",
            form.name,
            max(differences),
            form.tolerance,
        )
    return folder / file


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``folder`` to fill; renamed to it when the block succeeds.

    Nothing is left behind when the block raises.

    Raises:
        ExportError: where ``folder`` holds files already, or the disk does not take it.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ExportError(f"{folder} exists already; choose another folder, or move it away")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors lets only their owner read what it writes
            flush(path)
        flush(temporary)
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot write {folder}: {reason_of(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON for people: indented, in the given order."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors as the hub's libraries expect them."""
    contiguous = {key: value.contiguous() for key, value in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})


def write_heads(student: FoldedStudent, folder: Path) -> None:
    """Write what :func:`radio_distill.load` reads beside a body: heads, and what a student is.

    The second is ``radio_distill.json``, of which body and heads are built without a checkpoint.
    """
    save_file(student.model.adaptors.state_dict(), folder / "adaptors.safetensors")
    checkpoint = student.checkpoint
    slots = dict(zip(student.summary_teachers, student.summary_slots, strict=False))
    description = {
        "student": asdict(student.plain_config),
        "teachers": {name: asdict(spec) for name, spec in checkpoint.teachers.items()},
        "summary_slots": slots,
        "recipe": checkpoint.recipe.name,
        "stage": checkpoint.stage,
        "step": checkpoint.step,
        "versions": {"radio_distill": __version__, "torch": torch.__version__},
    }
    write_json(folder / "radio_distill.json", description)


def probe_images(step: int, shapes: Sequence[tuple[int, Size]], bands: int) -> Iterator[Tensor]:
    """Yield the same random images ``[B, bands, H, W]`` in [0, 1] in every run.

    ``shapes`` has (B, (H, W)) of each batch, sides in steps of so many pixels.
    """
    generator = torch.Generator().manual_seed(0)
    for batch, (height, width) in shapes:
        yield torch.rand(batch, bands, height * step, width * step, generator=generator)


def check_equal(
    format_name: str,
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    tolerance: float,
) -> float:
    """Return the largest difference, in units of each output's largest value or 1.

    Untrained and normalised outputs have values around 1; without a final norm, a few channels of a
    large student reach hundreds, whose last bits are worth more than an absolute tolerance.

    Raises:
        ExportError: where an output differs by more than ``tolerance``, or is not finite.
    """
    largest = 0.0
    for name, wanted in expected.items():
        difference = (found[name] - wanted).abs().max() / wanted.abs().max().clamp(min=1)
        if not difference <= tolerance:
            raise ExportError(
                f"{format_name}: {name} of the written model differs by {difference:.1e} from the "
                f"student's (allowed: {tolerance:.0e}), so nothing was written; please report it"
            )
        largest = max(largest, difference.item())
    return largest
