"""Encoders whose answers are known, and small folders of images."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from radio_distill.evals.encoder import Encoder
from radio_distill.types import Features


def _colours(patch_size: int) -> Encoder:
    """Mean colour of each patch, and a constant so that brightness is a direction too."""

    def encode(pixels: Tensor) -> Features:
        spatial = F.pad(F.avg_pool2d(pixels, patch_size), (0, 0, 0, 0, 0, 1), value=0.5)
        return Features(spatial.mean(dim=(2, 3)), spatial)

    return Encoder("colours", encode, patch_size)


def _hues(patch_size: int) -> Encoder:
    """Mean colour of each patch as angles, so that the nearest by cosine is the nearest colour."""

    def encode(pixels: Tensor) -> Features:
        angles = torch.pi * F.avg_pool2d(pixels, patch_size)
        return Features(None, torch.cat([angles.cos(), angles.sin()], dim=1))

    return Encoder("hues", encode, patch_size)


def _noise(patch_size: int, seed: int = 0, channels: int = 16) -> Encoder:
    """Features that have nothing to do with the image."""
    generator = torch.Generator().manual_seed(seed)

    def encode(pixels: Tensor) -> Features:
        batch, _, height, width = pixels.shape
        shape = (batch, channels, height // patch_size, width // patch_size)
        return Features(None, torch.randn(shape, generator=generator))

    return Encoder("noise", encode, patch_size)


@pytest.fixture
def colours():
    return _colours


@pytest.fixture
def hues():
    return _hues


@pytest.fixture
def noise():
    return _noise


@pytest.fixture
def gradient() -> Image.Image:
    """An image whose colour names the position: red runs with x, green with y."""
    ramp = torch.linspace(0, 255, 256).round().byte()
    pixels = torch.stack([ramp.expand(256, 256), ramp[:, None].expand(256, 256)], dim=2)
    return Image.fromarray(F.pad(pixels, (0, 1), value=64).numpy())


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder with three smooth random images."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(3):
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((160, 140), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def real() -> Callable[[str], Path]:
    """Find a folder of photographs and labels that are kept beside the checkout, where it is."""

    def find(name: str) -> Path:
        folder = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "real" / name
        if not folder.is_dir():
            pytest.skip(f"no {name} beside the checkout")
        return folder

    return find
