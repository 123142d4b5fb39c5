"""A student as its users meet it: features and summary of images of any size.

::

    import radio_distill

    model = radio_distill.load("runs/demo")
    output = model(pixels, heads=("dino",))  # pixels [B, 3, H, W] in [0, 1]
    output.summary, output.features           # [B, S], [B, D, h, w]
    output.heads["dino"].spatial              # [B, C, h, w], in the teacher's own space

Decoding images, and bringing those of a batch to one size, is left to the caller;
:mod:`radio_distill.loading` has where students come from.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import StudentConfig
from ..errors import ConfigError, UnknownNameError
from ..registry import nearest
from ..types import Features, Size, TeacherSpec
from .body import Body
from .heads import DistilledStudent, Head, at_slot

Format = Literal["NCHW", "NLC"]
Fit = Literal["pad", "resize"]

_SMALLEST, _LARGEST = -1.0, 2.0
"""Pixels beyond are refused; filters overshoot [0, 1] by a tenth or two."""


class EncoderOutput(NamedTuple):
    """What a student says of a batch of images."""

    summary: Tensor
    """``[B, S]``: the summary tokens of the teachers that have a summary, side by side; of a body
    whose teachers share one summary, that one."""
    features: Tensor
    """``[B, D, h, w]``, or ``[B, h * w, D]`` for NLC."""
    heads: dict[str, Features]
    """By teacher, in its own space; ``spatial`` in the format of ``features``."""


class StudentEncoder(nn.Module):
    """A student with some of its heads, for any size of image.

    Gradients flow, for fine-tuning; a loaded one is in evaluation mode.

    Args:
        student: the body, whose matrices are plain (folded).
        config: what it was built from.
        teachers: all teachers, in the order of their summary tokens; empty where not known.
        heads: of some of them, into the teachers' own space.
        summary_slots: which summary tokens make up the summary.
        native_size: longest side that it was trained at, in pixels; None for an untrained one.
    """

    def __init__(
        self,
        student: Body,
        config: StudentConfig,
        teachers: Mapping[str, TeacherSpec] | None = None,
        heads: Mapping[str, Head] | None = None,
        summary_slots: Sequence[int] = (0,),
        native_size: int | None = None,
    ):
        super().__init__()
        self.student = student
        self.config = config
        self.teachers = dict(teachers or {})
        self.adaptors = nn.ModuleDict(heads or {})  # the name stands in sums of teachers' weights
        self.summary_slots = list(summary_slots)
        self.native_size = native_size
        self.takes_normalised = False  # by a caller that has taken mean and std out of the student
        self._slots = {name: slot for slot, name in enumerate(self.teachers)}

    @property
    def patch_size(self) -> int:
        """Pixels a side of one cell of the features."""
        return self.student.patch_size

    @property
    def embed_dim(self) -> int:
        """Channels D of the features."""
        return self.student.embed_dim

    @property
    def summary_dim(self) -> int:
        """Channels S of the summary."""
        return len(self.summary_slots) * self.student.summary_dim

    @property
    def max_size(self) -> int | None:
        """Longest side that the table of positions spans, in pixels; beyond, it is stretched.

        None for a body without such a table.
        """
        return self.student.max_size

    @property
    def heads(self) -> dict[str, Head]:
        """The heads that are here, by teacher."""
        return cast(dict[str, Head], dict(self.adaptors.items()))

    @property
    def head_names(self) -> tuple[str, ...]:
        """Teachers whose heads are here."""
        return tuple(self.adaptors)

    def nearest_size(self, height: int, width: int) -> Size:
        """Return the size nearest to an image's that is taken as it is."""
        if self.student.fixed_size is not None:
            return self.student.fixed_size
        step = self.student.size_step
        return max(round(height / step), 1) * step, max(round(width / step), 1) * step

    def forward(
        self,
        pixels: Tensor,
        heads: Sequence[str] = (),
        format: Format = "NCHW",
        fit: Fit = "pad",
    ) -> EncoderOutput:
        """Encode images of any one size.

        Args:
            pixels: ``[B, 3, H, W]`` float RGB in [0, 1], or of the bands it was trained with.
            heads: teachers whose features are asked for too.
            format: of all maps, ``[B, D, h, w]`` or ``[B, h * w, D]``.
            fit: how a size that the patch does not divide becomes one. ``pad`` adds the mean colour
                below and to the right, and returns the cells that show image: each cell is
                ``patch_size`` pixels of the image as it came, so a map can be laid over it.
                ``resize`` scales to :meth:`nearest_size`: no cell shows padding, and none is
                exactly ``patch_size`` pixels.

        Raises:
            ConfigError: where pixels, a name or an option is not one of these.
        """
        names = self._checked(heads)
        if format not in ("NCHW", "NLC"):
            raise ConfigError(f"format {format!r} is neither 'NCHW' nor 'NLC'")
        encoded = self._encode(pixels, fit, names)
        tokens, spatial = encoded[:2]  # [B, T, D], [B, D, h, w]
        outputs = {}
        for name in names:
            summary, features = self.heads[name](*at_slot(encoded, self._slots[name]))
            outputs[name] = Features(summary, _formatted(features, format))
        summary = tokens[:, self.summary_slots].flatten(1)
        return EncoderOutput(summary, _formatted(spatial, format), outputs)

    def summarize(self, pixels: Tensor, head: str, fit: Fit = "pad") -> Tensor:
        """Encode images into one teacher's summary alone, ``[B, S]``, without its feature map.

        Raises:
            ConfigError: where that teacher has no summary, besides the reasons of :meth:`forward`.
        """
        (name,) = self._checked((head,))
        if not self.heads[name].has_summary:
            raise ConfigError(
                f"teacher {name!r} has no summary; ask for its features: heads=({name!r},)"
            )
        encoded = self._encode(pixels, fit, (name,))
        return self.heads[name].summarize(*at_slot(encoded, self._slots[name]))

    def layers(self, pixels: Tensor, count: int, fit: Fit = "pad") -> list[Features]:
        """Return summaries ``[B, S]`` and maps ``[B, D, h, w]`` of ``count`` blocks.

        They are evenly spread over the depth. The last are ``summary`` and ``features`` of
        :meth:`forward`, whose ``pixels``, ``fit`` and errors these are. A summary is of the same
        tokens in each; it is None of a student without summary, or whose summary is no token.
        """
        prepared, (rows, columns) = self._prepared(pixels, fit)
        layers = []
        for tokens, spatial in self.student.layers(prepared, count):
            summary = None
            if tokens is not None and self.summary_slots:
                summary = tokens[:, self.summary_slots].flatten(1)
            layers.append(Features(summary, spatial[:, :, :rows, :columns]))
        return layers

    def keep(self, heads: Sequence[str]) -> None:
        """Drop the heads of all teachers but these; raises UnknownNameError."""
        names = self._checked(heads)
        self.adaptors = nn.ModuleDict({name: self.adaptors[name] for name in names})

    def _checked(self, heads: Sequence[str]) -> tuple[str, ...]:
        names = (heads,) if isinstance(heads, str) else tuple(heads)
        for name in names:
            if name not in self.adaptors:
                known = nearest(name, self.head_names) if self.adaptors else "it has none"
                raise UnknownNameError(f"no head {name!r} in this student ({known})")
        return names

    def _encode(self, pixels: Tensor, fit: Fit, heads: Sequence[str]) -> list[Tensor]:
        """Return all summary tokens ``[B, T, D]``, and the cells that show image.

        Behind these two, the same behind each block, where one of the heads reads them.
        """
        prepared, (rows, columns) = self._prepared(pixels, fit)
        every_block = any(self.heads[name].reads_blocks for name in heads)
        outputs = self.student(prepared, every_block=every_block)
        return [output if output.ndim == 3 else output[:, :, :rows, :columns] for output in outputs]

    def _prepared(self, pixels: Tensor, fit: Fit) -> tuple[Tensor, Size]:
        """Return pixels of a size that the student takes, and the grid of cells that show image."""
        bands = self.student.bands
        if not isinstance(pixels, Tensor):
            kind = type(pixels).__name__
            raise ConfigError(f"pixels are a {kind}, expected a torch.Tensor [B, {bands}, H, W]")
        if pixels.ndim != 4 or pixels.shape[1] != bands or 0 in pixels.shape:
            shape = list(pixels.shape)
            raise ConfigError(f"pixels have shape {shape}, expected [B, {bands}, H, W]")
        if not pixels.is_floating_point():
            raise ConfigError(f"pixels are {pixels.dtype}, expected floats in [0, 1]")
        if fit not in ("pad", "resize"):
            raise ConfigError(f"fit {fit!r} is neither 'pad' nor 'resize'")
        if not self.takes_normalised:
            _check_range(pixels)
        height, width = pixels.shape[-2:]
        dtype = self.student.mean.dtype
        if fit == "resize":
            size = self.nearest_size(height, width)
            if size != (height, width):
                # Antialiasing exists on a CPU in these two types alone.
                exact = pixels if pixels.dtype == torch.float64 else pixels.float()
                pixels = F.interpolate(exact, size, mode="bilinear", antialias=True)
            return pixels.to(dtype), (size[0] // self.patch_size, size[1] // self.patch_size)
        rows, columns = -(-height // self.patch_size), -(-width // self.patch_size)
        return self._padded(pixels.to(dtype)), (rows, columns)

    def _padded(self, pixels: Tensor) -> Tensor:
        batch, _, height, width = pixels.shape
        step = self.student.size_step
        rows, columns = -(-height // step) * step, -(-width // step) * step
        if (rows, columns) == (height, width):
            return pixels
        canvas = self.student.mean.to(pixels).expand(batch, -1, rows, columns).clone()
        canvas[:, :, :height, :width] = pixels
        return canvas


def summary_slots(teachers: Mapping[str, TeacherSpec], student: Body) -> list[int]:
    """Return the indices of the summary tokens of those teachers that have a summary.

    One of them, where all teachers share one summary.
    """
    slots = [
        slot for slot, spec in enumerate(teachers.values()) if spec.summary_channels is not None
    ]
    return slots[:1] if student.shares_summary else slots


def as_encoder(
    model: DistilledStudent,
    config: StudentConfig,
    teachers: Mapping[str, TeacherSpec],
    native_size: int | None = None,
) -> StudentEncoder:
    """Present a student with its training heads as its users will meet it; nothing is copied.

    It stays in training or evaluation mode. Where the normalizers are not folded, its heads speak
    in the teachers' normalised spaces.
    """
    slots = summary_slots(teachers, model.student)
    return StudentEncoder(model.student, config, teachers, model.heads, slots, native_size)


def _check_range(pixels: Tensor) -> None:
    """Raise ConfigError for pixels that are clearly not RGB in [0, 1].

    What a resampling filter overshoots is let through, and so is what cannot be looked at, since
    the model is being compiled or has no data.
    """
    if torch.compiler.is_compiling() or pixels.is_meta:
        return
    least, most = (float(value) for value in torch.aminmax(pixels.detach()))
    if most > _LARGEST:
        raise ConfigError(
            f"pixels reach {most:.4g}, expected floats in [0, 1]; divide those of 0 to 255 by 255"
        )
    if least < _SMALLEST:
        raise ConfigError(
            f"pixels reach down to {least:.4g}, expected floats in [0, 1], not normalised"
        )


def _formatted(spatial: Tensor, format: Format) -> Tensor:
    return rearrange(spatial, "b d h w -> b (h w) d") if format == "NLC" else spatial
