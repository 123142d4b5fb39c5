"""Shapes of heads, and what they compute where that is known."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from radio_distill.evals.probe_heads import ConvProbe, DepthBins, Linear, Pyramid

GOLDEN = Path(__file__).resolve().parents[3].parent / "shared/golden/evaluation/probe3d.safetensors"


@pytest.fixture
def golden():
    if not GOLDEN.is_file():
        pytest.skip("no golden files beside the checkout")
    return load_file(GOLDEN)


@pytest.mark.parametrize(
    ("head", "size"),
    [
        (Linear(20, 3), (4, 6)),
        (Linear(20, 3, factor=4), (16, 24)),
        (ConvProbe(20, 3), (4, 6)),
        (Pyramid([5] * 4, 3, hidden=8), (64, 96)),
        (Pyramid([5] * 4, 3, hidden=8, as_published=True), (64, 96)),
    ],
)
def test_heads__shapes(head, size):
    maps = [torch.randn(2, 5, 4, 6) for _ in range(4)]
    assert head(maps).shape == (2, 3, *size)


def test_heads__read_maps_of_different_grids():
    maps = [torch.randn(2, 5, 8, 12), torch.randn(2, 5, 4, 6)]
    assert Linear(10, 3)(maps).shape == (2, 3, 4, 6)


@pytest.mark.parametrize(
    ("as_published", "output"), [(False, "dpt/output"), (True, "dpt/output_legacy_nearest")]
)
def test_pyramid__is_that_of_the_published_program(golden, as_published, output):
    names = {"ref_3.resConfUnit2.conv": "refine.3.layers"}
    for layer in range(4):
        names[f"conv_{layer}"] = f"reduce.{layer}"
        names[f"ref_{layer}.resConfUnit1.conv"] = f"skips.{layer}.layers"
        names[f"ref_{layer}.resConfUnit2.conv"] = f"refine.{layer}.layers"
    names["out_conv"] = "last"
    weights = {}
    for key, value in golden.items():
        if key.startswith("dpt/weights/"):
            module = key.removeprefix("dpt/weights/")
            theirs = next(name for name in names if module.startswith(name + "."))
            weights[names[theirs] + module.removeprefix(theirs)] = value
    head = Pyramid([6] * 4, 5, hidden=8, as_published=as_published)
    head.load_state_dict(weights)
    found = head([golden[f"dpt/input{layer}"] for layer in range(4)])
    torch.testing.assert_close(found, golden[output], rtol=1e-5, atol=1e-5)


def test_depth_bins__a_sure_bin_is_its_depth():
    head = DepthBins(nn.Identity(), 0.0, 255.0)
    logits = torch.full((1, 256, 1, 1), -5.0)
    logits[0, 77] = 1e6
    assert abs(float(head(logits)) - 77) < 0.01
