from pathlib import Path

import pytest
import torch
from torch import Tensor

from radio_distill.normalize.statistics import Moments

GOLDEN = Path(__file__).resolve().parents[3] / ".." / "shared" / "golden"


def _skewed_tokens(channels: int, tokens: int, rank: int | None = None, seed: int = 0) -> Tensor:
    """``[tokens, C]`` with a spectrum over three decades, turned at random, and a large mean."""
    generator = torch.Generator().manual_seed(seed)
    rank = rank or channels
    basis = torch.randn(channels, channels, dtype=torch.float64, generator=generator)
    axes = torch.linalg.qr(basis).Q[:rank]
    spread = torch.logspace(0, -3, rank, dtype=torch.float64).sqrt() * 5
    mean = torch.randn(channels, dtype=torch.float64, generator=generator) * 7
    noise = torch.randn(tokens, rank, dtype=torch.float64, generator=generator)
    return noise * spread @ axes + mean


def _as_map(tokens: Tensor) -> Tensor:
    """``[N, C]`` tokens as one image ``[1, C, N, 1]``."""
    return tokens.T[None, :, :, None]


@pytest.fixture(scope="session")
def skewed_tokens():
    return _skewed_tokens


@pytest.fixture(scope="session")
def as_map():
    return _as_map


@pytest.fixture(scope="session")
def moments_of():
    def build(tokens: Tensor) -> Moments:
        moments = Moments(tokens.shape[1])
        moments.update(_as_map(tokens))
        return moments

    return build


@pytest.fixture(scope="session")
def golden_phi_s() -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = GOLDEN / "featsharp_phi_s.safetensors"
    if not path.exists():
        pytest.skip("no reference tensors beside this checkout")
    return load_file(path)
