"""The file of a fitted upsampler.

A file is one ``.safetensors``, whose metadata carry a header under the key ``radio_distill`` as
JSON, so that reading the header touches no tensor::

    network.*       the network, matrices in bfloat16
    bias            [1, C, h, w], where there is one
    normalizer.*    statistics of the teacher, float32
    downsampler.*   what fine maps were compared through in the fit; read by measures alone

An upsampler learns one teacher's features at one size; on another it would return plausible
nonsense, so the header names the teacher and its weights.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from radio_distill.config import size_pair
from radio_distill.errors import WeightsError
from radio_distill.system.files import reason_of, replacing
from radio_distill.types import Size, TeacherSpec, format_size

SHIPPED = Path(__file__).parent / "weights"
"""Fitted upsamplers that come with the project, for the teachers that come inside packages."""
SHIPPED_AS = "shipped:"
"""Begins the name of one of these in a recipe, which so means the same on every machine."""
_KEY = "radio_distill"
_RENAMED = {"pictures": "images", "pictures_every": "images_every"}  # in earlier headers


@dataclass(frozen=True)
class FittedHeader:
    """Header of a file: what was fitted, and for which teacher."""

    upsampler: str
    """Its network, by name."""
    teacher: str
    """Name of the teacher in the recipe it was fitted with, for people."""
    weights_hash: str
    """``TeacherSpec.weights_hash`` of that teacher, which decides."""
    channels: int
    factor: int
    size: Size
    """The teacher's input at the fit, (height, width) in pixels."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments that build the network again."""
    normalizer: str = "phi_s"
    """Name of the normalizer whose space the network lives in."""
    statistics_hash: str = ""
    """sha256 over the normalizer's tensors, see :func:`hash_of`."""
    fit: dict[str, Any] = field(default_factory=dict)
    """The recipe's section ``fit``, and where the images came from, for people."""
    measures: dict[str, float] = field(default_factory=dict)
    """Measures on held-out images, for people."""


def write(path: str | Path, tensors: Mapping[str, Tensor], header: FittedHeader) -> None:
    """Write tensors and header, whole or not at all; raises WeightsError where it cannot."""
    contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
    try:
        with replacing(Path(path)) as draft:
            save_file(contiguous, draft, {_KEY: json.dumps(asdict(header))})
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot write upsampler {path}: {error}") from error


def read_header(path: str | Path) -> FittedHeader:
    """Read the header alone; raises WeightsError where the file is not a fitted upsampler's."""
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {})[_KEY])
        for part in ("fit", "measures"):
            told = values.get(part, {})
            values[part] = {_RENAMED.get(key, key): value for key, value in told.items()}
        return FittedHeader(**{**values, "size": tuple(values["size"])})
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot read upsampler {path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{path} is not a fitted upsampler: its header is missing") from error


def read_tensors(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """Read the tensors by part: ``{"network": {name: tensor}, "normalizer": ..., ...}``.

    Raises:
        WeightsError: the file is damaged, with values that are not finite or other statistics.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot read upsampler {path}: {reason_of(error)}") from error
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise WeightsError(f"upsampler {path} is damaged: {key} is not finite; fit it again")
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value
    expected = read_header(path).statistics_hash
    if expected and hash_of(parts.get("normalizer", {})) != expected:
        told = "other PHI-S statistics than it was fitted with; fit it again"
        raise WeightsError(f"upsampler {path} holds {told}")
    return parts


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """Return a sha256 over names and float32 values of a normalizer's tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def path_of(name: str) -> Path:
    """Return the file that a recipe names: a path, or ``shipped:`` and a file of the project's."""
    if name.startswith(SHIPPED_AS):
        return SHIPPED / name.removeprefix(SHIPPED_AS)
    return Path(name).expanduser()


def shipped(upsampler: str, factor: int, spec: TeacherSpec) -> Path | None:
    """Return the file that comes with the project for this upsampler and teacher, if one does."""
    wanted = (upsampler, factor, spec.weights_hash, spec.channels)
    for path in sorted(SHIPPED.glob("*.safetensors")):
        header = read_header(path)
        if (header.upsampler, header.factor, header.weights_hash, header.channels) == wanted:
            return path
    return None


def check_fitted_for(header: FittedHeader, upsampler: str, spec: TeacherSpec, factor: int) -> None:
    """Raise WeightsError unless the file is for this upsampler, this factor and this teacher."""
    if header.upsampler != upsampler:
        raise WeightsError(
            f"this file is a fitted {header.upsampler!r}, the recipe asks for {upsampler!r}"
        )
    if header.factor != factor:
        raise WeightsError(
            f"this {header.upsampler} was fitted for factor {header.factor}, the recipe asks for "
            f"{factor}; set upsampler.factor to {header.factor} or fit another"
        )
    if (header.weights_hash, header.channels) != (spec.weights_hash, spec.channels):
        raise WeightsError(
            f"upsampler for another teacher: fitted for {header.teacher!r} ({header.channels} "
            f"channels, weights {header.weights_hash[:12] or 'random'}), asked for {spec.name!r} "
            f"({spec.channels} channels, weights {spec.weights_hash[:12] or 'random'})"
        )


def check_size(header: FittedHeader, expected: int | Size | None, field: str) -> None:
    """Raise WeightsError where a file was not fitted at the size that a recipe's field says."""
    if expected is not None and header.size != size_pair(expected):
        fitted, asked = format_size(header.size), format_size(size_pair(expected))
        raise WeightsError(f"{field}: it was fitted at {fitted} px, not at {asked}")
