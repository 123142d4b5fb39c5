"""The protocols behind which components are exchanged, and nothing else.

A component satisfies a protocol by its methods; there is no base class to inherit.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .types import Features, ImageBatch, Score, Size, TeacherSpec

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import numpy as np
    import torch
    from torch import Tensor, nn

    from .evals.encoder import Encoder
    from .models.heads import Predictions
    from .normalize.moments import Moments


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

    @property
    def factor(self) -> int:
        """How much finer than the teacher's own grid, an integer."""
        ...

    def __call__(self, teacher: Teacher, pixels: "Tensor", grid: Size) -> Features:
        """Return features of ``pixels`` with ``spatial`` exactly ``[B, C, *grid]``.

        ``grid`` must be divisible by ``factor``; the teacher's low-resolution input then measures
        ``grid / factor * patch_size`` pixels. The summary is the low-resolution one.
        """
        ...

    def cost(self, grid: Size) -> int:
        """Return how many teacher images one image needs at this grid."""
        ...


@runtime_checkable
class Corrector(Protocol):
    """An upsampler that has learned what a teacher adds to each position, and can take it out."""

    def correct(self, name: str, spatial: "Tensor") -> "Tensor":
        """De-bias a teacher's map ``[B, C, h, w]`` at its own grid, in its own space."""
        ...


@runtime_checkable
class Normalizer(Protocol):
    """Brings a teacher's spatial features to a common scale; linear, so it can be folded away."""

    uses_statistics: bool
    """False where ``fit`` takes nothing, so that nothing need be estimated."""

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

    def unfold(self, linear: "nn.Linear") -> "nn.Linear":
        """Return a linear that predicts in the normalised space; the way back of :meth:`fold`."""
        ...

    def state(self) -> "Mapping[str, Tensor]":
        """Tensors that make an equal normalizer through ``load_state``."""
        ...

    def load_state(self, state: "Mapping[str, Tensor]") -> "Normalizer": ...


class Engine(Protocol):
    """Runs the student's forward, backward and update on one or many processes."""

    @property
    def device(self) -> "torch.device": ...

    @property
    def model(self) -> "nn.Module": ...

    def forward(
        self,
        pixels: "Tensor",
        teachers: tuple[str, ...],
        draws: "Tensor | None" = None,
        freeze_body: bool = False,
        window_size: int | None = None,
    ) -> "Predictions":
        """Predict each named teacher's features, in that teacher's normalised space."""
        ...

    def autocast(self) -> "AbstractContextManager[Any]":
        """Return the context in which a student computes in the recipe's precision."""
        ...

    def backward(self, loss: "Tensor", last: bool) -> None:
        """Add the gradient of ``loss`` to the step's, summed over ranks; ``last`` closes it."""
        ...

    def step(self, learning_rates: Mapping[str, float]) -> float:
        """Update each part at its rate; returns the norm of the gradient before clipping."""
        ...

    def model_tensors(self) -> "dict[str, Tensor]":
        """Whole weights by name; every rank calls, rank 0 gets them."""
        ...

    def optimizer_tensors(self) -> "dict[str, Tensor]":
        """Whole optimizer state by name; every rank calls, rank 0 gets it."""
        ...

    def load(self, weights: "Mapping[str, Tensor]", optimizer: "Mapping[str, Tensor]") -> None:
        """Restore both, whatever the number of ranks that wrote them."""
        ...


@runtime_checkable
class Benchmark(Protocol):
    """Scores any encoder, student and teacher alike."""

    name: str

    def run(
        self,
        encoder: "Encoder",
        limit: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Score]:
        """Measure an encoder on at most ``limit`` images; ``progress`` gets (done, total)."""
        ...


class MetricSink(Protocol):
    """Where the numbers of a run go."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def write_image(self, step: int, name: str, image: "np.ndarray") -> None:
        """Take an image ``[h, w, 3]`` uint8, or leave it."""
        ...

    def close(self) -> None: ...


class BatchSource(Protocol):
    """Endless batches for one rank, from any step on."""

    @property
    def fingerprint(self) -> str:
        """Sum over everything that decides which image comes when, beside seed and recipe."""
        ...

    @property
    def bad(self) -> dict[str, int]:
        """Images that could not be used so far, by kind."""
        ...

    def batches(self, start_step: int) -> Iterator[list[ImageBatch]]:
        """Yield, for each step from ``start_step``, this rank's micro-batches in order."""
        ...
