"""Encoders of the images of :mod:`layouts`: one that says all, and one that says nothing."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import layouts
from radio_distill.evals.encoder import Encoder
from radio_distill.types import Features

NUMBERS = torch.tensor([0, 1, 2, 3, 4, 8, 15, 35, 39, 40, 255])
"""Of label maps, each of which has a colour of its own."""


def _encoder(name: str, encode, cell: int) -> Encoder:
    def features(pixels: Tensor) -> Features:
        return Features(None, encode(pixels))

    def layers(pixels: Tensor, count: int) -> list[Features]:
        class_token = torch.zeros(len(pixels), 1)  # says nothing
        return [Features(class_token, encode(pixels))] * count

    return Encoder(name, features, cell, inner=layers)


def perfect_encoder(cell: int = 4) -> Encoder:
    """Say which number's colour each cell shows, by share."""
    palette = torch.from_numpy(layouts.painted(np.asarray(NUMBERS)) / 255.0).float()

    def encode(pixels: Tensor) -> Tensor:
        distance = (pixels[:, None] - palette[None, :, :, None, None]).square().sum(dim=2)
        shown = F.one_hot(distance.argmin(dim=1), len(NUMBERS)).permute(0, 3, 1, 2)
        return F.avg_pool2d(shown.float(), cell)

    return _encoder("perfect", encode, cell)


def random_encoder(cell: int = 4) -> Encoder:
    """Say what has nothing to do with the image."""

    def encode(pixels: Tensor) -> Tensor:
        batch, _, height, width = pixels.shape
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, len(NUMBERS), height // cell, width // cell, generator=generator)

    return _encoder("random", encode, cell)
