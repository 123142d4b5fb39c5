"""FeatUp as a network of the fitting loop."""

import pytest
import torch
import torch.nn.functional as F

from upsamplers.joint_bilateral.layer import JointBilateralLevel
from upsamplers.networks import Observation
from upsamplers.networks.featup import FeatUpNetwork


def test_network__sees_the_image_scaled():
    network = FeatUpNetwork(4, 2).eval()
    image, low = torch.rand(1, 3, 24, 24), torch.randn(1, 4, 4, 4)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = network.stack(low, (image - mean) / std)
    torch.testing.assert_close(network(Observation(image, low)), expected)
    assert set(network.state_dict()) == {f"stack.{name}" for name in network.stack.state_dict()}


def written_out(level, low, guidance, projected):
    """Each pixel's mean of the interpolated map around it, weighted by its definition."""
    radius, (height, width) = level.radius, guidance.shape[2:]
    fine = F.interpolate(low, (height, width), mode="bilinear")
    maps = [F.pad(maps, 4 * (radius,), mode="reflect")[0] for maps in (fine, projected)]
    out = torch.empty_like(fine[0])
    offset = torch.linspace(-1, 1, 2 * radius + 1, dtype=low.dtype)
    distance = (offset[:, None] ** 2 + offset**2) / (2 * level.sigma_spatial**2)
    for row in range(height):
        for column in range(width):
            rows, columns = (slice(at, at + 2 * radius + 1) for at in (row, column))
            values, near = (each[:, rows, columns] for each in maps)
            own = projected[0, :, row, column, None, None]
            if level.similarity == "cosine":
                likeness = F.cosine_similarity(own, near, dim=0) - 1
            else:
                likeness = -(own - near).square().sum(0)
            weights = (level.range_temp.exp() * likeness - distance).exp()
            out[:, row, column] = (weights * values).sum((1, 2)) / weights.sum()
    return out


@pytest.mark.parametrize("guidance_mlp", [True, False])
@pytest.mark.parametrize("similarity", ["euclidean", "cosine"])
def test_similarity__is_the_gaussian_of_the_distance(similarity, guidance_mlp):
    torch.manual_seed(0)
    level = JointBilateralLevel(
        "featsharp", 2, 5, guidance_mlp=guidance_mlp, similarity=similarity
    ).double()
    torch.nn.init.constant_(level.range_temp, 0.7)
    low, guidance = torch.randn(1, 3, 3, 4).double(), torch.randn(1, 3, 6, 8).double()
    projected = level.range_proj(guidance) if guidance_mlp else guidance
    assert any(name.startswith("range_proj") for name in level.state_dict()) == guidance_mlp
    found = level(low, guidance)[0]
    torch.testing.assert_close(found, written_out(level, low, guidance, projected))


@pytest.mark.parametrize("variant", ["featup", "featsharp"])
@pytest.mark.parametrize("similarity", ["euclidean", "cosine"])
def test_similarity__gradients(variant, similarity):
    torch.manual_seed(0)
    level = JointBilateralLevel(variant, 1, 4, similarity=similarity).double().eval()
    low, guidance = torch.randn(1, 2, 2, 3).double(), torch.randn(1, 3, 4, 6).double()
    inputs = (low.requires_grad_(), guidance.requires_grad_())
    assert torch.autograd.gradcheck(level, inputs, fast_mode=True)
