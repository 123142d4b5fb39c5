"""How closely the layer must meet what is expected."""

import pytest
import torch


@pytest.fixture
def close():
    """Compare within a share of the expected tensor's largest entry, or that absolutely below 1."""

    def compare(actual, expected, tolerance):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)

    return compare
