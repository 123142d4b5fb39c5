"""Teachers that are loaded when they are needed, since other processes run them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from radio_distill.protocols import LayeredTeacher
from radio_distill.types import Features, TeacherSpec


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
