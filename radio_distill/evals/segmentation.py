"""Linear probe for semantic segmentation on frozen features.

As in the mmseg recipes of DINOv2 and RADIO but without their augmentation, since features are
encoded once and kept on the CPU in half precision, ``2 * N * C * h * w`` bytes. So the probe is for
sets of hundreds of images, and its protocol is called quick; ``ade20k`` and ``voc`` train on images
that come from disk (:mod:`.semantic`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from ..errors import DataError
from ..types import Score
from .encoder import Encoder, encode_images
from .masks import Ignore, listed, open_set
from .metrics import IGNORED, confusion_matrix, mean_iou, num_shown
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
    sources: ClassVar[dict[str, str]] = {
        "folder": "segmentation",
        "size": "dense_size",
        "ignore": "segmentation_ignore",
    }

    def run(
        self,
        encoder: Encoder,
        limit: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Score]:
        """Train the probe on one split and score it on the other; ``limit`` thins out each."""
        data = open_set(self.folder, limit, self.ignore)
        pairs, split, num_classes = data.train + data.val, len(data.train), len(data.classes)
        masks = [data.mask(pair, self.size) for pair in pairs]
        if not any((mask != IGNORED).any() for mask in masks[split:]):
            raise DataError("evaluation.segmentation: no validation mask shows a training class")
        paths, size = [pair.image for pair in pairs], (self.size, self.size)
        batches = encode_images(encoder, paths, size, self.batch_size, progress)
        features = [spatial.half().cpu() for batch in batches for spatial in batch.spatial]

        solver = AdamW(
            self.steps, self.tokens_per_step, self.learning_rate, self.weight_decay, self.seed
        )
        probe = LinearProbe(num_classes, solver)
        probe.fit(features[:split], masks[:split], encoder.device)
        confusion = torch.zeros(num_classes, num_classes, dtype=torch.long)
        for spatial, mask in zip(features[split:], masks[split:], strict=True):
            logits = F.interpolate(probe(spatial[None]), mask.shape, mode="bilinear")
            confusion += confusion_matrix(logits[0].argmax(dim=0).cpu(), mask, num_classes)
        details: dict[str, int | str] = {
            "classes": num_shown(confusion),
            "ignored": listed(data.ignore),
        }
        value = 100 * mean_iou(confusion)
        used = [file_names(pair.image for pair in split) for split in (data.train, data.val)]
        protocol = protocol_of(self, train=used[0], val=used[1])
        return [
            Score(
                self.name, "miou", value, "%", True, "Dense", len(data.val),
                details=details, protocol=protocol,
            )
        ]  # fmt: skip
