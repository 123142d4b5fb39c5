"""UPLiFT and LiFT against their definitions, written out cell by cell."""

import pytest
import torch
import torch.nn.functional as F

from upsamplers.networks import Observation
from upsamplers.networks.lift import LiftNetwork
from upsamplers.networks.uplift import OFFSETS, UpliftNetwork

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1).double()
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1).double()


def randomised(network):
    torch.manual_seed(0)
    for parameter in network.double().parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def seen_by(channels, size, pixels):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(2, 3, size[0] * pixels, size[1] * pixels, generator=generator)
    return Observation(
        image.double(), torch.randn(2, channels, *size, generator=generator).double()
    )


def by_channels(maps, weight, bias):
    """Normalise each place of ``[B, C, h, w]`` by the mean and deviation of its channels."""
    centred = maps - maps.mean(1, keepdim=True)
    scale = (centred.square().mean(1, keepdim=True) + 1e-6).rsqrt()
    return centred * scale * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)


def convolved(state, name, number, maps, stride=1):
    """3x3 without bias, normalised, cut off at zero: the layers ``number`` to ``number + 2``."""
    out = F.conv2d(maps, state[f"{name}.{number}.weight"], stride=stride, padding=1)
    norm = (state[f"{name}.{number + 1}.weight"], state[f"{name}.{number + 1}.bias"])
    return by_channels(out, *norm).clamp_min(0)


def residual(state, name, maps, count):
    out = maps
    for number in range(0, 3 * count, 3):
        out = convolved(state, f"{name}.layers", number, out)
    weight, bias = (state[f"{name}.layers.{3 * count}.{key}"] for key in ("weight", "bias"))
    out = F.conv2d(out, weight, bias)
    same = min(out.shape[1], maps.shape[1])
    return torch.cat([out[:, :same] + maps[:, :same], out[:, same:]], dim=1)


def middle(maps, size):
    """Pick the pixel below and right of each cell's middle."""
    steps = [length // cells for length, cells in zip(maps.shape[2:], size, strict=True)]
    return maps[:, :, steps[0] // 2 :: steps[0], steps[1] // 2 :: steps[1]]


def uplift_step(state, low, maps):
    """Return one step of 2x, a fine cell at a time."""
    height, width = low.shape[2:]
    hidden = residual(state, "enter", torch.cat([low, middle(maps[-1], (height, width))], 1), 2)
    finer = F.conv_transpose2d(hidden, state["enlarge.weight"], state["enlarge.bias"], stride=2)
    finer = finer + F.interpolate(hidden, scale_factor=2, mode="bilinear", align_corners=True)
    finer = torch.cat([finer, middle(maps[-2], (2 * height, 2 * width))], 1)
    guide = residual(state, "leave", finer, 2)
    fine = low.new_zeros(len(low), low.shape[1], 2 * height, 2 * width)
    for image in range(len(low)):
        for row in range(2 * height):
            for column in range(2 * width):
                place = guide[image, :, row, column]
                logits = state["attend.weight"][:, :, 0, 0] @ place + state["attend.bias"]
                bias = state["position"][row % 2 * 2 + column % 2]
                shares = (logits + place[:17] + bias).softmax(0)
                for share, (down, right) in zip(shares, OFFSETS, strict=True):
                    y = min(max(row // 2 + down, 0), height - 1)
                    x = min(max(column // 2 + right, 0), width - 1)
                    fine[image, :, row, column] += share * low[image, :, y, x]
    return fine


@torch.no_grad()
@pytest.mark.parametrize("factor", [2, 3])
def test_uplift__is_its_definition(factor):
    network = randomised(UpliftNetwork(5, factor, width=20, cell_pixels=4))
    state, seen = dict(network.named_parameters()), seen_by(5, (3, 2), 8)
    maps = [(F.avg_pool2d(seen.guidance, 2) - MEAN) / STD]
    for number in range(5):
        maps.append(residual(state, f"encoder.{number}", maps[-1], 1))
    expected = uplift_step(state, seen.low, maps)
    if factor == 3:
        expected = uplift_step(state, expected, maps)
        expected = F.interpolate(expected, (9, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(network(seen), expected)


def lift_step(state, low, image):
    fine = convolved(state, "fine", 0, (image - MEAN) / STD, stride=2)
    fine = F.max_pool2d(convolved(state, "fine", 3, fine, stride=2), 2)
    both = torch.cat([low, convolved(state, "coarse", 0, fine, stride=2)], 1)
    hidden = F.conv_transpose2d(both, state["enlarge.weight"], state["enlarge.bias"], stride=2)
    out = convolved(state, "write", 0, torch.cat([hidden, fine], 1))
    out = convolved(state, "write", 3, out)
    return F.conv2d(out, state["write.6.weight"], state["write.6.bias"])


@torch.no_grad()
def test_lift__is_its_definition():
    network = randomised(LiftNetwork(5, 4))
    state, seen = dict(network.named_parameters()), seen_by(5, (3, 2), 32)
    expected = lift_step(state, seen.low, F.avg_pool2d(seen.guidance, 2))
    expected = lift_step(state, expected, seen.guidance)
    torch.testing.assert_close(network(seen), expected)
    constant = network(seen._replace(low=torch.ones_like(seen.low)))
    assert constant.std() > 0.1, "what comes out is written, not mixed"
