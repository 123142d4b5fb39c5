"""One harness for every encoder: a student, a teacher, or a teacher behind an upsampler.

A benchmark asks for images at *its* size; :meth:`Encoder.nearest_size` says which size the
encoder takes instead, and positions and label maps stay in the benchmark's own pixels, so that
encoders of different patch size are measured with one ruler. Every draw has a seeded generator.

Left out: fine-tuning, and data sets that must be downloaded. Fidelity (``fidelity.py``) is no
question to one encoder but to a student's heads and its teachers, so whoever holds both asks it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ..config import EvaluationConfig, build
from ..data.folder import ImageRef
from ..errors import ConfigError
from ..protocols import Benchmark
from ..registry import Registry, check_has, check_takes, nearest
from ..types import Features, Score, Size

logger = logging.getLogger(__name__)

BENCHMARKS = Registry(
    "benchmark",
    {
        "agreement": "radio_distill.evals.agreement:Agreement",
        "correspondence": "radio_distill.evals.correspondence:Correspondence",
        "knn": "radio_distill.evals.knn:Knn",
        "segmentation": "radio_distill.evals.segmentation:Segmentation",
        "stereo": "radio_distill.evals.correspondence:Stereo",
    },
)

AnyImage = Image.Image | Path | ImageRef
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Encoder:
    """An encoder under test, and the sizes it takes."""

    name: str
    encode: Callable[[Tensor], Features]
    """``[B, 3, H, W]`` RGB in [0, 1] on ``device`` to features."""
    size_multiple: int
    """Height and width must be multiples of this: the patch size, times a student's window."""
    device: torch.device | str = "cpu"
    max_size: int | None = None
    """Longest side it takes, in pixels; None for any, as a student does: beyond the table of its
    positions they are stretched, here as in :func:`radio_distill.load`."""
    fixed_size: Size | None = None
    """The only size it takes, if there is but one."""

    def nearest_size(self, size: Size) -> Size:
        """Return the size nearest to ``size`` that the encoder takes, aspect ratio kept."""
        if self.fixed_size is not None:
            return self.fixed_size
        longest = self.max_size or max(size)
        shrink = min(1.0, longest / max(size))
        most = longest // self.size_multiple if self.max_size else None
        height, width = (max(1, round(side * shrink / self.size_multiple)) for side in size)
        if most is not None:
            height, width = min(height, most), min(width, most)
        return height * self.size_multiple, width * self.size_multiple

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Features:
        """Encode ``[B, 3, H, W]`` of any size, resized to the nearest that the encoder takes."""
        size = self.nearest_size((pixels.shape[-2], pixels.shape[-1]))
        pixels = pixels.to(self.device)
        if size != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        summary, spatial = self.encode(pixels)
        return Features(None if summary is None else summary.float(), spatial.float())


def open_image(image: AnyImage) -> Image.Image:
    """Return an upright RGB image, read now unless it is one; raises DataError with its name."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, Path):
        image = ImageRef(str(image), image.read_bytes)
    return image.load()


def to_pixels(image: AnyImage, size: Size) -> Tensor:
    """Resize to cover ``size``, crop the centre; ``[3, H, W]`` in [0, 1]."""
    height, width = size
    fitted = ImageOps.fit(open_image(image), (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255


def encode_images(
    encoder: Encoder,
    images: Sequence[AnyImage],
    size: Size,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Features]:
    """Yield the features of ``images``, a batch at a time, each cropped to ``size``."""
    for start in range(0, len(images), batch_size):
        batch = [to_pixels(image, size) for image in images[start : start + batch_size]]
        yield encoder(torch.stack(batch))
        if progress is not None:
            progress(start + len(batch), len(images))


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Return at most ``limit`` items at even distances, so that sorted classes all stay present."""
    if not limit or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def make(name: str, config: EvaluationConfig) -> Benchmark:
    """Make a benchmark from the recipe; ``evaluation.options.NAME`` overrides its own fields.

    Raises:
        UnknownNameError: no such benchmark.
        ConfigError: the data it needs is not named, or an option is unknown.
    """
    kind = BENCHMARKS.get(name)
    _check_benchmark(name, kind)
    values: dict[str, Any] = {own: getattr(config, field) for own, field in kind.sources.items()}
    values |= config.options.get(name, {})
    for own, field in kind.sources.items():
        if values[own] == "":
            raise ConfigError(
                f"evaluation.{field} is empty and benchmark {name!r} needs it; "
                "name its data, or take it out of evaluation.benchmarks"
            )
    benchmark: Benchmark = build(kind, values, f"evaluation.options.{name}")
    return benchmark


def _check_benchmark(name: str, kind: Any) -> None:
    """Raise ConfigError, in one line, for a class of the user's that is no benchmark."""
    what = f"benchmark {name!r}"
    check_has(what, kind, ("name", "sources", "run"))
    sources = kind.sources
    check_takes(f"{what}: run", kind.run, ("self", "encoder", "limit", "progress"))
    if not is_dataclass(kind):
        raise ConfigError(f"{what} is no dataclass; its fields are what a recipe can set")
    own = {item.name for item in fields(kind)}
    known = {item.name for item in fields(EvaluationConfig)}
    if not isinstance(sources, Mapping):
        raise ConfigError(
            f"{what}: sources is a {type(sources).__name__}, not a mapping of its own fields to "
            "those of `evaluation`, such as {'images': 'images'}"
        )
    for field, source in sources.items():
        if field not in own or source not in known:
            wrong, among = (field, own) if field not in own else (source, known)
            raise ConfigError(
                f"{what}: sources has {field!r}: {source!r}, and there is no field {wrong!r} "
                f"({nearest(str(wrong), sorted(among))})"
            )


def evaluate(
    encoder: Encoder,
    config: EvaluationConfig,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Score]:
    """Score ``encoder`` on every benchmark of the recipe that asks an encoder alone.

    ``fidelity`` is the caller's (see the module's text). All benchmarks are made before the first
    runs, so a missing folder costs no time. ``progress`` gets (benchmark, done, total). Each score
    says which sizes the encoder was given, which are not those asked for where it cannot take them.
    """
    names = [name for name in config.benchmarks if name != "fidelity"]
    benchmarks = [make(name, config) for name in names]
    scores = []
    for benchmark in benchmarks:
        report = partial(progress, benchmark.name) if progress else None
        sizes: dict[Size, None] = {}
        found = benchmark.run(_noting(encoder, sizes), config.limit or None, report)
        if not isinstance(found, list) or not all(isinstance(item, Score) for item in found):
            raise ConfigError(
                f"benchmark {benchmark.name!r}: run returns {found!r:.80}, not a list of "
                "radio_distill.types.Score"
            )
        if not found:
            logger.warning("%s: %s takes one size only, no score", benchmark.name, encoder.name)
        scores += [replace(score, pixels=", ".join(map(size_text, sizes))) for score in found]
    return scores


def _noting(encoder: Encoder, sizes: dict[Size, None]) -> Encoder:
    """Return the encoder, which now puts down each size that it is given, once."""

    def encode(pixels: Tensor) -> Features:
        sizes[(pixels.shape[-2], pixels.shape[-1])] = None
        return encoder.encode(pixels)

    return replace(encoder, encode=encode)


def size_text(size: Size) -> str:
    """Write a size as ``HEIGHTxWIDTH``."""
    return f"{size[0]}x{size[1]}"
