"""The values that cross the boundaries between packages, and the shape legend of the whole project.

Legend
    B images · H, W pixels · h, w grid cells · C teacher channels · S teacher summary width ·
    D student width · T summary tokens (one a teacher) · N = h * w.

Feature maps are always ``[B, C, h, w]`` (in ``torch.channels_last`` memory format where a kernel
cares), images ``[B, 3, H, W]`` RGB in [0, 1], or ``[B, bands, H, W]`` where ``data.bands`` says
so; sizes and grids are ``(height, width)``.

This module imports torch for annotations only, so that the command line answers without it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Size = tuple[int, int]
"""(height, width), of pixels or of grid cells."""
SUMMARY, FEATURES = "summary", "features"
"""What a teacher says of an image, as heads and the terms of a loss are called."""
Suite = Literal["quick", "published"]
"""Which benchmarks are asked, and how: see :mod:`.evals.suites`."""
Report = Callable[[int, int], object]
"""Told how much is done, and of how much."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of ImageNet's red, green and blue, for pixels in [0, 1]."""


def unheard(done: int, total: int) -> None:
    """Be a :data:`Report` that nobody hears."""


def format_size(size: Sequence[int]) -> str:
    """Write a size as people do: ``112x112``."""
    return "x".join(map(str, size))


def spread_layers(depth: int, count: int) -> list[int]:
    """Return which of ``depth`` layers lie at 1/count, 2/count ... 1 of it, the last one always.

    Of 24 layers 4 are 5, 11, 17 and 23. Where there are fewer than ``count``, some come twice.
    """
    return [max((i + 1) * depth // count, 1) - 1 for i in range(count)]


class Features(NamedTuple):
    """An encoder's output for a batch of images."""

    summary: "Tensor | None"
    """``[B, S]``, or None for an encoder without a summary (SAM)."""
    spatial: "Tensor"
    """``[B, C, h, w]``: patch tokens only, never class or register tokens."""

    def to_float(self) -> "Features":
        """Return them in float32."""
        summary = None if self.summary is None else self.summary.float()
        return Features(summary, self.spatial.float())

    @classmethod
    def joined(cls, parts: "Sequence[Features]") -> "Features":
        """Put the batches of some parts of a batch together; one part is not copied."""
        if len(parts) == 1:
            return parts[0]
        import torch

        summaries = [part.summary for part in parts if part.summary is not None]
        summary = torch.cat(summaries) if summaries else None
        return cls(summary, torch.cat([part.spatial for part in parts]))


@dataclass(frozen=True, slots=True)
class ViewOrigin:
    """The place of one view in its source image: crop first, then flip, then resize."""

    source_size: Size
    """Height and width of the decoded source, in pixels."""
    top: int
    left: int
    height: int
    width: int
    flipped: bool = False


class View(NamedTuple):
    """One rendering of the images of a batch, straight from the photographs."""

    size: Size
    """(height, width) in pixels."""
    crop: str = ""
    """Whose crop it is, where encoders have crops of their own; empty for the whole view."""


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """Images, at each size that an encoder asks for (each encoder normalises inside)."""

    views: "Mapping[View, Tensor]"
    """``[B, 3, H, W]`` RGB of each view: uint8 on the host (the loader's are channels last),
    float32 in [0, 1] once ``data.device.on_device`` has brought them to the device."""
    keys: tuple[str, ...]
    """``shard:member`` of each image, for logs."""
    origins: tuple[ViewOrigin, ...] = ()

    @property
    def pixels(self) -> "Tensor":
        """The only view."""
        (pixels,) = self.views.values()
        return pixels


@dataclass(frozen=True, slots=True)
class TeacherSpec:
    """Properties of a frozen encoder that are known before it runs."""

    name: str
    """Name of the teacher in the recipe."""
    channels: int
    """C of its spatial features."""
    summary_channels: int | None
    """S, or None when it has no summary."""
    patch_size: int
    """Pixels a side that one grid cell covers (the stride of a convolutional network)."""
    native_size: Size
    """The size it was trained at, in pixels."""
    max_size: int | None
    """Longest side it accepts, in pixels; None for any."""
    mean: tuple[float, ...]
    """Of its pixels in [0, 1], a number for each band that it sees."""
    std: tuple[float, ...]
    fixed_size: bool = False
    """True when only ``native_size`` is accepted (SAM's absolute canvas)."""
    weights_hash: str = ""
    """sha256 of the weights, as a hexadecimal string; empty for random weights."""
    licence: str = "unknown"
    bands: tuple[int, ...] = ()
    """Bands of the images that it sees, in its order; empty for all."""

    def seen(self, pixels: "Tensor") -> "Tensor":
        """Return the bands that it sees of ``[B, bands, H, W]``."""
        return pixels[:, list(self.bands)] if self.bands else pixels

    def grid(self, size: Size) -> Size:
        """Return the feature grid for an input of ``size`` pixels."""
        return size[0] // self.patch_size, size[1] // self.patch_size


@dataclass(frozen=True, slots=True)
class Score:
    """One number of one benchmark."""

    benchmark: str
    """Name of the benchmark in the registry, for instance ``knn``."""
    metric: str
    """Name of the metric, for instance ``top1`` or ``mse/dino``."""
    value: float
    unit: str
    """Unit for people: ``%``, ``px``, ``1``."""
    higher_is_better: bool
    group: str
    """The column of the gain table that this metric belongs to."""
    num_samples: int
    """Number of images (or pairs) that the value was measured on."""
    headline: bool = True
    """True where it counts in the gain table; a benchmark's further numbers are reported only."""
    details: Mapping[str, int | str] = field(default_factory=dict)
    """Further facts that a comparison with another needs, for instance the number of classes."""
    trained_for: bool = False
    """True where students are trained for it (fidelity): then it is shown and does not count."""
    pixels: str = ""
    """Sizes that the encoder was given, ``HEIGHTxWIDTH``, as they came; empty where not known."""
    against: str = ""
    """Digest of the teacher that the encoder is compared with; empty where it is none."""
    protocol: str = ""
    """``NAME@HASH`` of all that decides the number (``evals.protocol``); empty where not known."""
    asked: str = ""
    """Digest of the benchmark as it was asked, so that an evaluation that was stopped goes on."""

    @property
    def name(self) -> str:
        """``benchmark/metric``, unique within one evaluation."""
        return f"{self.benchmark}/{self.metric}"
