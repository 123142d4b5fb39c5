import pytest
import torch
from torch import nn

from radio_distill.errors import ConfigError, DataError
from radio_distill.normalize.normalizers import GlobalStandardise
from radio_distill.normalize.phi_s import PhiS

# channels, rank: Sylvester, Paley I, Paley II, real widths, and covariances without full rank.
CASES = [(64, 64), (12, 12), (20, 20), (36, 36), (768, 768), (64, 5), (768, 300)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"C{case[0]}-rank{case[1]}")
def case(request):
    return request.param


@pytest.fixture(scope="module")
def fitted(case, skewed_tokens, moments_of, as_map):
    """Tokens, their moments, PHI-S fitted to them, and the normalised tokens ``[N, C]``."""
    channels, rank = case
    tokens = skewed_tokens(channels, 1000, rank)
    moments = moments_of(tokens)
    phi_s = PhiS().fit(moments)
    return tokens, moments, phi_s, phi_s.apply(as_map(tokens))[0, :, :, 0].T


def similarity(phi_s: PhiS) -> torch.Tensor:
    state = phi_s.state()
    return state["scale"] * state["rotation"]


def test_fit__every_channel_has_mean_0_and_variance_1(fitted):
    *_, normalised = fitted
    assert normalised.mean(0).abs().max() < 1e-12
    assert (normalised.var(0, correction=0) - 1).abs().max() < 1e-12


def test_fit__map_is_a_similarity(fitted):
    _, moments, phi_s, _ = fitted
    channels = len(moments.mean)
    rotation, scale = phi_s.state()["rotation"], phi_s.state()["scale"]
    identity = torch.eye(channels, dtype=torch.float64)
    assert (rotation @ rotation.T - identity).abs().max() < 1e-12
    torch.testing.assert_close(
        torch.linalg.svdvals(similarity(phi_s)), scale.expand(channels), rtol=1e-12, atol=0
    )


def test_fit__scale_is_root_of_channels_over_total_variance(fitted):
    tokens, _, phi_s, _ = fitted
    total = tokens.var(0, correction=0).sum()
    torch.testing.assert_close(
        phi_s.state()["scale"] ** 2, tokens.shape[1] / total, rtol=1e-12, atol=0
    )


def test_apply__scales_squared_errors_alike(fitted, as_map):
    tokens, _, phi_s, _ = fitted
    x, z = as_map(tokens[:50]), as_map(torch.randn_like(tokens[:50]) * 100)
    before, after = (x - z).square().mean(), (phi_s.apply(x) - phi_s.apply(z)).square().mean()
    torch.testing.assert_close(after, phi_s.state()["scale"] ** 2 * before, rtol=1e-11, atol=0)


def test_apply__one_hot_errors_have_the_same_norm(fitted):
    _, _, phi_s, _ = fitted
    norms = similarity(phi_s).norm(dim=0)  # of the images of all unit vectors
    torch.testing.assert_close(norms, phi_s.state()["scale"].expand_as(norms), rtol=1e-12, atol=0)


def test_fit__scale_ignores_rotations_of_the_input(fitted, moments_of):
    tokens, _, phi_s, _ = fitted
    turn = torch.linalg.qr(torch.randn(tokens.shape[1], tokens.shape[1], dtype=torch.float64)).Q
    turned = PhiS().fit(moments_of(tokens @ turn))
    torch.testing.assert_close(turned.state()["scale"], phi_s.state()["scale"], rtol=1e-11, atol=0)


def test_fit__equals_global_standardise_where_means_are_equal(fitted, moments_of):
    tokens, *_ = fitted
    level = moments_of(tokens - tokens.mean(0) + 3)
    torch.testing.assert_close(
        PhiS().fit(level).state()["scale"],
        GlobalStandardise().fit(level).state()["scale"],
        rtol=1e-12,
        atol=0,
    )


def test_fit__spreads_the_variance_of_every_axis_evenly(fitted):
    """The rotation takes each principal axis to a vector of equal magnitudes, as H has."""
    _, moments, phi_s, _ = fitted
    axes = torch.linalg.eigh(moments.covariance).eigenvectors
    magnitudes = (phi_s.state()["rotation"] @ axes).abs()
    assert (magnitudes - len(axes) ** -0.5).abs().max() < 1e-12


def test_apply__does_not_whiten(skewed_tokens, moments_of, as_map):
    tokens = skewed_tokens(64, 1000, rank=3)
    normalised = PhiS().fit(moments_of(tokens)).apply(as_map(tokens))[0, :, :, 0]
    off_diagonal = torch.cov(normalised, correction=0) - torch.eye(64, dtype=torch.float64)
    assert off_diagonal.abs().max() > 0.5


def test_apply__equals_reference(golden_phi_s):
    """An independent implementation, with its eigenvectors: mean, scale, rotation, both ways."""
    golden = golden_phi_s
    phi_s = PhiS().load_state(
        {
            "mean": golden["sd.mean"],
            "scale": golden["sd.alpha"],
            "rotation": golden["H8"] / 8**0.5 @ golden["eigvecs"].T,
        }
    )
    expected = golden["normalized"]
    torch.testing.assert_close(phi_s.apply(golden["features"]), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(phi_s.invert(expected), golden["denormalized"], rtol=0, atol=1e-5)


def test_fit__equals_reference_up_to_signs(golden_phi_s, moments_of):
    golden = golden_phi_s
    state = PhiS().fit(moments_of(golden["samples"])).state()
    count = len(golden["samples"])
    unbiased = ((count - 1) / count) ** 0.5  # the reference divides by count - 1
    tolerance = {"rtol": 0, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(state["mean"], golden["sd.mean"], **tolerance)
    torch.testing.assert_close(state["scale"] * unbiased, golden["sd.alpha"], **tolerance)
    spread = state["rotation"] @ golden["eigvecs"].double()  # H with some columns negated
    expected = golden["H8"] * spread[0].sign() / 8**0.5
    torch.testing.assert_close(spread, expected, **tolerance)


def test_fit__ignores_the_signs_of_eigenvectors(fitted, monkeypatch):
    _, moments, phi_s, _ = fitted
    eigh = torch.linalg.eigh

    def flipped(matrix):
        values, vectors = eigh(matrix)
        vectors[:, ::2] *= -1
        return torch.return_types.linalg_eigh((values, vectors))

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    assert torch.equal(PhiS().fit(moments).state()["rotation"], phi_s.state()["rotation"])


def test_fold__keeps_the_dtype_of_the_linear(skewed_tokens, moments_of):
    phi_s = PhiS().fit(moments_of(skewed_tokens(12, 100)))
    head = nn.Linear(5, 12)
    folded, hidden = phi_s.fold(head), torch.randn(7, 5)
    assert folded.weight.dtype == folded.bias.dtype == torch.float32
    inverted = phi_s.invert(head(hidden)[:, :, None, None])[:, :, 0, 0]
    torch.testing.assert_close(folded(hidden), inverted, rtol=1e-5, atol=1e-5)


def test_load_state__replaces_what_was_used_before(skewed_tokens, moments_of, as_map):
    first, second = (PhiS().fit(moments_of(skewed_tokens(12, 99, seed=seed))) for seed in (1, 2))
    spatial = as_map(skewed_tokens(12, 10))
    first.apply(spatial)
    first.load_state(second.state())
    assert torch.equal(first.apply(spatial), second.apply(spatial))


def test_apply__error_for_another_teacher(skewed_tokens, moments_of):
    phi_s = PhiS().fit(moments_of(skewed_tokens(12, 99)))
    with pytest.raises(ConfigError, match=r"12 channels.* have 16"):
        phi_s.apply(torch.randn(1, 16, 2, 2))


def test_fit__tiny_but_real_variance_is_enough(moments_of, as_map):
    tokens = 1 + 1e-6 * torch.randn(500, 12)
    phi_s = PhiS().fit(moments_of(tokens))
    assert phi_s.apply(as_map(tokens.double())).var(correction=0).sub(1).abs() < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fit__error_for_features_that_are_not_finite(moments_of, bad):
    tokens = torch.randn(100, 12)
    tokens[3, 4] = bad
    with pytest.raises(DataError, match="not finite"):
        PhiS().fit(moments_of(tokens))


def test_fit__error_names_orders_that_work(moments_of):
    with pytest.raises(ConfigError, match="88 and 96"):
        PhiS().fit(moments_of(torch.randn(100, 92)))
