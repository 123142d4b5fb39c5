"""Heads of a folded student speak in the teachers' space; its body is plain."""

import pytest
import torch
from torch import nn

from radio_distill.errors import ConfigError
from radio_distill.export.folded import folded
from radio_distill.models.spectral import ReparametrizedLinear
from radio_distill.normalize.normalizers import normalizers_of
from radio_distill.train.restore import load_student

NAMES = ("clip", "sam", "dino")


@pytest.mark.parametrize(
    "normalizer", ["phi_s", "none", "global_standardise", "per_channel_standardise"]
)
@torch.no_grad()
def test_folded__heads_predict_in_the_teachers_space(make_checkpoint, normalizer):
    checkpoint = make_checkpoint(normalizer)
    pixels = torch.rand(2, 3, 48, 64)
    before = load_student(checkpoint, torch.device("cpu"))(pixels, NAMES).features
    after = folded(checkpoint).model(pixels, NAMES).features
    for name, fitted in normalizers_of(checkpoint).items():
        wanted = fitted.invert(before[name].spatial)
        difference = (after[name].spatial - wanted).abs().max() / wanted.abs().max()
        assert difference <= 1e-5
        if normalizer != "none":
            assert not torch.allclose(wanted, before[name].spatial, atol=0.1)
        if before[name].summary is not None:
            assert torch.equal(after[name].summary, before[name].summary)


def test_folded__layer_norm_has_no_inverse(make_checkpoint):
    with pytest.raises(ConfigError, match="layer_norm") as caught:
        folded(make_checkpoint("layer_norm"))
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_folded__spectral_reparametrisation_is_gone(make_checkpoint):
    checkpoint = make_checkpoint("none", spectral_reparametrization=True)
    trained = load_student(checkpoint, torch.device("cpu"))
    assert any(isinstance(module, ReparametrizedLinear) for module in trained.modules())
    student = folded(checkpoint)
    kinds = {type(module) for module in student.model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {nn.Linear}
    pixels = torch.rand(1, 3, 32, 48)
    for found, wanted in zip(student.model.student(pixels), trained.student(pixels), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_folded__is_ready_to_be_written(make_checkpoint):
    student = folded(make_checkpoint())
    assert not student.model.training
    assert not any(parameter.requires_grad for parameter in student.model.parameters())
    assert {parameter.dtype for parameter in student.model.parameters()} == {torch.float32}
    assert student.summary_teachers == ("clip", "dino")
    assert student.summary_slots == [0, 2]
