"""What holds for CARAFE, SAPA and the resize-convolution alike: gradients, precision, reach."""

import pytest
import torch

from upsamplers.networks import build_network


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("name", ["carafe", "sapa", "resize_conv"])
def test_network__trains_every_parameter(observation, name, factor, dtype):
    network, seen = build_network(name, 16, factor, {}), observation(16, factor)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        fine = network(seen)
    (fine.float() ** 2).mean().backward()
    for label, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), label
        assert parameter.grad.abs().max() > 0, label


@pytest.mark.parametrize("name", ["carafe", "sapa"])
def test_network__bf16_is_close_to_float32(observation, name):
    network, seen = build_network(name, 16, 3, {}), observation(16, 3)
    expected = network(seen)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(seen)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["carafe", "sapa"])
def test_network__a_bad_cell_reaches_no_further_than_the_kernels(observation, name):
    seen = observation(8, 2, size=(12, 12))
    seen.low[0, 0, 1, 1] = torch.nan
    fine = build_network(name, 8, 2, {})(seen)
    assert fine[1].isfinite().all()
    assert fine[0, 0, :2].isnan().any()
    assert fine[0, :, 8:].isfinite().all()
    assert fine[0, :, :, 8:].isfinite().all()
