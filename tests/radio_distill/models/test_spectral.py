"""Spectral reparametrisation and weight noise, on blocks of timm's ``test_vit`` (width 64)."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import GluMlp
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from radio_distill.errors import ConfigError
from radio_distill.models.ema import Ema
from radio_distill.models.spectral import (
    ReparametrizedLinear,
    begin_step,
    closing_loss,
    fold,
    power_iteration,
    reparametrize,
    share_matrices,
    singular_value,
    top_singular_vectors,
)

KINDS = pytest.mark.parametrize(
    ("spectral", "noise"),
    [(True, 0.0), (False, 0.1), (True, 0.1)],
    ids=["spectral", "noise", "both"],
)


def make_blocks(spectral=False, noise=0.0):
    """Two transformer blocks, the same ones each time."""
    torch.manual_seed(3)
    blocks: nn.Module = timm.create_model("test_vit").blocks[:2]
    for parameter in blocks.parameters():  # biases and norms are constants otherwise
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1)
    reparametrize(blocks, spectral, noise)
    return blocks


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, ReparametrizedLinear)]


def make_layer(groups=1, noise=0.0, out_features=6, in_features=4):
    return ReparametrizedLinear(nn.Linear(in_features, out_features), groups, noise)


def largest(matrix, groups):
    """Largest singular value of each block of rows, in float64."""
    blocks = rearrange(matrix.detach().double(), "(g o) i -> g o i", g=groups)
    return torch.linalg.svdvals(blocks)[:, 0]


def scale_of(layer):
    return F.softplus(layer.spectral_scale.detach().double()) + 0.05


def perturb(model):
    """Move every parameter, as a few updates would."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.abs().mean() * torch.randn_like(parameter))


@pytest.fixture
def tokens():
    return torch.randn(3, 7, 64)


# ------------------------------------------------------------------------------ reparametrize


@KINDS
def test_reparametrize__computes_the_same_at_first(tokens, spectral, noise):
    blocks = make_blocks().eval()
    expected = blocks(tokens)
    parameters = dict(blocks.named_parameters())
    reparametrize(blocks, spectral, noise)
    assert (blocks(tokens) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert len(layers_of(blocks)) == 8
    assert all(dict(blocks.named_parameters())[name] is p for name, p in parameters.items())


def test_reparametrize__nothing_asked():
    blocks = make_blocks()
    before = list(blocks.modules())
    reparametrize(blocks, spectral=False, noise=0.0)
    assert list(blocks.modules()) == before


def test_reparametrize__groups():
    blocks = make_blocks(spectral=True)
    gated = nn.Sequential(GluMlp(8, 16))
    reparametrize(gated, spectral=True, noise=0.0)
    groups = {name: m.groups for name, m in blocks[0].named_modules() if hasattr(m, "groups")}
    assert groups == {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}
    assert (gated[0].fc1.groups, gated[0].fc2.groups) == (2, 1)


def test_reparametrize__random_numbers_are_not_taken():
    """Otherwise a recipe's augmentations would change with the option."""
    blocks = make_blocks()
    state = torch.get_rng_state()
    reparametrize(blocks, spectral=True, noise=0.1)
    assert torch.equal(torch.get_rng_state(), state)


def test_reparametrize__twice_adds_the_noise():
    blocks, both = make_blocks(spectral=True), make_blocks(spectral=True, noise=0.1)
    reparametrize(blocks, spectral=False, noise=0.1)
    begin_step(blocks, 0)
    begin_step(both, 0)
    x = torch.randn(1, 5, 64)
    assert torch.equal(blocks(x), both(x))


@pytest.mark.parametrize(("spectral", "noise"), [(True, 0.0), (False, 0.1)])
def test_reparametrize__fused_block_is_refused(spectral, noise):
    body = nn.ModuleList([ParallelScalingBlock(32, 2)])
    with pytest.raises(ConfigError, match=r"student\.architecture: .*ParallelScalingBlock"):
        reparametrize(body, spectral, noise)


def test_reparametrize__state_names():
    plain = set(make_blocks().state_dict())
    assert set(make_blocks(noise=0.1).state_dict()) == plain
    added = set(make_blocks(spectral=True).state_dict()) - plain
    assert {name.rpartition(".")[2] for name in added} == {"spectral_scale", "left", "right"}
    assert len(added) == 3 * 8


def test_reparametrize__on_the_meta_device():
    with torch.device("meta"):
        blocks = timm.create_model("test_vit").blocks
        reparametrize(blocks, spectral=True, noise=0.0)
    assert {p.device.type for p in blocks.parameters()} == {"meta"}


# ------------------------------------------------------------------------------ the matrix in use


def test_matrix__largest_singular_values_are_the_scales():
    for layer in layers_of(make_blocks(spectral=True)):
        before = largest(layer.weight, layer.groups)
        torch.testing.assert_close(scale_of(layer), before, rtol=1e-6, atol=0)
        nn.init.normal_(layer.spectral_scale)
        measured = largest(layer.matrix(), layer.groups)
        torch.testing.assert_close(measured, scale_of(layer), rtol=2e-6, atol=0)


@given(
    groups=st.integers(1, 3),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    size=st.sampled_from([1e-20, 1e-3, 0.05, 1.0, 1e6]),
)
@settings(max_examples=60, deadline=None)
def test_matrix__equals_the_weight_at_first(groups, rows, columns, size):
    linear = nn.Linear(columns, groups * rows)
    nn.init.normal_(linear.weight, std=size)
    layer = ReparametrizedLinear(linear, groups, noise=0.0)
    # Relative to 0.05, the least that a scale can be.
    allowed = 3e-6 * max(float(linear.weight.detach().abs().max()), 0.05)
    assert (layer.matrix() - linear.weight).abs().max() <= allowed


def test_matrix__size_of_the_weight_has_no_effect():
    layer = make_layer(groups=2)
    before = layer.matrix()
    (layer.matrix() * torch.randn(6, 4)).sum().backward()
    along = rearrange(layer.weight.grad * layer.weight, "(g o) i -> g (o i)", g=2).sum(dim=1)
    torch.testing.assert_close(along, torch.zeros(2), rtol=0, atol=1e-6)
    with torch.no_grad():
        layer.weight[:3] *= 8
    torch.testing.assert_close(layer.matrix(), before)


def test_matrix__groups_do_not_mix():
    """Each block of rows gives the matrix of a layer of its own."""
    fused = make_layer(groups=3, out_features=15, in_features=7)
    perturb(fused)
    for i, weight in enumerate(fused.weight.detach().clone().split(5)):
        alone = make_layer(out_features=5, in_features=7)
        own = {"weight": weight, "bias": alone.bias}
        for name in ("spectral_scale", "left", "right"):
            own[name] = getattr(fused, name)[i : i + 1]
        alone.load_state_dict(own)
        torch.testing.assert_close(fused.matrix()[5 * i : 5 * i + 5], alone.matrix())


def test_matrix__gradient():
    layer = make_layer(groups=2).double()
    perturb(layer)

    def matrix(weight, scale):
        values = {"weight": weight, "spectral_scale": scale}
        return torch.func.functional_call(_Matrix(layer), {f"0.{k}": v for k, v in values.items()})

    assert torch.autograd.gradcheck(matrix, (layer.weight, layer.spectral_scale))


class _Matrix(nn.Sequential):
    """A module whose forward is the layer's matrix."""

    def forward(self):
        matrix: Tensor = self[0].matrix()
        return matrix


@pytest.mark.parametrize("size", [0.0, 1e-3])
def test_matrix__small_weights_are_kept_and_have_finite_gradients(size):
    """Below a largest singular value of 0.05 a matrix is W times a number near 1."""
    layer = make_layer(groups=2)
    nn.init.normal_(layer.weight, std=size)
    layer = ReparametrizedLinear(layer, groups=2, noise=0.0)
    torch.testing.assert_close(layer.matrix(), layer.weight, rtol=1e-5, atol=0)
    layer.begin_step(0)
    layer(torch.randn(5, 4)).square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.abs().max() < 100  # false for NaN
    torch.testing.assert_close(layer.left.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(layer.right.norm(dim=1), torch.ones(2))


def test_matrix__zeros_can_be_trained():
    layer = make_layer()
    nn.init.zeros_(layer.weight)
    layer = ReparametrizedLinear(layer, groups=1, noise=0.0)
    optimizer = torch.optim.AdamW([layer.weight, layer.bias, layer.spectral_scale], lr=0.05)
    inputs, map_ = torch.randn(200, 4), torch.randn(6, 4)
    for step in range(400):
        layer.begin_step(step)
        loss = F.mse_loss(layer(inputs), inputs @ map_.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3


def test_matrix__without_spectral_is_the_weight():
    layer = make_layer(groups=0, noise=0.3)
    assert layer.matrix() is layer.weight
    assert not layer.spectral


# ------------------------------------------------------------------------------ singular vectors


@pytest.mark.parametrize("shape", [(3, 5, 9), (2, 9, 5), (1, 1, 4)])
def test_top_singular_vectors__against_the_svd(shape):
    blocks = torch.randn(shape, dtype=torch.float64)
    left, right = top_singular_vectors(blocks)
    _, values, _ = torch.linalg.svd(blocks)
    torch.testing.assert_close(singular_value(blocks, left, right), values[:, 0])
    torch.testing.assert_close(torch.einsum("goi,gi->go", blocks, right), left * values[:, :1])
    torch.testing.assert_close(torch.einsum("goi,go->gi", blocks, left), right * values[:, :1])


def test_power_iteration__converges_to_the_largest_singular_value():
    """From below, and never back, as the Rayleigh quotient of W^T W does."""
    blocks = torch.randn(3, 20, 12, dtype=torch.float64)
    expected = torch.linalg.svdvals(blocks)[:, 0]
    left, right = torch.ones(3, 20, dtype=torch.float64), torch.ones(3, 12, dtype=torch.float64)
    last = torch.zeros(3, dtype=torch.float64)
    for _ in range(500):
        left, right = power_iteration(blocks, left, right)
        sigma = singular_value(blocks, left, right)
        assert (sigma >= last - 1e-12).all()
        assert (sigma <= expected + 1e-12).all()
        last = sigma
    torch.testing.assert_close(sigma, expected)


def test_power_iteration__zeros_and_nan_leave_the_estimates():
    left, right = torch.eye(3)[:2], torch.eye(4)[:2]
    blocks = torch.stack((torch.zeros(3, 4), torch.full((3, 4), torch.nan)))
    for before, after in zip((left, right), power_iteration(blocks, left, right), strict=True):
        assert torch.equal(before, after)


def test_forward__estimates_follow_the_weight():
    blocks = make_blocks(spectral=True)
    perturb(blocks)
    for step in range(300):
        begin_step(blocks, step)
        with torch.no_grad():
            blocks(torch.randn(1, 2, 64))
    for layer in layers_of(blocks):
        measured = largest(layer.matrix(), layer.groups)
        torch.testing.assert_close(measured, scale_of(layer), rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------ steps


def buffers_of(model):
    return [buffer.clone() for buffer in model.buffers()]


def same(these, those):
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def test_begin_step__one_iteration_however_many_forwards(tokens):
    blocks = make_blocks(spectral=True)
    perturb(blocks)
    before = buffers_of(blocks)
    blocks(tokens)
    assert same(before, buffers_of(blocks)), "no iteration without begin_step"
    begin_step(blocks, 0)
    once = buffers_of(blocks)
    assert not any(torch.equal(a, b) for a, b in zip(before, once, strict=True))
    for _ in range(3):
        blocks(tokens)
    assert same(once, buffers_of(blocks))
    begin_step(blocks, 1)
    assert not same(once, buffers_of(blocks))


def test_begin_step__layers_of_one_shape_do_not_mix():
    blocks = make_blocks(spectral=True)
    torch.manual_seed(0)
    perturb(blocks)
    for layer in layers_of(blocks):
        left, right = power_iteration(
            rearrange(layer.weight.detach(), "(g o) i -> g o i", g=layer.groups),
            layer.left.clone(),
            layer.right.clone(),
        )
        alone = copy.deepcopy(layer)
        begin_step(alone, 0)
        torch.testing.assert_close((alone.left, alone.right), (left, right))
    begin_step(blocks, 0)
    for layer in layers_of(blocks):
        measured = largest(layer.matrix(), layer.groups)
        assert (measured >= (1 - 1e-5) * scale_of(layer)).all()


def gradients(blocks, run, *batches):
    """Gradient of one step, summed over micro-batches."""
    begin_step(blocks, 11)
    for batch in batches:
        run(blocks, batch).square().sum().backward()
    return {name: parameter.grad for name, parameter in blocks.named_parameters()}


def run_checkpointed(blocks, tokens):
    for block in blocks:
        tokens = checkpoint(block, tokens, use_reentrant=False)
    return tokens


@KINDS
def test_forward__gradient_checkpointing_recomputes_the_same(tokens, spectral, noise):
    kept, recomputed = make_blocks(spectral, noise), make_blocks(spectral, noise)
    torch.manual_seed(0)
    perturb(kept)
    recomputed.load_state_dict(kept.state_dict())
    expected = gradients(kept, lambda blocks, x: blocks(x), tokens)
    measured = gradients(recomputed, run_checkpointed, tokens)
    assert all(torch.equal(expected[name], measured[name]) for name in expected)
    assert same(buffers_of(kept), buffers_of(recomputed))


@KINDS
def test_forward__micro_batches_give_the_gradient_of_the_batch(tokens, spectral, noise):
    whole, parts = make_blocks(spectral, noise), make_blocks(spectral, noise)
    expected = gradients(whole, lambda blocks, x: blocks(x), tokens)
    measured = gradients(parts, lambda blocks, x: blocks(x), *tokens.split(1))
    for name, value in expected.items():
        limit = 1e-5 * float(value.abs().max())
        assert (measured[name] - value).abs().max() <= limit, name
    assert same(buffers_of(whole), buffers_of(parts))


@KINDS
@pytest.mark.parametrize("run", [lambda blocks, x: blocks(x), run_checkpointed])
def test_share_matrices__the_gradient_of_passes_that_derive_their_own(tokens, spectral, noise, run):
    alone, sharing = make_blocks(spectral, noise), make_blocks(spectral, noise)
    torch.manual_seed(0)
    perturb(alone)
    sharing.load_state_dict(alone.state_dict())
    expected = gradients(alone, run, *tokens.split(1))
    begin_step(sharing, 11)
    assert share_matrices(sharing)
    outputs = [run(sharing, batch) for batch in tokens.split(1)]
    for output in outputs:
        output.square().sum().backward()
    assert all(layer.weight.grad is None for layer in layers_of(sharing))
    closing_loss(sharing).backward()
    for name, value in expected.items():
        limit = 1e-5 * float(value.abs().max())
        assert (sharing.get_parameter(name).grad - value).abs().max() <= limit, name
    begin_step(alone, 12)
    begin_step(sharing, 12)
    torch.testing.assert_close(sharing(tokens), alone(tokens))
    assert same(buffers_of(alone), buffers_of(sharing))


def test_share_matrices__evaluation_derives_its_own(tokens):
    blocks = make_blocks(spectral=True, noise=0.2)
    begin_step(blocks, 0)
    share_matrices(blocks)
    perturb(blocks)
    plain = copy.deepcopy(blocks).eval()
    fold(plain)
    torch.testing.assert_close(blocks.eval()(tokens), plain(tokens))


def test_share_matrices__a_pass_that_never_ran_adds_zeros():
    blocks = make_blocks(spectral=True)
    begin_step(blocks, 0)
    share_matrices(blocks)
    closing_loss(blocks).backward()
    assert all((layer.weight.grad == 0).all() for layer in layers_of(blocks))


def test_share_matrices__nothing_to_share():
    assert not share_matrices(make_blocks())


# ------------------------------------------------------------------------------ noise


def test_noise__one_draw_a_step_and_layer():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].load_state_dict(model[0].state_dict())
    reparametrize(model, spectral=False, noise=0.2)
    other_process = copy.deepcopy(model)
    x = torch.randn(4, 6)
    draws = []
    for seed in (1, 2, 1):
        begin_step(model, seed)
        begin_step(other_process, seed)
        first, second = model[0](x), model[1](x)
        torch.randn(1)  # the global stream has no part in it
        assert torch.equal(model[0](x), first)
        assert torch.equal(other_process[0](x), first)
        assert not torch.equal(first, second), "layers draw apart"
        draws.append(first)
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_noise__off_in_evaluation(tokens):
    blocks, plain = make_blocks(noise=0.5).eval(), make_blocks().eval()
    begin_step(blocks, 0)
    assert torch.equal(blocks(tokens), plain(tokens))
    assert not torch.equal(blocks.train()(tokens), plain(tokens))


def test_noise__needs_begin_step():
    layer = make_layer(groups=0, noise=0.1)
    with pytest.raises(AssertionError, match="begin_step"):
        layer.train()(torch.randn(2, 4))


@pytest.mark.parametrize("groups", [0, 1])
def test_noise__is_normal_around_one_and_independent(groups):
    layer = make_layer(groups, noise=0.25, out_features=400, in_features=300)
    nn.init.uniform_(layer.weight, 1, 2)
    layer = ReparametrizedLinear(layer, groups, noise=0.25)
    layer.begin_step(5)
    with torch.no_grad():
        used = (layer(torch.eye(300)) - layer.bias).T
        factors = (used / layer.matrix()).double()
    assert abs(factors.mean() - 1) < 5 * 0.25 / 120_000**0.5
    assert abs(factors.std() - 0.25) < 5 * 0.25 / 240_000**0.5
    kurtosis = ((factors - factors.mean()) / factors.std()).pow(4).mean()
    assert abs(kurtosis - 3) < 5 * (24 / 120_000) ** 0.5
    rows = torch.corrcoef(factors)
    assert (rows - torch.eye(400)).abs().max() < 6 / 300**0.5


def test_noise__gradient_flows_through_the_product():
    """dL/dW = xi * G with G the gradient at the perturbed weight xi * W."""
    layer = make_layer(groups=0, noise=0.5)
    layer.begin_step(2)
    x = torch.randn(5, 4)
    with torch.no_grad():
        used = (layer(torch.eye(4)) - layer.bias).T
    perturbed = used.clone().requires_grad_()
    F.linear(x, perturbed, layer.bias).square().sum().backward()
    layer(x).square().sum().backward()
    expected = perturbed.grad * used / layer.weight.detach()
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------ copies and states


@KINDS
def test_state__of_another_model(tokens, spectral, noise):
    trained, fresh = make_blocks(spectral, noise), make_blocks(spectral, noise)
    perturb(trained)
    begin_step(trained, 0)
    trained(tokens)
    assert not torch.equal(fresh.eval()(tokens), trained.eval()(tokens))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(tokens), trained(tokens))
    for model in (fresh.train(), trained.train()):
        begin_step(model, 1)
    assert torch.equal(fresh(tokens), trained(tokens)), "and it goes on alike"
    assert same(buffers_of(fresh), buffers_of(trained))


def test_deepcopy__is_independent(tokens):
    blocks = make_blocks(spectral=True, noise=0.1)
    copied = copy.deepcopy(blocks).eval()
    before = copied(tokens)
    perturb(blocks)
    begin_step(blocks, 0)
    blocks(tokens)
    assert torch.equal(copied(tokens), before)


def test_ema__of_a_spectral_model(tokens):
    blocks = make_blocks(spectral=True, noise=0.1)
    ema = Ema(blocks)
    assert torch.equal(ema.model(tokens), blocks.eval()(tokens))
    perturb(blocks.train())
    begin_step(blocks, 0)
    blocks(tokens)
    ema.update(blocks, decay=0.0)
    torch.testing.assert_close(ema.model(tokens), blocks.eval()(tokens))


# ------------------------------------------------------------------------------ fold


@KINDS
def test_fold__computes_the_same(tokens, spectral, noise):
    blocks = make_blocks(spectral, noise)
    perturb(blocks)
    begin_step(blocks, 0)
    blocks(tokens)
    expected = blocks.eval()(tokens)
    fold(blocks)
    assert torch.equal(blocks(tokens), expected)
    assert not layers_of(blocks)
    assert not any(module.training for module in blocks.modules())
    plain = make_blocks()
    plain.load_state_dict(blocks.state_dict())
    assert torch.equal(plain.eval()(tokens), expected)


@pytest.mark.parametrize("groups", [0, 1])
def test_folded__shares_no_memory(groups):
    layer = make_layer(groups, noise=0.1)
    folded = layer.folded()
    assert type(folded) is nn.Linear
    weight, bias = folded.weight.detach().clone(), folded.bias.detach().clone()
    perturb(layer)
    assert torch.equal(folded.weight, weight)
    assert torch.equal(folded.bias, bias)
    assert folded.weight.is_leaf


def test_folded__without_bias():
    layer = ReparametrizedLinear(nn.Linear(4, 6, bias=False), groups=1, noise=0.0)
    assert layer.folded().bias is None
    x = torch.randn(2, 4)
    assert torch.equal(layer.folded()(x), layer(x))


# ------------------------------------------------------------------------------ precision, compile


def test_autocast__matrix_and_vectors_in_float32(tokens):
    plain, cast = make_blocks(spectral=True), make_blocks(spectral=True)
    for model in (plain, cast):
        torch.manual_seed(0)
        perturb(model)
        begin_step(model, 0)
    plain(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        output = cast[0].attn.qkv(tokens)
        cast(tokens)
        matrix = cast[0].attn.qkv.matrix()
    assert output.dtype == torch.bfloat16
    assert same(buffers_of(plain), buffers_of(cast))
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix, plain[0].attn.qkv.matrix())
    output.float().square().sum().backward()
    assert cast[0].attn.qkv.weight.grad.dtype == torch.float32


def test_forward__bfloat16_model(tokens):
    expected = make_blocks(spectral=True).eval()(tokens)
    blocks = make_blocks(spectral=True, noise=0.1).bfloat16()
    measured = blocks.eval()(tokens.bfloat16())
    assert measured.dtype == torch.bfloat16
    assert F.cosine_similarity(measured.float().flatten(), expected.flatten(), dim=0) > 0.999
    begin_step(blocks, 0)
    blocks.train()(tokens.bfloat16()).sum().backward()
    assert blocks[0].attn.qkv.weight.grad.dtype == torch.bfloat16


def test_compile__same_numbers_in_every_step():
    eager = make_layer(groups=2, noise=0.1)
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, backend="eager")
    for step in range(3):
        x = torch.randn(5, 4)
        for layer in (eager, traced):
            torch.manual_seed(step)
            perturb(layer)
            begin_step(layer, step)
        torch.testing.assert_close(compiled(x), eager(x))
        torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(traced.left, eager.left)
