"""Linear probe for semantic segmentation on frozen features.

As in the mmseg recipes of DINOv2 and RADIO but without their augmentation, since features are
encoded once and kept on the CPU in half precision, ``2 * N * C * h * w`` bytes. So the probe is for
sets of hundreds of images, and its protocol is called quick; ``ade20k`` and ``voc`` train on images
that come from disk (:mod:`.semantic`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import DataError
from ..types import Report, Score, Size, unheard
from .demand import Demand, at_most
from .encoder import Encoder, encode_shared, to_pixels
from .examples import Show, as_bytes, shown_maps, shown_of
from .masks import Ignore, SegmentationSet, listed, open_set
from .metrics import IGNORED
from .metrics.segmentation import confusion_matrix, mean_iou, num_shown
from .probes import AdamW, LinearProbe
from .protocol import file_names, protocol_of


@dataclass(frozen=True, slots=True)
class Segmentation:
    """mIoU over a folder with ``images/{train,val}`` and ``masks/{train,val}`` of equal stems.

    Masks are one-channel PNGs of class numbers (see :mod:`.masks`); numbers of ``ignore`` are no
    class. Classes are those of the training masks; pixels of any other class are passed over, with
    a word, since no probe could know them.
    """

    folder: str
    size: int
    ignore: Ignore = "unset"
    steps: int = 1000
    tokens_per_step: int = 4096
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    batch_size: int = 8
    seed: int = 0

    name: ClassVar[str] = "segmentation"
    counts: ClassVar[bool] = True
    """Whether its scores count in a gain table."""
    sources: ClassVar[dict[str, str]] = {
        "folder": "segmentation",
        "size": "dense_size",
        "ignore": "segmentation_ignore",
    }

    def demand(self, parts: Mapping[str, int], limit: int | None = None) -> Demand:
        """Count the images of both splits."""
        images = sum(at_most(count, limit) for count in parts.values())
        return Demand(
            images=images,
            passes={(self.size, self.size): images},
            batch=self.batch_size,
            steps=self.steps,
        )

    def run(
        self,
        encoder: Encoder,
        limit: int | None = None,
        progress: Report = unheard,
        show: Show | None = None,
    ) -> list[Score]:
        """Train the probe on one split and score it on the other; ``limit`` thins out each."""
        data, masks = self._labels(limit)
        split, paths = len(data.train), [pair.image for pair in data.train + data.val]
        features = self._encode(encoder, paths, (self.size, self.size), progress)
        probe = self._fit(features[:split], masks[:split], data, encoder.device)
        return self._scores(probe, {"miou": features[split:]}, masks[split:], data, show)

    def _labels(self, limit: int | None) -> tuple[SegmentationSet, list[Tensor]]:
        """Open the set, and read the masks of both splits."""
        data = open_set(self.folder, limit, self.ignore)
        masks = [data.mask(pair, self.size) for pair in data.train + data.val]
        if not any((mask != IGNORED).any() for mask in masks[len(data.train) :]):
            raise DataError("evaluation.segmentation: no validation mask shows a training class")
        return data, masks

    def _encode(
        self, encoder: Encoder, paths: Sequence[Path], size: Size, progress: Report
    ) -> list[Tensor]:
        batches = encode_shared(
            encoder, paths, size, lambda it: it.spatial.half(), self.batch_size, progress
        )
        return [spatial for batch in batches for spatial in batch]

    def _fit(
        self,
        features: Sequence[Tensor],
        masks: Sequence[Tensor],
        data: SegmentationSet,
        device: torch.device | str,
    ) -> LinearProbe:
        solver = AdamW(
            self.steps, self.tokens_per_step, self.learning_rate, self.weight_decay, self.seed
        )
        return LinearProbe(len(data.classes), solver).fit(features, masks, device)

    def _scores(
        self,
        probe: LinearProbe,
        features: Mapping[str, Sequence[Tensor]],
        masks: Sequence[Tensor],
        data: SegmentationSet,
        show: Show | None,
    ) -> list[Score]:
        """Score the probe on the maps of the validation split, or on several kinds of them.

        Those of the first kind are shown.
        """
        shown, size = shown_of(len(data.val), show), (self.size, self.size)
        used = [file_names(pair.image for pair in split) for split in (data.train, data.val)]
        protocol = protocol_of(self, train=used[0], val=used[1])
        scores: list[Score] = []
        for metric, maps in features.items():
            confusion = torch.zeros(probe.num_classes, probe.num_classes, dtype=torch.long)
            for number, (spatial, mask) in enumerate(zip(maps, masks, strict=True)):
                logits = F.interpolate(probe(spatial[None]), mask.shape, mode="bilinear")
                answer = logits[0].argmax(dim=0).cpu()
                confusion += confusion_matrix(answer, mask, probe.num_classes)
                if show is not None and number in shown and not scores:
                    pixels = as_bytes(to_pixels(data.val[number].image, size))
                    show(shown_maps(pixels, {"segmentation": mask}, {"segmentation": logits}))
            details: dict[str, int | str] = {
                "classes": num_shown(confusion),
                "ignored": listed(data.ignore),
            }
            scores.append(
                Score(
                    self.name, metric, 100 * mean_iou(confusion), "%", True, "Dense",
                    len(data.val), headline=self.counts, details=details, protocol=protocol,
                )
            )  # fmt: skip
        return scores


@dataclass(frozen=True, slots=True)
class FeaturePreservation(Segmentation):
    """Does an upsampler stay in its encoder's space? A probe of coarse maps, asked of fine ones.

    As FeatUp tests it (Fu et al., arXiv 2403.10516): the probe is trained on the maps that the
    encoder gives without its upsampler, and then frozen. ``miou`` is its score on upsampled maps,
    ``miou_coarse`` that on the coarse ones; an upsampler that invents features of its own falls far
    below. An encoder behind no upsampler is passed over.
    """

    name: ClassVar[str] = "feature_preservation"
    counts: ClassVar[bool] = False

    def demand(self, parts: Mapping[str, int], limit: int | None = None) -> Demand:
        """Count nothing: an encoder behind no upsampler is passed over."""
        return Demand(images=0, passes={})

    def run(
        self,
        encoder: Encoder,
        limit: int | None = None,
        progress: Report = unheard,
        show: Show | None = None,
    ) -> list[Score]:
        """Train the probe on coarse maps; progress counts these, then the upsampled ones."""
        if encoder.before is None:
            return []
        data, masks = self._labels(limit)
        split, paths = len(data.train), [pair.image for pair in data.train + data.val]
        total = len(paths) + len(data.val)

        def report(first: int) -> Report:
            return lambda done, _: progress(first + done, total)

        fine = encoder.nearest_size((self.size, self.size))
        factor = encoder.size_multiple // encoder.before.size_multiple
        coarse = self._encode(
            encoder.before, paths, (fine[0] // factor, fine[1] // factor), report(0)
        )
        probe = self._fit(coarse[:split], masks[:split], data, encoder.device)
        upsampled = self._encode(encoder, paths[split:], fine, report(len(paths)))
        maps = {"miou": upsampled, "miou_coarse": coarse[split:]}
        return self._scores(probe, maps, masks[split:], data, show)
