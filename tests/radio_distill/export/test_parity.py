"""The yardstick that decides whether an export is written."""

import pytest
import torch

from radio_distill.errors import ExportError
from radio_distill.export.parity import check_equal, probe_images


def test_check_equal__small_values_are_compared_absolutely() -> None:
    wanted = {"summary": torch.tensor([0.5, -0.25])}
    found = {"summary": torch.tensor([0.5, -0.25 + 2**-12])}
    assert check_equal("onnx", wanted, found, 1e-3) == 2**-12


def test_check_equal__large_values_are_compared_relatively() -> None:
    wanted = {"a": torch.zeros(2), "features": torch.tensor([0.0, -512.0])}
    found = {"a": torch.zeros(2), "features": torch.tensor([1.0, -512.0])}
    assert check_equal("onnx", wanted, found, 2**-9) == 2**-9
    with pytest.raises(ExportError, match=r"^timm: features of .* by 2\.0e-03 .*allowed: 1e-03"):
        check_equal("timm", wanted, found, 1e-3)


def test_check_equal__refuses_what_is_not_finite() -> None:
    with pytest.raises(ExportError, match="differs by nan"):
        check_equal("onnx", {"a": torch.zeros(1)}, {"a": torch.tensor([torch.nan])}, 1e-3)


def test_probe_images__are_the_same_every_time() -> None:
    shapes = [(1, (2, 3)), (2, (1, 1))]
    first, second = (list(probe_images(8, shapes)) for _ in range(2))
    assert [tuple(images.shape) for images in first] == [(1, 3, 16, 24), (2, 3, 8, 8)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(0 <= images.min() <= images.max() <= 1 for images in first)
