"""The faces behind which components are exchanged, and nothing else.

A component satisfies a protocol by its methods; there is no base class to inherit.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .types import Features, ImageBatch, Score, Size, TeacherSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .balance.moments import Moments


@runtime_checkable
class Teacher(Protocol):
    """A frozen encoder."""

    @property
    def spec(self) -> TeacherSpec: ...

    def encode(self, pixels: "Tensor") -> Features:
        """Encode ``[B, 3, H, W]`` RGB in [0, 1], without gradient.

        Raises ConfigError, naming the nearest sizes that work, where ``patch_size`` does not divide
        H and W or the teacher cannot take that size.
        """
        ...

    def to(self, device: Any) -> "Teacher": ...


@runtime_checkable
class Upsampler(Protocol):
    """Turns a teacher into one with a finer grid.

    It is handed the teacher and not a feature map, because tiling methods call it several times.
    """

    factor: int
    """How much finer than the teacher's own grid, an integer."""

    def __call__(self, teacher: Teacher, pixels: "Tensor", grid: Size) -> Features:
        """Return features of ``pixels`` with ``spatial`` exactly ``[B, C, *grid]``.

        ``grid`` must be divisible by ``factor``; the teacher's low-resolution input then measures
        ``grid / factor * patch_size`` pixels. The summary is the low-resolution one.
        """
        ...

    def cost(self, grid: Size) -> int:
        """Return how many teacher images one picture needs at this grid."""
        ...


@runtime_checkable
class Normalizer(Protocol):
    """Brings a teacher's spatial features to a common scale; linear, so it can be folded away."""

    def fit(self, moments: "Moments") -> "Normalizer":
        """Take mean and covariance of the teacher's tokens; returns self."""
        ...

    def apply(self, spatial: "Tensor") -> "Tensor":
        """``[B, C, h, w]`` in the teacher's space to the normalised space."""
        ...

    def invert(self, spatial: "Tensor") -> "Tensor":
        """The way back of :meth:`apply`."""
        ...

    def fold(self, linear: "nn.Linear") -> "nn.Linear":
        """Return a linear that predicts in the teacher's own space."""
        ...

    def state(self) -> "Mapping[str, Tensor]":
        """Tensors that make an equal normalizer through ``load_state``."""
        ...

    def load_state(self, state: "Mapping[str, Tensor]") -> "Normalizer": ...


class Engine(Protocol):
    """Runs the student's forward, backward and update on one or many processes."""

    rank: int
    world_size: int
    device: Any

    def forward(self, pixels: "Tensor", teachers: tuple[str, ...]) -> "dict[str, Features]":
        """Student prediction for each named teacher, in that teacher's normalised space."""
        ...

    def backward(self, loss: "Tensor") -> None:
        """Accumulate the gradient of ``loss``; ranks are averaged."""
        ...

    def step(self, learning_rates: Mapping[str, float]) -> float:
        """Update the parameter groups at these rates; returns the gradient's norm."""
        ...

    def state_dict(self) -> "dict[str, Any]": ...

    def load_state_dict(self, state: "Mapping[str, Any]") -> None: ...


@runtime_checkable
class Benchmark(Protocol):
    """Scores any encoder, student and teacher alike."""

    name: str

    def run(self, encode: Callable[["Tensor"], Features], limit: int | None = None) -> list[Score]:
        """Measure ``encode`` on at most ``limit`` pictures."""
        ...


class MetricSink(Protocol):
    """Where the numbers of a run go."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class BatchSource(Protocol):
    """Endless batches for one rank, from any step on."""

    def batches(self, start_step: int) -> Iterable[list[ImageBatch]]:
        """Yield, for each step from ``start_step``, this rank's micro-batches in order."""
        ...
