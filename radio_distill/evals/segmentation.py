"""Linear probe for semantic segmentation on frozen features.

Features are standardised by the training set (batch normalisation whose batch is the whole set) and
a linear layer is trained with AdamW for a fixed number of steps, as in the mmseg recipes of DINOv2
and RADIO but without their augmentation, since features are encoded once and kept on the CPU in
half precision, ``2 * N * C * h * w`` bytes. So the probe is for sets of hundreds of images; for
all of ADE20K take mmseg.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import DataError
from ..types import Score, Size
from .encoder import Encoder, encode_images
from .masks import Ignore, listed, open_set
from .metrics import IGNORED, confusion_matrix, mean_iou, num_shown

Probe = Callable[[Tensor], Tensor]
"""``[B, C, h, w]`` to logits ``[B, K, h, w]``."""


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
        train, val, num_classes = data.train, data.val, len(data.classes)
        masks = [data.mask(pair, self.size) for pair in train + val]
        if not any((mask != IGNORED).any() for mask in masks[len(train) :]):
            raise DataError("evaluation.segmentation: no validation mask shows a training class")
        features = self._features(encoder, [pair.image for pair in train + val], progress)

        tokens, shares = training_set(features[: len(train)], masks[: len(train)], num_classes)
        probe = self._fit(tokens, shares, encoder.device)
        confusion = torch.zeros(num_classes, num_classes, dtype=torch.long)
        for spatial, mask in zip(features[len(train) :], masks[len(train) :], strict=True):
            logits = F.interpolate(probe(spatial[None]), mask.shape, mode="bilinear")
            confusion += confusion_matrix(logits[0].argmax(dim=0).cpu(), mask, num_classes)
        details: dict[str, int | str] = {
            "classes": num_shown(confusion),
            "ignored": listed(data.ignore),
        }
        value = 100 * mean_iou(confusion)
        return [Score(self.name, "miou", value, "%", True, "Dense", len(val), details=details)]

    def _features(
        self, encoder: Encoder, paths: list[Path], progress: Callable[[int, int], None] | None
    ) -> list[Tensor]:
        size = (self.size, self.size)
        batches = encode_images(encoder, paths, size, self.batch_size, progress)
        return [spatial.half().cpu() for batch in batches for spatial in batch.spatial]

    def _fit(self, tokens: Tensor, shares: Tensor, device: torch.device | str) -> Probe:
        """Train the probe on ``tokens`` [N, C] with class shares [N, K]."""
        std, mean = torch.std_mean(tokens.float(), dim=0)
        std, mean = std.clamp_min(1e-6).to(device), mean.to(device)
        linear = torch.nn.utils.skip_init(nn.Linear, len(mean), shares.shape[1], device=device)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        optimizer = torch.optim.AdamW(
            linear.parameters(), self.learning_rate, weight_decay=self.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            chosen = torch.randint(len(tokens), (self.tokens_per_step,), generator=generator)
            share = shares[chosen].to(device)
            logits = linear((tokens[chosen].to(device).float() - mean) / std)
            loss = -(share * logits.log_softmax(dim=1)).sum() / share.sum().clamp_min(1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        weight = (linear.weight / std).detach()  # standardising is linear: fold it in
        bias = linear.bias.detach() - weight @ mean
        return lambda spatial: F.conv2d(spatial.to(weight), weight[:, :, None, None], bias)


def training_set(
    features: Sequence[Tensor], masks: Sequence[Tensor], num_classes: int
) -> tuple[Tensor, Tensor]:
    """Return all cells as tokens ``[N, C]`` and what each shows as class shares ``[N, K]``."""
    tokens = [rearrange(spatial, "c h w -> (h w) c") for spatial in features]
    shares = [
        rearrange(
            class_shares(mask, (spatial.shape[1], spatial.shape[2]), num_classes),
            "k h w -> (h w) k",
        )
        for spatial, mask in zip(features, masks, strict=True)
    ]
    return torch.cat(tokens), torch.cat(shares)


def class_shares(mask: Tensor, grid: Size, num_classes: int) -> Tensor:
    """Return how much of each grid cell each class covers, ``[num_classes, h, w]``.

    Cross-entropy against these shares is cross-entropy per pixel with one logit a cell.
    """
    one_hot = mask == torch.arange(num_classes)[:, None, None]  # [K, H, W], none where IGNORED
    return F.adaptive_avg_pool2d(one_hot.float(), grid)
