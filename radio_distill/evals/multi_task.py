"""Several tasks on one frozen encoder at once: Pascal Context and NYUDv2.

As in the harness of MLoRE, with a convolutional probe in the place of its decoder: one head a task,
trained together. Which rates RADIO and FeatSharp used is not public, so AdamW with 1e-3 is ours.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..types import Score, Size
from .augmentation import Augmentation, Labels, padded
from .losses import balanced_cross_entropy, depth_l1_loss, normal_l1_loss
from .metrics import IGNORED
from .metrics.depth import PooledDepth
from .metrics.normals import PooledNormals
from .metrics.segmentation import Confusion, MaxF, mean_iou
from .probe_heads import ConvProbe
from .probe_training import Example
from .trained import Decay, Meters, Outputs, TrainedBenchmark, read_pixels


class _Task(NamedTuple):
    """How a head of a task is trained and scored; outputs are ``[B, K, H, W]``."""

    weight: float
    """Of the loss, as in MLoRE."""
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Of output, label, and where the label says something."""
    read: Callable[[Tensor], Tensor]
    """Brings an output into the form of the label."""
    metric: str
    unit: str
    score: Callable[[Any], float]
    """Reads the metric off the meter."""


def _classes(weight: float, metric: str) -> _Task:
    def loss(output: Tensor, target: Tensor, _: Tensor) -> Tensor:
        return F.cross_entropy(output, target, ignore_index=IGNORED)

    def score(meter: Confusion) -> float:
        return 100 * mean_iou(meter.compute(), "all")

    return _Task(weight, loss, lambda output: output.argmax(dim=1), metric, "%", score)


TASKS = {
    "segmentation": _classes(1.0, "semseg_miou"),
    "parts": _classes(2.0, "parts_miou"),
    "saliency": _Task(
        5.0,
        lambda output, target, _: balanced_cross_entropy(output[:, 0], target),
        lambda output: output[:, 0].sigmoid(),
        "saliency_maxf", "%", lambda meter: 100 * meter.compute(),
    ),
    "normals": _Task(
        10.0, normal_l1_loss, lambda output: output,
        "normals_mean", "°", lambda meter: meter.compute(),
    ),
    "depth": _Task(
        1.0,
        lambda output, target, _: depth_l1_loss(output[:, 0], target),
        lambda output: output[:, 0],
        "depth_rmse", "m", lambda meter: meter.compute(),
    ),
}  # fmt: skip
"""By the name of the label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiTaskProbe(TrainedBenchmark):
    """A convolutional head for each task, on the last map."""

    steps: int = 40_000
    images_per_step: int = 4
    weight_decay: float = 1e-6
    warmup_steps: int = 0
    decay: Decay = "poly"
    gradient_clip: float = 10.0

    head: ClassVar[str] = "conv"
    pools_step: ClassVar[bool] = True
    tasks: ClassVar[Mapping[str, int]]
    """Channels of each head."""

    def augmentation(self) -> Augmentation:
        """Divide depth by the scale, and pad on all sides."""
        return Augmentation(self.crop, scale_depth=True, centred=True)

    def test_example(self, image: Any) -> Example:
        """Read an image, at its own size, with black around it up to the crop's."""
        return Example(
            image.key, *padded(read_pixels(image), image.labels(), self.crop, centred=True)
        )

    def heads(self, channels: Sequence[int]) -> dict[str, nn.Module]:
        """Make a head for each task."""
        return {name: ConvProbe(sum(channels), outputs) for name, outputs in self.tasks.items()}

    def losses(self, outputs: Outputs, labels: Labels) -> dict[str, Tensor]:
        """Return the weighted loss of each task; zero for one that no image of the step shows."""
        losses = {}
        for name, output in outputs.items():
            target = labels[name]
            known = known_pixels(name, target)
            if known.any():
                output = F.interpolate(output, target.shape[-2:], mode="bilinear")
                losses[name] = TASKS[name].weight * TASKS[name].loss(output, target, known)
            else:
                losses[name] = 0 * output.sum()
        return losses

    @abstractmethod
    def meters(self, device: torch.device | str) -> Meters:
        """Make a meter for each task."""

    def measure(self, meters: Meters, outputs: Outputs, labels: Labels) -> None:
        """Feed a test image to the meter of each task."""
        for name, output in outputs.items():
            target = labels[name][None]
            known = [known_pixels(name, target)] if name == "normals" else []
            meters[name].update(TASKS[name].read(output), target, *known)

    def scores(self, meters: Meters) -> list[Score]:
        """Return the score of each task."""
        tasks = [(TASKS[name], meter) for name, meter in meters.items()]
        return [
            self.score(task.metric, task.score(meter), task.unit, task.unit == "%")
            for task, meter in tasks
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class PascalContext(MultiTaskProbe):
    """PASCAL-Context: 4,998 training and 5,105 test images, four tasks."""

    as_published: bool = False
    """Measure saliency as MLoRE's meter does, which takes the sigmoid of a probability."""

    name: ClassVar[str] = "pascal_context"
    sources: ClassVar[Mapping[str, str]] = {"data": "data.pascal_context"}
    group: ClassVar[str] = "Pascal Context"
    tasks: ClassVar[Mapping[str, int]] = {
        "segmentation": 21, "parts": 7, "saliency": 1, "normals": 3,
    }  # fmt: skip

    def meters(self, device: torch.device | str) -> Meters:
        """Make a meter for each task."""
        return {
            "segmentation": Confusion(self.tasks["segmentation"], device),
            "parts": Confusion(self.tasks["parts"], device),
            "saliency": MaxF(self.as_published, device),
            "normals": PooledNormals(device),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Nyud(MultiTaskProbe):
    """NYUDv2: 795 training and 654 test images, three tasks; not NYU depth as DINOv2 has it."""

    crop: Size = (448, 576)

    name: ClassVar[str] = "nyud"
    sources: ClassVar[Mapping[str, str]] = {"data": "data.nyud"}
    group: ClassVar[str] = "NYUDv2"
    tasks: ClassVar[Mapping[str, int]] = {"segmentation": 40, "depth": 1, "normals": 3}

    def meters(self, device: torch.device | str) -> Meters:
        """Make a meter for each task."""
        return {
            "segmentation": Confusion(self.tasks["segmentation"], device),
            "depth": PooledDepth(device),
            "normals": PooledNormals(device),
        }


def known_pixels(name: str, target: Tensor) -> Tensor:
    """Return where a batch of labels of a task says something, ``[B, H, W]`` bool."""
    if name == "normals":
        return target.any(dim=1)
    return target > 0 if name == "depth" else target != IGNORED
