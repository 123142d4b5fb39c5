"""A frozen encoder behind the Teacher protocol.

It takes pixels in [0, 1] and does everything around the encoder that distillation needs: the size
check, normalisation, micro-batches, the number type, no gradient. It is not an ``nn.Module`` on
purpose: nothing that trains, wraps or saves the student can pick a teacher up as a submodule.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from radio_distill.errors import ConfigError, NoLayersError
from radio_distill.protocols import LayeredTeacher
from radio_distill.system.memory import explain_oom, lower
from radio_distill.types import Features, Size, TeacherSpec, format_size

from .weights import matrix_names

Tower = Callable[[Tensor], tuple[Tensor | None, Tensor]]
"""Normalised pixels ``[B, 3, H, W]`` to summary ``[B, S]`` (or None) and map ``[B, C, h, w]``.

It may have a method ``layers(pixels, count)``, see :class:`radio_distill.protocols.LayeredTeacher`.
"""
Output = TypeVar("Output")


class FrozenTeacher:
    """Freeze ``tower`` and run it as a teacher.

    Args:
        tower: the encoder. An ``nn.Module`` is put into eval mode and its gradients switched off.
        spec: what it is; its mean and std are applied here.
        dtype: type of the matrix products (``float32``, ``bfloat16``, ``float16``). The matrices
            are stored in it; norms, tokens and position tables stay float32, as autocast wants it.
            All are copied, one by one: ``tower`` may be a view of a file.
        micro_batch: most images in one forward pass; 0 for all at once.
    """

    def __init__(
        self, tower: Tower, spec: TeacherSpec, dtype: str = "float32", micro_batch: int = 0
    ):
        self.spec = spec
        self.micro_batch = micro_batch
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.device = torch.device("cpu")
        self.tower = tower
        self._mean = torch.tensor(spec.mean).view(-1, 1, 1)
        self._std = torch.tensor(spec.std).view(-1, 1, 1)
        if isinstance(tower, nn.Module):
            tower.eval().requires_grad_(False)
            _store(tower, self.dtype)

    def to(self, device: Any) -> "FrozenTeacher":
        """Move to ``device``, in place; returns self."""
        self.device = torch.device(device)
        self._mean, self._std = self._mean.to(self.device), self._std.to(self.device)
        if isinstance(self.tower, nn.Module):
            self.tower.to(self.device)
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Features:
        """Encode ``[B, 3, H, W]`` RGB in [0, 1] to float32 features, without gradient.

        Of other bands those that it sees, see :meth:`.TeacherSpec.seen`.

        Raises:
            ConfigError: bands or a size that this teacher cannot take.
        """
        summary, spatial = Features.joined(self._in_parts(pixels, self._encode))
        return Features(summary, spatial.contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def layers(self, pixels: Tensor, count: int) -> list[Features]:
        """Return the float32 features of ``count`` layers, spread over the depth.

        The summary of a layer is its class tokens, see
        :class:`radio_distill.protocols.LayeredTeacher`.

        Raises:
            ConfigError: a size that this teacher cannot take.
            NoLayersError: a tower that gives no layers.
        """
        parts = self._in_parts(pixels, partial(self._layers, count=count))
        return [Features.joined(layer) for layer in zip(*parts, strict=True)]

    def _in_parts(self, pixels: Tensor, run: Callable[[Tensor], Output]) -> list[Output]:
        """Run on ``micro_batch`` images at a time."""
        height, width = pixels.shape[-2:]
        check_size(self.spec, (height, width))
        shown, own = pixels.shape[1], len(self.spec.mean)
        if shown != own:
            raise ConfigError(f"teacher {self.spec.name!r} sees {own} bands, and is shown {shown}")
        at_once = min(self.micro_batch or len(pixels), len(pixels))
        size = f"{height}x{width} px, {at_once} images at once"
        with explain_oom(f"teacher {self.spec.name!r}", size, self._hint(at_once)):
            return [run(part) for part in pixels.split(at_once)]

    def _hint(self, at_once: int) -> str:
        field = f"teachers.{self.spec.name}"
        otherwise = f"lower {field}.input_size, or set {field}.dtype to bfloat16"
        return lower(f"{field}.micro_batch", self.micro_batch, at_once, otherwise)

    def _encode(self, pixels: Tensor) -> Features:
        with self._autocast():
            summary, spatial = self.tower(self._normalised(pixels))
        height, width = pixels.shape[-2:]
        grid = self.spec.grid((height, width))
        if tuple(spatial.shape[-2:]) != grid:
            raise ConfigError(
                f"teacher {self.spec.name!r} gives {format_size(spatial.shape[-2:])} cells for "
                f"{height}x{width} pixels, not {format_size(grid)} as its patch "
                f"{self.spec.patch_size} says; show it {format_size(self.spec.native_size)}"
            )
        return Features(summary, spatial).to_float()

    def _layers(self, pixels: Tensor, count: int) -> list[Features]:
        layers = getattr(self.tower, "layers", None)
        what = f"teacher {self.spec.name!r} has no inner layers to read"
        if layers is None:
            raise NoLayersError(f"{what}: its source gives none")
        try:
            with self._autocast():
                return [layer.to_float() for layer in layers(self._normalised(pixels), count)]
        except ConfigError as error:
            raise NoLayersError(f"{what}: {error}") from error

    def _normalised(self, pixels: Tensor) -> Tensor:
        return (pixels.to(self.device, torch.float32) - self._mean) / self._std

    def _autocast(self) -> torch.autocast:
        reduced = self.dtype != torch.float32
        # Off rather than absent: a teacher's numbers must not depend on the caller's autocast.
        return torch.autocast(self.device.type, self.dtype if reduced else None, enabled=reduced)


def check_size(spec: TeacherSpec, size: Size) -> None:
    """Raise ConfigError, naming the nearest sizes, where a teacher cannot take ``size`` pixels."""
    shown = f"teacher {spec.name!r} cannot take {format_size(size)} pixels"
    if spec.fixed_size:
        if size != spec.native_size:
            raise ConfigError(f"{shown}: it takes {format_size(spec.native_size)} only")
        return
    patch = spec.patch_size
    most_cells = (spec.max_size or max(size) + patch) // patch
    lower = tuple(min(max(side // patch, 1), most_cells) * patch for side in size)
    upper = tuple(min(-(-side // patch), most_cells) * patch for side in size)
    if lower == upper == size:
        return
    near = " and ".join(dict.fromkeys([format_size(lower), format_size(upper)]))
    limit = f" up to {spec.max_size}" if spec.max_size else ""
    raise ConfigError(
        f"{shown}: sides must be multiples of its patch {patch}{limit}; nearest {near}"
    )


@torch.no_grad()
def _store(tower: nn.Module, dtype: torch.dtype) -> None:
    """Give a tower memory of its own, tensor by tensor, its matrices in ``dtype``."""
    matrices = matrix_names(tower)
    parameters = tower.named_parameters(remove_duplicate=False)  # a matrix may have two names
    for name, value in (*parameters, *tower.named_buffers()):
        value.data = value.data.to(dtype if name in matrices else value.dtype, copy=True)


class LateTeacher:
    """Describes a teacher without its weights, and loads them where it is asked to encode.

    Statistics are taken by all processes and an evaluation by the first, of all teachers; in a
    step a process runs but some.

    Args:
        spec: what it is, with the fingerprint of its weights.
        load: builds it.
    """

    def __init__(self, spec: TeacherSpec, load: Callable[[], LayeredTeacher]):
        self.spec = spec
        self._load = load
        self._teacher: LayeredTeacher | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether it holds weights now."""
        return self._teacher is not None

    def encode(self, pixels: Tensor) -> Features:
        """Encode ``[B, 3, H, W]`` as the teacher does, which stays until :meth:`release`."""
        return self._loaded().encode(pixels)

    def layers(self, pixels: Tensor, count: int) -> list[Features]:
        """Return the features of inner layers, as the teacher does."""
        return self._loaded().layers(pixels, count)

    def _loaded(self) -> LayeredTeacher:
        if self._teacher is None:
            self._teacher = self._load()
        return self._teacher

    def release(self) -> None:
        """Give the weights back."""
        self._teacher = None

    def to(self, device: Any) -> "LateTeacher":
        """Return itself: ``load`` knows where it is to run."""
        del device
        return self
