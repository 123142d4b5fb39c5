"""How closely a student's heads reproduce their teachers on held-out images.

Both sides are in the teacher's normalised space, so one number is comparable from teacher to
teacher; students of different normalizers are compared :func:`in_teacher_space`. Fidelity is
FeatSharp's (arXiv 2502.16025, eq. 7): MSE(Y, mean of Y) / MSE(X, Y), 1 for a student that only
knows the mean. It is a ratio of sums over all images, not a mean of ratios of batches, which a
flat image would ruin.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..distill.alignment import align
from ..distill.views import Views
from ..protocols import Normalizer
from ..types import Features, Score, Size, View
from .harness import AnyImage, open_image, to_pixels

Predict = Callable[[Tensor], dict[str, Features]]
Targets = Callable[[Views], dict[str, Features]]


@torch.inference_mode()
def fidelity(
    predict: Predict,
    targets: Targets,
    images: Sequence[AnyImage],
    size: Size,
    teacher_sizes: Sequence[Size] = (),
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Compare predictions with targets, teacher by teacher; the smaller of the two grids decides.

    Scores for each teacher: ``mse`` (per channel), ``cosine`` (mean over positions),
    ``summary_cosine`` (where there is a summary) and ``fidelity`` (infinite if the error is zero).

    Args:
        predict: pixels ``[B, 3, H, W]`` on ``device`` to the student's ``{teacher: Features}``.
        targets: views to the teachers' ``{teacher: Features}``, normalised alike.
        images: held-out images.
        size: the student's input, in pixels.
        teacher_sizes: what else ``targets`` looks at, of the same aspect ratio.
        batch_size: images a batch.
        device: where both callables want their pixels.
        progress: called with (done, total).
    """
    sums: dict[str, _Sums] = {}
    for start in range(0, len(images), batch_size):
        batch = [open_image(image) for image in images[start : start + batch_size]]
        views = Views(
            {
                View(side): torch.stack([to_pixels(image, side) for image in batch]).to(device)
                for side in {size, *teacher_sizes}
            },
            size,
        )
        predicted = predict(views.of_student())
        for teacher, target in targets(views).items():
            sums.setdefault(teacher, _Sums()).add(predicted[teacher], target)
        if progress is not None:
            progress(start + len(batch), len(images))
    return [score for teacher, total in sums.items() for score in total.scores(teacher)]


def in_teacher_space(predict: Predict, normalizers: Mapping[str, Normalizer]) -> Predict:
    """Return ``predict`` with each head's features brought back to its teacher's own space.

    With the teachers' features as they are for targets, the ``mse`` of :func:`fidelity` is then
    that of the PHI-S paper's Table 3, and 1 / fidelity is the same over the teacher's variance.

    Raises:
        ConfigError: when called, where a normalizer has no inverse.
    """

    def inverted(pixels: Tensor) -> dict[str, Features]:
        return {
            name: Features(features.summary, normalizers[name].invert(features.spatial))
            for name, features in predict(pixels).items()
        }

    return inverted


class _Sums:
    """Sums over all images for one teacher, in double precision."""

    def __init__(self) -> None:
        self.num_images = 0
        self.num_positions = 0
        self.squared_error = 0.0
        self.cosine = 0.0
        self.target: Tensor | float = 0.0
        self.target_squared: Tensor | float = 0.0
        self.summary_cosine: float | None = None

    def add(self, predicted: Features, target: Features) -> None:
        x, y = align(predicted.spatial, target.spatial, "smaller")
        x, y = x.double(), y.double()  # [B, C, h, w]
        self.num_images += len(y)
        self.num_positions += y.numel() // y.shape[1]
        self.squared_error += (x - y).square().sum().item()
        self.cosine += F.cosine_similarity(x, y, dim=1).sum().item()
        self.target = self.target + y.sum(dim=(0, 2, 3))  # [C]
        self.target_squared = self.target_squared + y.square().sum(dim=(0, 2, 3))
        if target.summary is not None and predicted.summary is not None:
            cosine = F.cosine_similarity(predicted.summary.double(), target.summary.double(), dim=1)
            self.summary_cosine = (self.summary_cosine or 0.0) + cosine.sum().item()

    def scores(self, teacher: str) -> list[Score]:
        assert isinstance(self.target, Tensor), f"no targets of {teacher} were summed"
        num_values = self.num_positions * len(self.target)
        mean = self.target / self.num_positions
        spread = (self.target_squared - self.num_positions * mean.square()).sum().item()
        error = self.squared_error
        values = {
            "fidelity": (spread / error if error else float("inf"), True),
            "mse": (error / num_values, False),
            "cosine": (self.cosine / self.num_positions, True),
        }
        if self.summary_cosine is not None:
            values["summary_cosine"] = (self.summary_cosine / self.num_images, True)
        return [
            Score(
                "fidelity",
                f"{metric}/{teacher}",
                value,
                "1",
                higher,
                "Fidelity",
                self.num_images,
                # The others show the same error otherwise, or can be zero, which has no gain.
                headline=metric == "fidelity",
                trained_for=True,
            )
            for metric, (value, higher) in values.items()
        ]
