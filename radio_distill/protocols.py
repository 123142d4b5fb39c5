"""The protocols behind which components are exchanged, and nothing else.

A component satisfies a protocol by its methods; there is no base class to inherit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .types import Features, ImageBatch, Report, Score, Size, TeacherSpec, unheard

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from .evals.encoder import Encoder
    from .normalize.statistics import Moments
    from .train.engine import Engine
    from .train.health import Agree, Agreement, NonFiniteGuard
    from .train.trackers import WriteImage


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
class LayeredTeacher(Teacher, Protocol):
    """A teacher that may be asked for inner layers, which dense probes read."""

    def layers(self, pixels: "Tensor", count: int) -> "list[Features]":
        """Return the features of ``count`` layers, evenly spread over the depth.

        Each has gone through the final norm, and the last one's map is that of :meth:`encode`. The
        summary of a layer is its class token, before any projection, or of several those that the
        model's own summary is made of, side by side; None where there is none. Raises
        NoLayersError, naming the teacher, where its library gives no layers.
        """
        ...


class TextTower(Protocol):
    """Encodes texts into the space of an encoder's summaries."""

    def embed(self, texts: Sequence[str]) -> "Tensor":
        """Encode ``N`` texts to vectors ``[N, S]``, which are not normalised."""
        ...


@runtime_checkable
class Upsampler(Protocol):
    """Turns a teacher into one with a finer grid.

    It is handed the teacher and not a feature map, because tiling methods call it several times.
    """

    @property
    def factor(self) -> int:
        """Integer by which the grid is finer than the teacher's own."""
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
class NormalisedUpsampler(Protocol):
    """An upsampler that works in a normalised space, and can go from there into another at once."""

    def normalised(
        self, teacher: Teacher, pixels: "Tensor", grid: Size, normalizer: "Normalizer"
    ) -> Features:
        """Return what a call would, with ``spatial`` in the space of ``normalizer``."""
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


@runtime_checkable
class MovingNormalizer(Normalizer, Protocol):
    """A normalizer whose statistics follow the training.

    It is told of every map that the teacher says in a step. Where ``needs_whole_step``, all of them
    are encoded before the first is normalised.
    """

    needs_whole_step: bool

    def observe(self, spatial: "Tensor") -> None:
        """Let ``[B, C, h, w]`` in the teacher's space count for this step."""
        ...

    def begin_step(self, device: "torch.device") -> None:
        """Know that all of a step was observed; where that is needed, every process calls."""
        ...

    def end_step(self, progress: float, device: "torch.device") -> None:
        """Take a step, at this share of the stage, into the statistics; every process calls."""
        ...

    def forget_step(self) -> None:
        """Let a step that is skipped count for nothing."""
        ...


class Task(Protocol):
    """What a :class:`radio_distill.train.trainer.Trainer` trains."""

    @property
    def engine(self) -> "Engine": ...

    @property
    def source(self) -> "Source": ...

    @property
    def evaluate_every(self) -> int:
        """Steps between evaluations, the last step included; 0 for none."""
        ...

    def batches(self, start_step: int) -> Iterator[Any]:
        """Yield, for each step from ``start_step``, what this process works on."""
        ...

    def learning_rates(self, step: int) -> dict[str, float]:
        """Return the rate of each group of parameters in a step, counted from 0."""
        ...

    def forward_backward(
        self, step: int, batches: Any, guard: "NonFiniteGuard", agree: "Agree"
    ) -> "Agreement":
        """Run the passes of one step on this process.

        ``guard`` is told of every target and loss. ``agree`` is called once on every rank, with
        this process's part of the loss, before the last backward pass. What it returns stays on
        the device until the step is launched; its ``is_bad`` is the ``skip`` of that pass.
        """
        ...

    def end_step(self, is_taken: bool) -> None:
        """Adapt what follows the update, for instance an EMA; every rank calls."""
        ...

    def log_values(self) -> dict[str, float]:
        """Return what is logged of the steps since the last call; every rank calls."""
        ...

    def evaluate(
        self, step: int, beat: Callable[[], None], write_image: "WriteImage"
    ) -> list[Score]:
        """Score what is trained, after ``step`` steps; every rank calls and gets the scores.

        Nothing that decides later numbers may change, but global generators, which the trainer
        restores. ``beat`` is called again and again, also by ranks that wait; it raises where the
        run is to stop.
        """
        ...

    def tensors(self) -> "dict[str, dict[str, Tensor]]":
        """Gather the files of a checkpoint on the host of rank 0; every rank calls."""
        ...


@runtime_checkable
class Benchmark(Protocol):
    """Scores any encoder, student and teacher alike.

    One whose ``run`` takes a further ``show`` hands it a few examples to look at
    (``evals.examples``).
    """

    name: str

    def run(
        self,
        encoder: "Encoder",
        limit: int | None = None,
        progress: Report = unheard,
    ) -> list[Score]:
        """Measure an encoder on at most ``limit`` images; ``progress`` gets (done, total)."""
        ...


class Tracker(Protocol):
    """Where the numbers of a run go."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def write_image(self, step: int, name: str, image: "np.ndarray") -> None:
        """Take an image ``[h, w, 3]`` uint8, or leave it."""
        ...

    def close(self) -> None: ...


class Source(Protocol):
    """Where the images of a task come from."""

    @property
    def fingerprint(self) -> str:
        """Sum over everything that decides which image comes when, beside seed and recipe."""
        ...


class BatchSource(Source, Protocol):
    """Endless batches for one rank, from any step on."""

    @property
    def bad(self) -> dict[str, int]:
        """Images that could not be used so far, by kind."""
        ...

    def batches(self, start_step: int) -> Iterator[list[ImageBatch]]:
        """Yield, for each step from ``start_step``, this rank's micro-batches in order."""
        ...
