"""Depth and normals out of frozen maps: Probe3D on NAVI, and NYU depth as DINOv2 reports it.

Both of Probe3D (arXiv 2404.08636) train a pyramid on four layers for ten epochs of every fourth
image. Its program had mistakes when the numbers of RADIO and FeatSharp were made, which
``as_published`` repeats: slopes of depth between images of a batch, nearest upsampling, truth of
normals that is sheared, images that always come in one order.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as vision

from ..types import Score, Size
from .augmentation import Augmentation, Labels, nearest
from .datasets.navi import NaviImage
from .losses import depth_loss, uncertain_angular_loss
from .metrics.depth import align_scale_and_shift, depth_errors, eigen_crop
from .metrics.normals import normal_errors, normals_from_depth
from .metrics.sums import ImageMeans
from .probe_heads import DepthBins, Linear, Pyramid
from .probe_training import Example
from .trained import Decay, Meters, Outputs, TrainedBenchmark, read_pixels

SHARES = ("d1", "d2", "d3")
_NEAR = 0.001  # metres


@dataclass(frozen=True, slots=True, kw_only=True)
class NaviProbe(TrainedBenchmark):
    """A pyramid on images of NAVI: all of multiview to train on, wild sets to test."""

    steps: int = 2_570
    images_per_step: int = 8
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup_steps: int = 385
    decay: Decay = "quarter"
    hidden: int = 512
    """Width of the head."""
    every: int = 4
    """One image in so many is used, of either split."""
    as_published: bool = False
    """Repeat the mistakes of the program of before November 2025."""

    sources: ClassVar[Mapping[str, str]] = {"data": "data.navi"}
    group: ClassVar[str] = "Probe3D"
    head: ClassVar[str] = "dpt"
    layers: ClassVar[int] = 4
    pools_step: ClassVar[bool] = True

    @property
    def shuffles(self) -> bool:  # type: ignore[override]
        """Whether every epoch has an order of its own."""
        return not self.as_published

    def images(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """List every fourth image of multiview and of the wild sets."""
        training, test = TrainedBenchmark.images(self)
        return training[:: self.every], test[:: self.every]

    def split_sizes(self, parts: Mapping[str, int]) -> tuple[int, int]:
        """Return a fourth of both."""
        return -(-parts["multiview"] // self.every), -(-parts["wild"] // self.every)

    def training_example(self, image: Any, random: np.random.Generator | None) -> Example:
        """Read the object of an image and change its colours; without a generator, do not."""
        example = self.test_example(image)
        if random is None or random.random() >= 0.8:
            return example
        return example._replace(pixels=jittered(example.pixels, random))

    def test_example(self, image: Any) -> Example:
        """Read the object of an image, in a square around it."""
        pixels, depth, (rows, columns) = object_in(image, min(self.crop))
        labels = {"depth": depth, **self.further_labels(image, depth)}
        labels = {name: label[..., rows, columns] for name, label in labels.items()}
        targets = {name: nearest(it, self.crop) for name, it in self.targets(labels).items()}
        return Example(image.key, nearest(pixels[:, rows, columns], self.crop), targets)

    def further_labels(self, image: Any, depth: Tensor) -> dict[str, Tensor]:
        """Return labels that are made of the whole image's depth ``[H, W]``."""
        del image, depth
        return {}

    @abstractmethod
    def targets(self, labels: Labels) -> dict[str, Tensor]:
        """Return what is learnt and tested, out of the labels of the square."""

    def shares(self, mean: float, others: Mapping[str, float]) -> list[Score]:
        """Return scores of a mean share, which counts, and of others, in per cent."""
        return [
            self.score("mean_share", 100 * mean, "%"),
            *(self.score(name, 100 * share, "%", headline=False) for name, share in others.items()),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class NaviDepth(NaviProbe):
    """Relative depth of objects: 0.01 at the nearest point, 1 at the farthest."""

    bins: int = 256
    """Depths that the head votes for, evenly spaced up to 1."""

    name: ClassVar[str] = "navi_depth"

    def targets(self, labels: Labels) -> dict[str, Tensor]:
        """Scale depth to [0.01, 1] on the object; 0 off it."""
        depth = labels["depth"]
        on = depth > 0
        if not on.any():
            return {"depth": depth}
        near, far = depth[on].min(), depth[on].max()
        scaled = (depth - near) / (far - near).clamp_min(0.01) * 0.99 + 0.01
        return {"depth": scaled.where(on, 0.0)}

    def heads(self, channels: Sequence[int]) -> dict[str, nn.Module]:
        """Make a pyramid of bins up to 1."""
        pyramid = Pyramid(channels, self.bins, self.hidden, self.as_published)
        return {"depth": DepthBins(pyramid, _NEAR, 1.0)}

    def losses(self, outputs: Outputs, labels: Labels) -> dict[str, Tensor]:
        """Return Probe3D's loss of depth."""
        target = labels["depth"][:, None]
        depth = F.interpolate(outputs["depth"], target.shape[-2:], mode="bilinear")
        return {"depth": depth_loss(depth, target, self.as_published)}

    def meters(self, device: torch.device | str) -> Meters:
        """Make meters of depth as it is, and up to scale and shift."""
        names = (*SHARES, "rmse")
        return {kind: ImageMeans(names, device) for kind in ("aware", "invariant")}

    def measure(self, meters: Meters, outputs: Outputs, labels: Labels) -> None:
        """Compare a depth map, as it is and aligned."""
        depth, target = outputs["depth"][:, 0], labels["depth"][None]
        aligned = align_scale_and_shift(depth, target)
        for kind, prediction in {"aware": depth, "invariant": aligned}.items():
            meters[kind].update(depth_errors(prediction, target))

    def scores(self, meters: Meters) -> list[Score]:
        """Return the mean of the three shares after alignment, which counts, and each of them."""
        aware, invariant = meters["aware"].compute(), meters["invariant"].compute()
        shares = {f"{name}_invariant": invariant[name] for name in SHARES}
        shares |= {f"{name}_aware": aware[name] for name in SHARES}
        return self.shares(mean_share(invariant), shares)


@dataclass(frozen=True, slots=True, kw_only=True)
class NaviNormals(NaviProbe):
    """Normals of objects, as their depth and the camera have them."""

    name: ClassVar[str] = "navi_normals"

    def further_labels(self, image: Any, depth: Tensor) -> dict[str, Tensor]:
        """Return normals, away from the camera."""
        height, width = depth.shape
        focal = float(image.intrinsics((height, width))[1, 1])
        return {"normals": normals_from_depth(depth, focal, as_published=self.as_published)}

    def targets(self, labels: Labels) -> dict[str, Tensor]:
        """Return the normals."""
        return {"normals": labels["normals"]}

    def heads(self, channels: Sequence[int]) -> dict[str, nn.Module]:
        """Make a pyramid of a vector and how sure it is."""
        return {"normals": Pyramid(channels, 4, self.hidden, self.as_published)}

    def losses(self, outputs: Outputs, labels: Labels) -> dict[str, Tensor]:
        """Return the likelihood of the angles."""
        target = labels["normals"]
        normals = F.interpolate(outputs["normals"], target.shape[-2:], mode="bilinear")
        valid = target.any(dim=1)
        if not valid.any():
            return {"normals": 0 * normals.sum()}
        return {"normals": uncertain_angular_loss(normals, target, valid)}

    def meters(self, device: torch.device | str) -> Meters:
        """Make a meter of the three shares and the error."""
        return {"normals": ImageMeans((*SHARES, "rmse"), device)}

    def measure(self, meters: Meters, outputs: Outputs, labels: Labels) -> None:
        """Compare the normals of an image."""
        target = labels["normals"][None]
        meters["normals"].update(normal_errors(outputs["normals"], target, target.any(dim=1)))

    def scores(self, meters: Meters) -> list[Score]:
        """Return the mean of the three shares, which counts, and each of them."""
        values = meters["normals"].compute()
        return self.shares(mean_share(values), {name: values[name] for name in SHARES})


@dataclass(frozen=True, slots=True, kw_only=True)
class NyuDepth(TrainedBenchmark):
    """NYU Depth v2 in BTS' layout: layers, made four times as fine, vote for 256 bins.

    DINOv2's heads and loss with DINOv3's optimizer, for DINOv2's is not known to us. Scores are
    means over images in the Eigen crop, up to 10 m, of an image and its mirror image.
    """

    crop: Size = (416, 544)
    steps: int = 38_400
    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    warmup_steps: int = 12_800
    decay: Decay = "cosine"
    gradient_clip: float = 35.0
    far: float = 10.0
    """Greatest depth that counts, in metres."""
    num_layers: Literal[1, 4] = 4
    """DINOv2's lin4, with [CLS] of each of the four in each cell of its map; or lin1, the last with
    the encoder's summary, if any, which is [CLS] of DINOv2 and may be pooled elsewhere."""

    name: ClassVar[str] = "nyu_depth"
    sources: ClassVar[Mapping[str, str]] = {"data": "data.nyu_depth"}
    group: ClassVar[str] = "NYU depth"
    reads_summary: ClassVar[bool] = True
    pools_step: ClassVar[bool] = True
    mirrors_test: ClassVar[bool] = True

    @property
    def head(self) -> str:  # type: ignore[override]
        """DINOv2's name."""
        return f"lin{self.num_layers}"

    @property
    def layers(self) -> int:  # type: ignore[override]
        """Either one or four."""
        return self.num_layers

    @property
    def version(self) -> int:
        """Of lin4 without [CLS] it was 1, as it is of lin1."""
        return 2 if self.num_layers == 4 else 1

    def test_views(self) -> dict[Size, int]:
        """Return the size of all images of the set, which are mirrored too."""
        return {(480, 640): 2}

    def augmentation(self) -> Augmentation:
        """Crop and mirror images."""
        return Augmentation(self.crop, scale=(1.0, 1.0), distort=False)

    def heads(self, channels: Sequence[int]) -> dict[str, nn.Module]:
        """Make the linear head, with bins."""
        return {"depth": DepthBins(Linear(sum(channels), 256, factor=4), _NEAR, self.far)}

    def losses(self, outputs: Outputs, labels: Labels) -> dict[str, Tensor]:
        """Return DINOv2's loss of depth."""
        target = labels["depth"][:, None]
        depth = F.interpolate(outputs["depth"], target.shape[-2:], mode="bilinear")
        return {"depth": depth_loss(depth, target.where(target < self.far, 0.0))}

    def meters(self, device: torch.device | str) -> Meters:
        """Make a meter of the usual errors."""
        return {"depth": ImageMeans(("rmse", "abs_rel", "d1"), device)}

    def measure(self, meters: Meters, outputs: Outputs, labels: Labels) -> None:
        """Compare a depth map in the Eigen crop."""
        target = labels["depth"][None]
        valid = (target > _NEAR) & (target < self.far)
        valid &= eigen_crop(target.shape[-2], target.shape[-1]).to(target.device)
        depth = outputs["depth"][:, 0].clamp(_NEAR, self.far)
        meters["depth"].update(depth_errors(depth, target, valid))

    def scores(self, meters: Meters) -> list[Score]:
        """Return the errors; none counts in a gain of other benchmarks."""
        values = meters["depth"].compute()
        return [
            self.score("rmse", values["rmse"], "m", higher_is_better=False, headline=False),
            self.score("abs_rel", values["abs_rel"], "1", higher_is_better=False, headline=False),
            self.score("d1", 100 * values["d1"], "%", headline=False),
        ]


def mean_share(values: Mapping[str, float]) -> float:
    """Return the mean of the shares under three thresholds."""
    return sum(values[name] for name in SHARES) / len(SHARES)


def object_in(image: NaviImage, side: int) -> tuple[Tensor, Tensor, tuple[slice, slice]]:
    """Read an image and its depth, with ``side`` pixels as the shorter side, and find the object.

    Returns ``[3, H, W]`` uint8, ``[H, W]`` in metres, and rows and columns of the square around it.
    """
    pixels = read_pixels(image)
    factor = side / min(pixels.shape[-2:])
    height, width = (max(side, round(factor * length)) for length in pixels.shape[-2:])
    depth = nearest(image.labels()["depth"], (height, width))
    return nearest(pixels, (height, width)), depth, square_around(depth > 0, side)


def square_around(mask: Tensor, least: int) -> tuple[slice, slice]:
    """Return the rows and columns of a square around what a mask ``[H, W]`` shows.

    It lies in the centre square of side ``least``, all of which it is where nothing is shown.
    """
    top, left = ((side - least) // 2 for side in mask.shape)
    inner = mask[top : top + least, left : left + least]
    if not inner.any():
        return slice(top, top + least), slice(left, left + least)
    rows, columns = (inner.any(dim=axis).nonzero().flatten() for axis in (1, 0))
    side = int(max(rows[-1] - rows[0], columns[-1] - columns[0])) + 1
    begins = []
    for shown, origin in ((rows, top), (columns, left)):
        begin = (int(shown[0] + shown[-1]) + 1 - side) // 2
        begins.append(origin + min(max(begin, 0), least - side))
    return slice(begins[0], begins[0] + side), slice(begins[1], begins[1] + side)


def jittered(pixels: Tensor, random: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue by up to a fifth, in random order."""
    changes = [
        (vision.adjust_brightness, random.uniform(0.8, 1.2)),
        (vision.adjust_contrast, random.uniform(0.8, 1.2)),
        (vision.adjust_saturation, random.uniform(0.8, 1.2)),
        (vision.adjust_hue, random.uniform(-0.2, 0.2)),
    ]
    for number in random.permutation(len(changes)):
        change, amount = changes[number]
        pixels = change(pixels, amount)
    return pixels
