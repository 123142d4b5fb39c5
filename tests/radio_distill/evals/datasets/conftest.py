"""Real images and labels kept beside the checkout."""

from pathlib import Path

import pytest

REAL = Path(__file__).resolve().parents[5] / "shared" / "data" / "real" / "evaluation"


@pytest.fixture
def real() -> Path:
    if not REAL.is_dir():
        pytest.skip("no real data sets beside the checkout")
    return REAL
