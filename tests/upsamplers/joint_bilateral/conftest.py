"""Golden tensors of the published programs, kept beside the checkout, and a comparison."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).resolve().parents[3] / ".." / "shared" / "golden"


@pytest.fixture
def golden():
    def load(name):
        path = GOLDEN / f"{name}.safetensors"
        if not path.exists():
            pytest.skip(f"no golden file {name}")
        return load_file(path)

    return load


@pytest.fixture
def close():
    """Compare within a share of the expected tensor's largest entry, or that absolutely below 1."""

    def compare(actual, expected, tolerance):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)

    return compare
