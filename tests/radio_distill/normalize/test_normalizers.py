import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from radio_distill.errors import CheckpointError, ConfigError, DataError, UnknownNameError
from radio_distill.normalize import NORMALIZERS
from radio_distill.normalize.affine import converted
from radio_distill.normalize.statistics import Moments
from radio_distill.protocols import Normalizer

AFFINE = [
    "phi_s", "none", "global_standardise", "per_channel_standardise", "ema_standardise",
    "batch_standardise",
]  # fmt: skip
NAMES = [*AFFINE, "layer_norm"]


def tokens_of(spatial: torch.Tensor) -> torch.Tensor:
    return spatial.movedim(1, -1).flatten(0, -2)


@pytest.fixture
def spatial(skewed_tokens):
    return skewed_tokens(20, 2 * 5 * 7).reshape(2, 5, 7, 20).movedim(-1, 1).contiguous()


@pytest.fixture
def build(spatial, moments_of):
    return lambda name: NORMALIZERS.get(name)().fit(moments_of(tokens_of(spatial)))


def test_registry__holds_the_papers_methods():
    assert NORMALIZERS.names() == sorted(NAMES)
    with pytest.raises(UnknownNameError, match="'phi_s'"):
        NORMALIZERS.get("phis")


@pytest.mark.parametrize("name", NAMES)
def test_normalizer__satisfies_the_protocol(name, build, spatial):
    normalizer = build(name)
    assert isinstance(normalizer, Normalizer)
    reloaded = NORMALIZERS.get(name)().load_state(normalizer.state())
    assert torch.equal(reloaded.apply(spatial), normalizer.apply(spatial))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_apply__computes_in_float32_under_autocast(name, dtype, build, spatial):
    normalizer, low = build(name), spatial.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = normalizer.apply(low)
    assert result.dtype == torch.float32
    assert result.shape == spatial.shape
    torch.testing.assert_close(result, normalizer.apply(low.double()).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", AFFINE)
def test_invert__undoes_apply(name, build, spatial):
    normalizer = build(name)
    assert (normalizer.invert(normalizer.apply(spatial)) - spatial).abs().max() < 1e-11
    with torch.autocast("cpu", dtype=torch.bfloat16):
        back = normalizer.invert(normalizer.apply(spatial.float()))
    torch.testing.assert_close(back, spatial.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("source", AFFINE)
def test_converted__is_the_way_back_and_on(source, target, build, spatial, moments_of):
    """Against float64, where the two maps are taken one after the other."""
    one = build(source)
    for scale in (3.0, 0.2):  # what one map was made of is not kept for other statistics
        two = NORMALIZERS.get(target)().fit(moments_of(tokens_of(spatial.flip(1) * scale + scale)))
        expected = two.apply(one.invert(spatial.double()))
        found = converted(spatial.float(), one, two)
        assert found.dtype == torch.float32
        assert float((found - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("name", AFFINE)
def test_fold__equals_inverting_the_output(name, build):
    normalizer, head = build(name), nn.Linear(8, 20).double()
    before = head.weight.clone()
    hidden = torch.randn(6, 8, dtype=torch.float64)
    inverted = normalizer.invert(head(hidden)[:, :, None, None])[:, :, 0, 0]
    torch.testing.assert_close(normalizer.fold(head)(hidden), inverted, rtol=1e-11, atol=1e-11)
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize("name", AFFINE)
def test_apply__is_linear_so_gradients_pass(name, build, spatial):
    normalizer, x = build(name), spatial[:1, :, :2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(normalizer.apply, x)
    assert torch.autograd.gradcheck(normalizer.invert, x)


def test_apply__result_is_channels_last(build, spatial):
    wide = spatial.contiguous(memory_format=torch.channels_last)
    result = build("phi_s").apply(wide)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, build("phi_s").apply(spatial))


def test_global_standardise__one_mean_and_deviation_for_all(build, spatial):
    expected = (spatial - spatial.mean()) / spatial.std(correction=0)
    torch.testing.assert_close(build("global_standardise").apply(spatial), expected)


def test_per_channel_standardise__each_channel_its_own(build, spatial):
    expected = F.batch_norm(spatial, None, None, training=True, eps=1e-12)
    torch.testing.assert_close(build("per_channel_standardise").apply(spatial), expected)


def test_per_channel_standardise__dead_channel_is_centred_only(moments_of, as_map, caplog):
    tokens = torch.randn(50, 4, dtype=torch.float64)
    tokens[:, 2] = 5
    normalizer = NORMALIZERS.get("per_channel_standardise")().fit(moments_of(tokens))
    assert "1 of 4 channels" in caplog.text
    assert normalizer.apply(as_map(tokens))[:, 2].abs().max() < 1e-12
    torch.testing.assert_close(normalizer.invert(normalizer.apply(as_map(tokens))), as_map(tokens))


def test_layer_norm__each_token_over_its_channels(build, spatial):
    result = tokens_of(build("layer_norm").apply(spatial))
    torch.testing.assert_close(result, F.layer_norm(tokens_of(spatial), (20,)))


def test_layer_norm__error_says_why_there_is_no_inverse(build, spatial):
    normalizer = build("layer_norm")
    for attempt in (lambda: normalizer.invert(spatial), lambda: normalizer.fold(nn.Linear(3, 20))):
        with pytest.raises(ConfigError, match="mean and scale"):
            attempt()


@pytest.mark.parametrize("name", ["phi_s", "global_standardise", "per_channel_standardise"])
def test_fit__error_for_constant_features(name, moments_of):
    constant = torch.randn(12).expand(50, 12)
    with pytest.raises(DataError, match="same for every token"):
        NORMALIZERS.get(name)().fit(moments_of(constant))


def test_load_state__error_for_state_of_another_normalizer(build):
    for name in ("none", "layer_norm", "global_standardise", "phi_s"):
        other = "global_standardise" if name == "phi_s" else "phi_s"
        with pytest.raises(CheckpointError, match="another normalizer"):
            NORMALIZERS.get(name)().load_state(build(other).state())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", AFFINE)
def test_unfold__is_the_way_back_of_fold(name, bias):
    """A head keeps its prediction, in the teacher's space, when the statistics change."""
    torch.manual_seed(0)
    before, now = (Moments(20), Moments(20))
    mixing = torch.randn(20, 20, dtype=torch.float64)
    before.update(rearrange(torch.randn(2, 9, 9, 20).double() @ mixing, "b h w c -> b c h w"))
    now.update(rearrange(torch.randn(2, 9, 9, 20).double() @ mixing + 3, "b h w c -> b c h w"))
    first, second = (NORMALIZERS.get(name)().fit(moments) for moments in (before, now))
    head, hidden = nn.Linear(7, 20, bias=bias).double(), torch.randn(5, 7).double()
    carried = second.unfold(first.fold(head))
    teacher_space = first.invert(rearrange(head(hidden), "b c -> b c 1 1"))
    expected = rearrange(second.apply(teacher_space), "b c 1 1 -> b c")
    torch.testing.assert_close(carried(hidden), expected, rtol=1e-9, atol=1e-9)
