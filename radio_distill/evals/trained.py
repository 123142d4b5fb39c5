"""Benchmarks that train heads on a frozen encoder: what they share.

A benchmark says which images there are, how they are varied, which heads read them, what these
lose, and what is counted on test images. Its fields are its published protocol;
:mod:`.probe_training` trains, :meth:`TrainedBenchmark.run` tests.
"""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.folder import spread
from ..errors import DataError
from ..system.distributed import current_world, share_out
from ..types import Report, Score, Size, unheard
from .augmentation import Augmentation, Labels, resized
from .datasets import DATASETS
from .demand import Demand, at_most
from .encoder import Encoder, open_image
from .examples import Show, Shown, shown_maps, shown_of
from .probe_training import Example, ProbeHeads, encode, examples, in_whole_patches, train
from .protocol import DATA, protocol_of

Decay = Literal["linear", "poly", "cosine", "quarter", "step"]
logger = logging.getLogger(__name__)

Outputs = Mapping[str, Tensor]
"""What heads say, ``[B, K, H, W]`` by the name of what they predict."""
Meters = Mapping[str, Any]
"""What is counted on test images, by name: ``metrics.Sums``, each of a class of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedBenchmark(ABC):
    """A probe and its test; see the module's text."""

    data: str
    """Folder of the data set."""
    crop: Size = (512, 512)
    """Height and width of training images, in pixels."""
    steps: int = 80_000
    images_per_step: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 1_500
    decay: Decay = "linear"
    """Of the rate, from 1 to 0 over the rest of the steps: ``1 - t``, its power 0.9, half a cosine,
    a quarter of one, which ends at 0.01, or a tenth for the last twelfth."""
    gradient_clip: float = 0.0
    """Largest norm of the gradient; 0 for no limit."""
    quick: bool = False
    """Do not augment: maps are computed once for each image, and kept in memory."""
    seed: int = 0
    batch_size: int = 16
    """Most images in one pass of the encoder."""

    name: ClassVar[str]
    sources: ClassVar[Mapping[str, str]]
    group: ClassVar[str]
    """The column of the gain table that its scores belong to."""
    head: ClassVar[str]
    """What people call its heads."""
    layers: ClassVar[int] = 1
    """How many layers of the encoder the heads read."""
    reads_summary: ClassVar[bool] = False
    """Whether each cell of a map has the summary beside it: the encoder's, if any, where the last
    layer is read alone, else the layer's class token, which an encoder must have."""
    shuffles: ClassVar[bool] = True
    """Whether every epoch has an order of its own."""
    mirrors_test: ClassVar[bool] = False
    """Whether a test image's outputs are a mean with those of its mirror image."""
    pools_step: ClassVar[bool] = False
    """Whether a loss is of all images of a step together, and no mean over them."""

    def dataset(self) -> Any:
        """Return the data set that ``data`` is the folder of."""
        return DATASETS.get(self.sources["data"].removeprefix(DATA))(Path(self.data))

    def images(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """List the images to train and to test on, ``datasets.LabelledImage``."""
        dataset = self.dataset()
        return dataset.split("train"), dataset.split("val")

    def split_sizes(self, parts: Mapping[str, int]) -> tuple[int, int]:
        """Return how many images :meth:`images` lists, of a set with such parts."""
        return parts["train"], parts["val"]

    def test_views(self) -> dict[Size, int]:
        """Return how often the encoder sees a test image, by size in pixels."""
        return {self.crop: 1}

    def augmentation(self) -> Augmentation:
        """Return how training images are varied."""
        return Augmentation(self.crop)

    def training_example(self, image: Any, random: np.random.Generator | None) -> Example:
        """Read an image and vary it, to the size ``crop``; without a generator, resize it."""
        pixels, labels = read_pixels(image), image.labels()
        if random is None:
            return Example(image.key, *resized(pixels, labels, self.crop))
        return Example(image.key, *self.augmentation()(pixels, labels, random))

    def test_example(self, image: Any) -> Example:
        """Read an image of the test, whole, with labels of its own size."""
        return Example(image.key, read_pixels(image), image.labels())

    @abstractmethod
    def heads(self, channels: Sequence[int]) -> dict[str, nn.Module]:
        """Make the heads, for maps of so many channels."""

    @abstractmethod
    def losses(self, outputs: Outputs, labels: Labels) -> dict[str, Tensor]:
        """Return the weighted terms of the loss of some images, scalars; their sum is trained.

        Each is a mean over the images, or, with ``pools_step``, of all images of the step.
        """

    @abstractmethod
    def meters(self, device: torch.device | str) -> Meters:
        """Make empty meters."""

    @abstractmethod
    def measure(self, meters: Meters, outputs: Outputs, labels: Labels) -> None:
        """Feed a test image to the meters.

        ``outputs`` are ``[1, K, H, W]`` of the example's height and width, ``labels`` lie on the
        same device and are of their own size.
        """

    @abstractmethod
    def scores(self, meters: Meters) -> list[Score]:
        """Turn what was counted on all test images into scores, with :meth:`score`."""

    def learning_rates(self) -> np.ndarray:
        """Return ``[steps]`` rates: a linear warm-up from almost 0, then the decay."""
        warmup = min(self.warmup_steps, self.steps)
        rest = np.arange(self.steps - warmup) / max(self.steps - warmup, 1)
        decayed = {
            "linear": 1 - rest,
            "poly": (1 - rest) ** 0.9,
            "cosine": (1 + np.cos(np.pi * rest)) / 2,
            "quarter": 0.01 + 0.99 * np.cos(np.pi / 2 * rest),
            "step": np.where(rest < 11 / 12, 1.0, 0.1),
        }[self.decay]
        rising = np.arange(1, warmup + 1) / max(warmup, 1)
        return self.learning_rate * np.concatenate([rising, decayed])

    def run(
        self,
        encoder: Encoder,
        limit: int | None = None,
        progress: Report = unheard,
        show: Show | None = None,
    ) -> list[Score]:
        """Train the heads on one split and score them on the other; ``limit`` thins out each.

        An encoder without inner layers gets no score where the heads read them.

        All processes of a run may call together: they share the images, and get the scores.
        """
        if self.layers > 1 and encoder.inner is None:
            logger.warning("%s: %s gives no inner layers, no score", self.name, encoder.name)
            return []
        training, test = (spread(part, limit) for part in self.images())
        if not training or not test:
            raise DataError(f"{self.data}: {self.name} needs images to train and to test on")
        total = self.steps + len(test)

        def report(done: int) -> None:
            progress(min(done, total), total)

        report(0)
        heads = train(self, encoder, training, report)
        world, meters = current_world(), self.meters(encoder.device)

        def measure(own: Sequence[Any]) -> Iterator[None]:  # so that an error ends all processes
            shown = shown_of(len(own), show if world.is_main else None)
            with examples(self.test_example, own, encoder.device) as stream:
                for number, example in enumerate(stream, 1):
                    labels = {name: it.to(encoder.device) for name, it in example.labels.items()}
                    outputs = self.predict(encoder, heads, example.pixels)
                    self.measure(meters, outputs, labels)
                    if show is not None and number - 1 in shown:
                        show(self.shown(example.pixels, labels, outputs))
                    report(self.steps + number * world.world_size)
                    yield

        share_out(test, measure)
        report(total)
        for meter in meters.values():
            meter.all_reduce()
        keys = {"train": [it.key for it in training], "test": [it.key for it in test]}
        protocol = protocol_of(self, f"{self.name}-{self.head}-{self.steps}", **keys)
        scores = self.scores(meters)
        return [replace(score, protocol=protocol, num_samples=len(test)) for score in scores]

    def demand(self, parts: Mapping[str, int], limit: int | None = None) -> Demand:
        """Count what training and testing ask of an encoder."""
        training, test = (at_most(count, limit) for count in self.split_sizes(parts))
        seen = self.steps * self.images_per_step
        passes = Counter({self.crop: min(seen, training) if self.quick else seen})
        for size, times in self.test_views().items():
            passes[size] += times * test
        return Demand(
            images=training + test,
            passes=passes,
            batch=1 if self.quick else min(self.batch_size, self.images_per_step),
            steps=self.steps,
            tested=test,
            reads=0 if self.quick else seen + test,
        )

    def score(
        self,
        metric: str,
        value: float,
        unit: str,
        higher_is_better: bool = True,
        headline: bool = True,
        **details: int | str,
    ) -> Score:
        """Make a score of this benchmark; :meth:`run` says of how many images."""
        return Score(
            self.name, metric, value, unit, higher_is_better, self.group, 0, headline, details
        )

    def fitted(
        self, encoder: Encoder, pixels: Tensor, labels: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a training image ``[3, H, W]`` and its labels as the encoder is to see them."""
        return in_whole_patches(encoder, pixels, labels)

    def shown(self, pixels: Tensor, labels: Labels, outputs: Outputs) -> Shown:
        """Make an example of a test image, for people to look at."""
        return shown_maps(pixels, labels, outputs)

    @torch.no_grad()
    def predict(self, encoder: Encoder, heads: ProbeHeads, pixels: Tensor) -> dict[str, Tensor]:
        """Return the outputs for one image ``[3, H, W]``, each ``[1, K, H, W]``."""
        height, width = pixels.shape[-2:]
        whole, _ = in_whole_patches(encoder, pixels, {})
        size = (whole.shape[-2], whole.shape[-1])
        outputs = heads(encode(self, encoder, whole[None]))
        if self.mirrors_test:
            mirrored = heads(encode(self, encoder, whole[None].flip(-1)))
            outputs = {name: (it + mirrored[name].flip(-1)) / 2 for name, it in outputs.items()}
        return {
            name: F.interpolate(output, size, mode="bilinear")[..., :height, :width]
            for name, output in outputs.items()
        }


def read_pixels(image: Any) -> Tensor:
    """Read an image as ``[3, H, W]`` uint8; raises DataError with its name."""
    return torch.from_numpy(np.array(open_image(image.image))).permute(2, 0, 1)
