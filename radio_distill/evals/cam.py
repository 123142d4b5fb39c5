"""Do class activation maps show what a class is known by? FeatUp's test of upsampled ones.

As in FeatUp (Fu et al., arXiv 2403.10516, sections 4.3 and 6.10): a linear classifier is trained
on the maximum of each channel of the map; the map times the weights of a class is the class's
activation. The half of an image where that is lower is blurred, and the classifier, asked again,
should lose little confidence (average drop) or gain some (average increase).

Behind an upsampler the classifier is still that of the coarse map. Upsampled maps say where to
blur and nothing else, so upsamplers of one encoder have one judge.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from einops import einsum
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as vision

from ..data.folder import in_batches, labelled_images, spread
from ..types import Features, Report, Score, Size, unheard
from .demand import Demand, at_most
from .encoder import Encoder, encode_shared, to_pixels
from .knn import Labelled, thin_out
from .metrics.classification import average_drop, average_increase
from .probes import LinearProbe
from .protocol import file_names, protocol_of
from .shared import answers

logger = logging.getLogger(__name__)


class _Judge(NamedTuple):
    """An encoder without its upsampler, and the size in pixels at which it sees the images."""

    encoder: Encoder
    size: Size
    probe: LinearProbe

    def spatial(self, pixels: Tensor) -> Tensor:
        """Return the map ``[B, C, h, w]`` of images of any size."""
        if tuple(pixels.shape[-2:]) != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", antialias=True)
        return self.encoder(pixels).spatial

    def confidence(self, spatial: Tensor) -> Tensor:
        """Return the probability of each class, ``[B, K]``."""
        return self.probe(_pooled(spatial)).flatten(1).softmax(dim=1)


@dataclass(frozen=True, slots=True)
class ClassActivation:
    """Average drop and increase over a folder with ``train/CLASS`` and ``val/CLASS``.

    Of the images of ``val``, in an order that is drawn, the first count that the classifier gets
    right. Behind an upsampler, ``_coarse`` is what the map without it is worth. An encoder whose
    classifier gets no image right is passed over.
    """

    folder: str
    size: int
    training_images: int = 100_000
    """Most images that the classifier learns from, evenly over the classes."""
    most: int = 2_000
    """Images that count."""
    kept: float = 0.5
    """Share of an image that stays as it is."""
    blur: float = 0.05
    """Standard deviation of the Gaussian as a share of the image's side; FeatUp states none."""
    batch_size: int = 16
    seed: int = 0

    name: ClassVar[str] = "cam"
    sources: ClassVar[dict[str, str]] = {"folder": "labels", "size": "size"}

    def demand(self, parts: Mapping[str, int], limit: int | None = None) -> Demand:
        """Count the images of both splits, as if the classifier got all right."""
        train, val = (at_most(parts[split], limit) for split in ("train", "val"))
        train, val = min(train, self.training_images), min(val, self.most)
        return Demand(
            images=train + val,
            passes={(self.size, self.size): train + 3 * val},
            batch=self.batch_size,
            reads=train + 2 * val,
        )

    def run(
        self, encoder: Encoder, limit: int | None = None, progress: Report = unheard
    ) -> list[Score]:
        """Train the classifier, and ask it of whole and of blurred images.

        ``limit`` thins out each split; progress counts the images of both, ``val`` twice. All
        processes of a run may call together: they share the images.
        """
        train, val, names = labelled_images(self.folder)
        train, val = thin_out(train, val, limit)
        train = spread(train, self.training_images)
        total = len(train) + 2 * len(val)

        def report(before: int, done: int) -> None:
            progress(min(before + done, total), total)

        size = encoder.nearest_size((self.size, self.size))
        judge = self._judge(encoder, size, train, len(names), report)
        right = self._right(judge, val)
        before = len(train) + len(val)
        report(before, 0)
        found = answers(
            in_batches(right, self.batch_size),
            lambda some, _: self._confidences(encoder, judge, size, some),
            lambda done, _: report(before, done * self.batch_size),
        )
        report(total, 0)
        if not right:
            logger.warning("%s: %s gets no image right, no score", self.name, encoder.name)
            return []
        used = [file_names(path for path, _ in split) for split in (train, val)]
        protocol = protocol_of(self, train=used[0], val=used[1])
        whole, *kept = (torch.cat([batch[kind] for batch in found]) for kind in found[0])
        return [
            Score(
                self.name, metric + kind, value, "%", higher, "CAM", len(right),
                headline=False, details={"classes": len(names)}, protocol=protocol,
            )
            for kind, answers in zip(("", "_coarse"), kept, strict=False)
            for metric, value, higher in (
                ("average_drop", average_drop(whole, answers), False),
                ("average_increase", average_increase(whole, answers), True),
            )
        ]  # fmt: skip

    def _confidences(
        self, encoder: Encoder, judge: _Judge, size: Size, images: Sequence[Labelled]
    ) -> dict[str, Tensor]:
        """Return how sure the classifier is of each image, ``[B]`` on the CPU.

        Of the whole image; of the one that the encoder's map leaves over; behind an upsampler, of
        the one that the coarse map leaves over.
        """
        pixels = torch.stack([to_pixels(path, size) for path, _ in images])
        labels = torch.tensor([label for _, label in images], device=encoder.device)
        coarse = judge.spatial(pixels)
        found = {"whole": judge.confidence(coarse)}
        maps = {"map": coarse}
        if encoder.before is not None:
            maps = {"map": encoder(pixels).spatial, "coarse": coarse}
        for kind, spatial in maps.items():
            activation = einsum(spatial, judge.probe.weight[labels], "b c h w, b c -> b h w")
            shown = keep_most_active(pixels, activation.cpu(), self.kept, self.blur)
            found[kind] = judge.confidence(judge.spatial(shown))
        return {
            kind: all_classes.gather(1, labels[:, None])[:, 0]
            for kind, all_classes in found.items()
        }

    def _judge(
        self,
        encoder: Encoder,
        size: Size,
        images: Sequence[Labelled],
        num_classes: int,
        report: Report,
    ) -> _Judge:
        """Train the classifier on maps without upsampler of images of the encoder's ``size``."""
        coarse = encoder.before or encoder
        factor = encoder.size_multiple // coarse.size_multiple
        size = (size[0] // factor, size[1] // factor)
        paths, labels = [path for path, _ in images], torch.tensor([label for _, label in images])
        pooled = encode_shared(
            coarse, paths, size, lambda features: _pooled(features.spatial), self.batch_size,
            lambda done, _: report(0, done),
        )  # fmt: skip
        probe = LinearProbe(num_classes).fit(
            torch.cat(pooled), labels[:, None, None], coarse.device
        )
        return _Judge(coarse, size, probe)

    def _right(self, judge: _Judge, val: Sequence[Labelled]) -> list[Labelled]:
        """Draw images that the classifier gets right."""

        def answer(features: Features) -> Tensor:
            return judge.confidence(features.spatial).argmax(dim=1)

        order = torch.randperm(len(val), generator=torch.Generator().manual_seed(self.seed))
        right: list[Labelled] = []
        for some in in_batches([val[index] for index in order.tolist()], self.most):
            paths = [path for path, _ in some]
            answers = encode_shared(judge.encoder, paths, judge.size, answer, self.batch_size)
            given = torch.cat(answers).tolist()
            right += [image for image, one in zip(some, given, strict=True) if image[1] == one]
            if len(right) >= self.most:
                break
        return right[: self.most]


@dataclass(frozen=True, slots=True)
class ImagenetClassActivation(ClassActivation):
    """The same over ImageNet-1k, as FeatUp has it."""

    name: ClassVar[str] = "imagenet_cam"
    sources: ClassVar[dict[str, str]] = {"folder": "data.imagenet", "size": "size"}


def keep_most_active(pixels: Tensor, activation: Tensor, share: float, blur: float) -> Tensor:
    """Return images ``[B, 3, H, W]``, blurred but for a share of their pixels.

    Args:
        pixels: the images.
        activation: ``[B, h, w]``, resized bilinearly; where it is highest, pixels stay.
        share: of the pixels that stay.
        blur: standard deviation of the Gaussian as a share of the shorter side.
    """
    height, width = pixels.shape[-2:]
    values = F.interpolate(activation[:, None], (height, width), mode="bilinear").flatten(1)
    highest = values.topk(round(share * values.shape[1]), dim=1).indices
    stays = torch.zeros_like(values, dtype=torch.bool).scatter(1, highest, True)
    deviation = blur * min(height, width)
    side = 2 * min(math.ceil(3 * deviation), height - 1, width - 1) + 1
    blurred = pixels
    for kernel in ([side, 1], [1, side]):  # at once, it would take `side` times as many products
        blurred = vision.gaussian_blur(blurred, kernel, [deviation, deviation])
    return pixels.where(stays.reshape(-1, 1, height, width), blurred)


def _pooled(spatial: Tensor) -> Tensor:
    return spatial.amax(dim=(2, 3), keepdim=True)
