"""float32 is float32 on a GPU, for the convolutions of a teacher as for its matrix products."""

import pytest
import torch

from radio_distill.config import TeacherConfig
from radio_distill.system.distributed import World, choose_device
from teachers import build_teacher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("preset", ["tiny_vit", "tiny_cnn"])
def test_teacher__same_features_as_on_the_processor(preset):
    """TF32 rounds to 10 bits, which is a relative error of 5e-4 in each product."""
    config = TeacherConfig(preset=preset, dtype="float32")
    pixels = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    expected = build_teacher("t", config, "cpu").encode(pixels).spatial
    found = build_teacher("t", config, choose_device("cuda", World())).encode(pixels.cuda())
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.spatial.cpu(), expected, atol=3e-5 * scale, rtol=0)


def test_choose_device__tf32_is_for_products_and_convolutions_alike():
    layers = torch.nn.Linear(512, 512), torch.nn.Conv2d(512, 512, 3)
    inputs = torch.rand(64, 512), torch.rand(1, 512, 16, 16)
    try:
        device = choose_device("cuda", World(), tf32=True)
        for layer, values in zip(layers, inputs, strict=True):
            expected = layer.double()(values.double())
            found = layer.float().to(device)(values.to(device)).double().cpu()
            assert 1e-6 < float((found - expected).norm() / expected.norm()) < 5e-3
    finally:
        choose_device("cuda", World())
