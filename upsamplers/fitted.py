"""The file of a fitted upsampler: tensors, and a header that says what it may be used for.

One ``.safetensors``; its metadata carry the header under the key ``radio_distill`` as JSON, so that
reading it touches no tensor. An upsampler learns one teacher's features at one size; used on
another it would return plausible nonsense, so the header names the teacher and its weights.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from radio_distill.errors import WeightsError
from radio_distill.types import Size, TeacherSpec

_KEY = "radio_distill"


@dataclass(frozen=True)
class FittedHeader:
    """What a fitted upsampler is, and for which teacher."""

    upsampler: str
    """Its name in the registry."""
    teacher: str
    """Name of the teacher in the recipe it was fitted with, for people."""
    weights_hash: str
    """``TeacherSpec.weights_hash`` of that teacher, which decides."""
    channels: int
    factor: int
    size: Size
    """The teacher's input that it was fitted at, (height, width) in pixels."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments that build it again."""


def write(path: str | Path, tensors: Mapping[str, Tensor], header: FittedHeader) -> None:
    """Write a fitted upsampler, whole or not at all; raises WeightsError where it cannot."""
    from safetensors.torch import save_file

    target = Path(path)
    whole = {name: value.detach().contiguous() for name, value in tensors.items()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            part = Path(folder) / target.name
            save_file(whole, part, {_KEY: json.dumps(asdict(header))})
            os.replace(part, target)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot write upsampler {target}: {error}") from error


def read_header(path: str | Path) -> FittedHeader:
    """Read the header alone; raises WeightsError where the file is not a fitted upsampler's."""
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {})[_KEY])
        return FittedHeader(**{**values, "size": tuple(values["size"])})
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot read upsampler {path}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is not a fitted upsampler: its header is missing") from error


def check_fitted_for(header: FittedHeader, upsampler: str, spec: TeacherSpec) -> None:
    """Raise WeightsError unless the file is for this kind of upsampler and this teacher."""
    if header.upsampler != upsampler:
        raise WeightsError(
            f"this file is a fitted {header.upsampler!r}, the recipe asks for {upsampler!r}"
        )
    if (header.weights_hash, header.channels) != (spec.weights_hash, spec.channels):
        raise WeightsError(
            f"upsampler for another teacher: fitted for {header.teacher!r} ({header.channels} "
            f"channels, weights {header.weights_hash[:12] or 'random'}), asked for {spec.name!r} "
            f"({spec.channels} channels, weights {spec.weights_hash[:12] or 'random'})"
        )
