"""How closely a student's heads reproduce their teachers on held-out images.

Both sides are in the teacher's normalised space, so one number is comparable from teacher to
teacher; students of different normalizers are compared in the teachers' own space, with folded
heads and targets that have no normalizer. The measure is FeatSharp's (:mod:`.metrics.fidelity`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from PIL.Image import Image
from torch.nn import functional as F

from ..config import size_pair
from ..data.folder import in_batches, load_images
from ..distill.alignment import align
from ..types import Features, Report, Score, unheard
from .demand import Demand, at_most
from .encoder import Encoder, Target, open_image, to_pixels
from .metrics.fidelity import Fidelity as FidelitySums
from .protocol import file_names, protocol_of
from .shared import answers


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How closely a student's heads reproduce its teachers; shown beside Δm, no part of it.

    Scores for each teacher: ``mse`` (per channel), ``cosine`` (mean over positions),
    ``summary_cosine`` (where there is a summary) and ``fidelity`` (infinite if the error is zero).
    The smaller of the two grids decides. An encoder without heads gets no score.
    """

    images: str
    size: int | tuple[int, int]
    batch_size: int = 8

    name: ClassVar[str] = "fidelity"
    sources: ClassVar[dict[str, str]] = {"images": "images", "size": "size"}

    def demand(self, parts: Mapping[str, int], limit: int | None = None) -> Demand:
        """Count the images that the student sees."""
        images, size = at_most(parts["images"], limit), size_pair(self.size)
        return Demand(images=images, passes={size: images}, batch=self.batch_size)

    @torch.inference_mode()
    def run(
        self, encoder: Encoder, limit: int | None = None, progress: Report = unheard
    ) -> list[Score]:
        """Compare the heads' predictions with their targets, teacher by teacher."""
        if encoder.heads is None:
            return []
        targets = encoder.heads.targets
        images = load_images(self.images, limit)

        def compare(numbers: Sequence[int], _: object) -> dict[str, _Sums]:
            return self._compared(encoder, [open_image(images[number][1]) for number in numbers])

        sums: dict[str, _Sums] = {}
        for part in answers(
            in_batches(range(len(images)), self.batch_size), compare,
            lambda done, _: progress(min(done * self.batch_size, len(images)), len(images)),
        ):  # fmt: skip
            for name, some in part.items():
                if name in sums:
                    sums[name].merge(some)
                else:
                    sums[name] = some
        protocol = protocol_of(self, images=file_names(images.keys))
        return [
            replace(score, protocol=protocol)
            for name, total in sums.items()
            for score in total.scores(name, targets[name])
        ]

    def _compared(self, encoder: Encoder, batch: Sequence[Image]) -> dict[str, "_Sums"]:
        """Return the sums of some images by teacher, on the host."""
        assert encoder.heads is not None
        size, targets, sums = size_pair(self.size), encoder.heads.targets, {}
        pixels = {
            side: torch.stack([to_pixels(image, side) for image in batch]).to(encoder.device)
            for side in {size, *(target.size for target in targets.values())}
        }
        predicted = encoder.heads.predict(pixels[size])
        for name, target in targets.items():
            sums[name] = _Sums(predicted[name], target(pixels[target.size]))
        return sums


class _Sums:
    """Sums over images for one teacher, on the host."""

    def __init__(self, predicted: Features, target: Features) -> None:
        x, y = align(predicted.spatial, target.spatial, "smaller")
        x, y = x.double(), y.double()  # [B, C, h, w]
        self.fidelity = FidelitySums(y.shape[1], y.device)
        self.fidelity.update(x, y)
        self.fidelity.sums = self.fidelity.sums.cpu()
        self.num_images, self.num_positions = len(y), y.numel() // y.shape[1]
        self.cosine = F.cosine_similarity(x, y, dim=1).sum().item()
        self.summary_cosine: float | None = None
        if target.summary is not None and predicted.summary is not None:
            cosine = F.cosine_similarity(predicted.summary.double(), target.summary.double(), dim=1)
            self.summary_cosine = cosine.sum().item()

    def merge(self, other: "_Sums") -> None:
        """Add those of other images."""
        self.fidelity.merge(other.fidelity)
        self.num_images += other.num_images
        self.num_positions += other.num_positions
        self.cosine += other.cosine
        if other.summary_cosine is not None:
            self.summary_cosine = (self.summary_cosine or 0.0) + other.summary_cosine

    def scores(self, teacher: str, target: Target) -> list[Score]:
        values = {
            "fidelity": (self.fidelity.compute(), True),
            "mse": (self.fidelity.mse, False),
            "cosine": (self.cosine / self.num_positions, True),
        }
        if self.summary_cosine is not None:
            values["summary_cosine"] = (self.summary_cosine / self.num_images, True)
        # The others show the same error otherwise, or can be zero, which has no gain.
        return [
            Score(
                "fidelity", f"{metric}/{teacher}", value, "1", higher, "Fidelity", self.num_images,
                headline=metric == "fidelity", trained_for=True, against=target.digest,
            )
            for metric, (value, higher) in values.items()
        ]  # fmt: skip
