"""Upsamplers side by side: what has no parameters is measured as what is fitted."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from radio_distill.config import FitConfig
from radio_distill.errors import DataError, WeightsError
from radio_distill.normalize.phi_s import PhiS
from upsamplers.comparison import (
    fit_probe,
    load_fitted,
    maps_of,
    preservation,
    without_parameters,
)
from upsamplers.fit.consistency import Consistency
from upsamplers.fitted import UpsamplerModel, save_model
from upsamplers.fitted_files import FittedHeader
from upsamplers.methods.interpolate import Bilinear
from upsamplers.methods.native import Native
from upsamplers.methods.strided import Strided
from upsamplers.methods.tile import Tile
from upsamplers.metrics import measure
from upsamplers.networks.resize_conv import BilinearNetwork

from .colours import MeanColours

CHANNELS, PATCH, SIZE, FACTOR = 6, 4, (24, 32), 2


def means(context: float = 0.0) -> MeanColours:
    return MeanColours(PATCH, CHANNELS, context, SIZE)


def normalizer(scale: float = 1.0) -> PhiS:
    turned = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS)).Q
    return PhiS().load_state(
        {"mean": torch.randn(CHANNELS), "scale": torch.tensor(scale), "rotation": turned}
    )


def bilinear_fit(bias: bool) -> Consistency:
    grid = (SIZE[0] // PATCH, SIZE[1] // PATCH) if bias else None
    model = UpsamplerModel(BilinearNetwork(CHANNELS, FACTOR), normalizer(), CHANNELS, grid)
    if model.bias is not None:
        torch.nn.init.normal_(model.bias, std=0.1)
    return Consistency(model, FitConfig(factor=FACTOR, downsampler_kernel=5), CHANNELS)


@pytest.fixture
def batches() -> list[Tensor]:
    coarse = torch.rand(3, 3, 6, 7)
    fine = F.interpolate(coarse, (SIZE[0] * FACTOR, SIZE[1] * FACTOR), mode="bicubic")
    return list(fine.clamp(0, 1).split(2))


def test_load_fitted__measures_as_the_fit_did(tmp_path: Path, batches: list[Tensor]) -> None:
    made, path = bilinear_fit(bias=True), tmp_path / "fit.safetensors"
    header = FittedHeader(
        "bilinear", "colours", "", CHANNELS, FACTOR, SIZE, fit={"downsampler_kernel": 5}
    )
    save_model(path, made.model, header, made.downsampler.state_dict())
    assert measure(load_fitted(path), means(), batches, SIZE, FACTOR) == pytest.approx(
        measure(made, means(), batches, SIZE, FACTOR), rel=1e-6
    )
    save_model(path, made.model, header)
    with pytest.raises(WeightsError, match="downsampler"):
        load_fitted(path)


def test_without_parameters__bilinear_is_the_network_of_that_name(batches: list[Tensor]) -> None:
    made = bilinear_fit(bias=False)
    free = without_parameters(Bilinear(FACTOR), means(), made)
    assert measure(free, means(), batches, SIZE, FACTOR) == pytest.approx(
        measure(made, means(), batches, SIZE, FACTOR), rel=1e-5
    )


def test_without_parameters__the_map_is_the_upsamplers_own(batches: list[Tensor]) -> None:
    made, teacher = bilinear_fit(bias=True), means(context=0.5)
    for upsampler in (Tile(FACTOR), Strided(FACTOR), Native(FACTOR)):
        free = without_parameters(upsampler, teacher, made)
        maps = maps_of(free.model, teacher, batches[0], SIZE, FACTOR)
        grid = (maps.fine.shape[-2], maps.fine.shape[-1])
        own = upsampler(teacher, batches[0], grid).spatial
        assert torch.allclose(made.model.normalizer.invert(maps.fine), own, atol=1e-4)
        assert torch.equal(maps.base, maps.low)  # no de-bias


def test_maps_of__the_base_is_the_de_biased_low_map(batches: list[Tensor]) -> None:
    model = bilinear_fit(bias=True).model
    maps = maps_of(model, means(), batches[0], SIZE, FACTOR)
    assert torch.equal(maps.base, maps.low + model.bias)
    fine = F.interpolate(maps.base, scale_factor=FACTOR, mode="bilinear")
    assert torch.allclose(maps.fine, fine, atol=1e-6)


def stripes(width: int, scale: int) -> tuple[Tensor, Tensor]:
    """Return an image of ``scale`` times SIZE in vertical stripes of two colours, and classes."""
    labels = (torch.arange(SIZE[1] * scale) // width % 2).expand(1, SIZE[0] * scale, -1)
    colours = torch.tensor([[1.0, 0.1, 0.2], [0.2, 0.3, 0.9]])
    return colours[labels].movedim(-1, 1), labels


def test_preservation__what_only_the_finer_map_shows_counts_and_a_shift_counts_against() -> None:
    """Stripes of half a cell: the low map is all alike, the native one has them."""
    teacher, made = means(), bilinear_fit(bias=False)
    probe = fit_probe(teacher, [stripes(PATCH * 2, 1)], 2)
    fine_stripes, wide_stripes = [stripes(PATCH, FACTOR)], [stripes(PATCH * 4, FACTOR)]

    def score(made: Consistency, images: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        return preservation(made.model, teacher, probe, images, SIZE, FACTOR)

    native, low = score(without_parameters(Native(FACTOR), teacher, made), fine_stripes)
    assert native == 1
    assert low < 0.4
    assert score(made, fine_stripes) == pytest.approx((low, low), abs=0.1)
    assert score(made, wide_stripes) == (1, 1)
    torch.nn.init.normal_((biased := bilinear_fit(bias=True)).model.bias, std=3.0)
    assert score(biased, wide_stripes)[0] < 0.8
    with pytest.raises(DataError, match="labelled"):
        score(made, [(image, torch.full_like(labels, -1)) for image, labels in wide_stripes])
