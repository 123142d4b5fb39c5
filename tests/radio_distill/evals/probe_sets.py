"""Small data sets in the published layouts, whose colours say the class, and encoders of them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from radio_distill.evals.encoder import Encoder
from radio_distill.types import Features

PALETTE = np.random.default_rng(5).integers(0, 256, (6, 3), dtype=np.uint8)
"""Colour of each class."""


def write_voc(root: Path, train: int = 6, val: int = 3) -> Path:
    """Write pictures of 64 x 80 pixels in blocks of 16 that show classes 0 to 5."""
    random = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("val", val)):
        names = [f"{split}{number}" for number in range(count)]
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
        for name in names:
            classes = np.kron(random.integers(0, 6, (4, 5)), np.ones((16, 16), int))
            image = Image.fromarray(PALETTE[classes])
            image.save(root / f"JPEGImages/{name}.jpg", quality=95)
            Image.fromarray(classes.astype(np.uint8)).save(root / f"SegmentationClass/{name}.png")
    return root


def classes_of(pixels: Tensor) -> Tensor:
    """Return the class of each pixel ``[B, H, W]``, by the nearest colour."""
    palette = torch.from_numpy(PALETTE / 255.0).float()
    return (pixels[:, None] - palette[None, :, :, None, None]).square().sum(dim=2).argmin(dim=1)


def perfect_encoder() -> Encoder:
    """Say the class: share of each cell that every class covers, at every layer."""

    def encode(pixels: Tensor) -> Features:
        shares = F.one_hot(classes_of(pixels), 6).permute(0, 3, 1, 2).float()
        return Features(None, F.avg_pool2d(shares, 8))

    return Encoder("perfect", encode, 8)


def random_encoder() -> Encoder:
    """Say what has nothing to do with the picture."""

    def encode(pixels: Tensor) -> Features:
        batch, _, height, width = pixels.shape
        generator = torch.Generator().manual_seed(0)
        maps = torch.randn(batch, 6, height // 8, width // 8, generator=generator)
        return Features(None, maps)

    return Encoder("random", encode, 8)
