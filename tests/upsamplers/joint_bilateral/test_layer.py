"""Level and stack: parity with both published programs on outputs and all gradients, and limits."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.published_backward import published_filter_gradient
from radio_distill.errors import ConfigError
from upsamplers.joint_bilateral.layer import JointBilateralLevel, JointBilateralStack, prime_factors

WRITTEN_OUT = ["reference", "folded"]
CANCELLED = ("range_alpha", "spatial_alpha")


def state_dict(expected, prefix="sd."):
    """Return the published state dict in our names."""
    names = {name: name.removeprefix(prefix) for name in expected if name.startswith(prefix)}
    return {new: expected[old] for old, new in names.items() if not new.endswith(CANCELLED)}


@pytest.mark.parametrize("how", WRITTEN_OUT)
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("variant", ["featup", "featsharp"])
def test_level__is_the_published_one(golden, close, variant, factor, how):
    expected = golden(f"{variant}_jbu_{factor}x")
    level = JointBilateralLevel(variant, implementation=how).eval()
    level.load_state_dict(state_dict(expected))
    source = expected["source"].requires_grad_()
    out = level(source, expected["guidance"])
    out.backward(expected["grad_out"])
    close(out, expected["out"], 1e-5)
    close(source.grad, expected["grad_source"], 1e-4)
    for name, parameter in level.named_parameters():
        close(parameter.grad, expected[f"grad.{name}"], 1e-4)


def test_stack__is_featsharp(golden, close):
    expected = golden("featsharp_jbu_stack_12x")
    stack = JointBilateralStack(6, 12, "featsharp")
    stack.load_state_dict(
        {name.replace("ups.", "levels."): t for name, t in state_dict(expected).items()}
    )
    close(stack(expected["source"], expected["guidance"]), expected["out"], 1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_stack__output_fixup_commutes_with_the_levels(training):
    torch.manual_seed(0)
    stack = JointBilateralStack(4, 6, radius=1).train(training).double()
    for level in stack.levels:
        level.eval()
    low, guidance = torch.randn(2, 4, 3, 2).double(), torch.rand(2, 3, 36, 24).double()
    torch.manual_seed(1)
    out = stack(low, guidance)
    fine = low
    for level, size in zip(stack.levels, [(6, 4), (18, 12)], strict=True):
        fine = level(fine, F.adaptive_avg_pool2d(guidance, size))
    torch.manual_seed(1)
    torch.testing.assert_close(out, fine + 0.1 * stack.fixup_proj(fine))


@pytest.mark.parametrize("how", WRITTEN_OUT)
@pytest.mark.parametrize("variant", ["featup", "featsharp"])
def test_stack__gradcheck(variant, how):
    torch.manual_seed(0)
    options = {"radius": 1, "key_channels": 3, "implementation": how}
    stack = JointBilateralStack(2, 2, variant, **options).double().eval()
    names, parameters = zip(*stack.named_parameters(), strict=True)
    low = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    guidance = torch.randn(1, 3, 8, 6, dtype=torch.float64, requires_grad=True)

    def run(low, guidance, *values):
        values = dict(zip(names, values, strict=True))
        return torch.func.functional_call(stack, values, (low, guidance))

    assert torch.autograd.gradcheck(run, (low, guidance, *parameters))


def test_stack__featsharp_keeps_constants_and_featup_does_not():
    torch.manual_seed(0)
    low, guidance = torch.full((1, 3, 3, 5), 2.5), torch.rand(1, 3, 48, 80)
    out = JointBilateralStack(3, 4, "featsharp")(low, guidance)
    torch.testing.assert_close(out, torch.full((1, 3, 12, 20), 2.5))
    out = JointBilateralStack(3, 4, "featup").eval()(low, guidance)
    assert (out - 2.5).abs().max() > 0.01


@pytest.mark.parametrize("factor", [1, 2, 3, 6, 14])
@pytest.mark.parametrize("variant", ["featup", "featsharp"])
def test_stack__any_factor_and_aspect(factor, variant):
    stack = JointBilateralStack(4, factor, variant)
    out = stack(torch.rand(2, 4, 2, 5), torch.rand(2, 3, 29, 71))
    assert out.shape == (2, 4, 2 * factor, 5 * factor)


def test_stack__dropout_only_in_training():
    torch.manual_seed(0)
    low, guidance = torch.randn(1, 8, 3, 3), torch.rand(1, 3, 24, 24)
    stack = JointBilateralStack(8, 2)
    assert not torch.equal(stack(low, guidance), stack(low, guidance))
    stack.eval()
    assert torch.equal(stack(low, guidance), stack(low, guidance))
    stack = JointBilateralStack(8, 2, "featsharp").train()
    assert torch.equal(stack(low, guidance), stack(low, guidance))


def test_stack__trains_in_bfloat16_autocast():
    torch.manual_seed(0)
    stack = JointBilateralStack(8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = stack(torch.randn(2, 8, 3, 4), torch.rand(2, 3, 36, 48))
    out.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in stack.parameters())
    assert all(p.grad.abs().sum() > 0 for p in stack.parameters())


def test_stack__input_is_not_changed():
    stack = JointBilateralStack(4, 1)
    low = torch.randn(1, 4, 4, 4)
    before = low.clone()
    stack(low, torch.rand(1, 3, 8, 8))
    assert torch.equal(low, before)


def test_published_filter_gradient__changes_gradients_only_inside():
    torch.manual_seed(0)
    stack = JointBilateralStack(4, 2).eval()
    low, guidance = torch.randn(1, 4, 4, 4), torch.rand(1, 3, 16, 16)
    bias = stack.levels[0].fixup_proj[3].bias

    def run():
        out = stack(low, guidance)
        return out, torch.autograd.grad(out.square().sum(), bias)[0]

    out, right = run()
    with published_filter_gradient():
        same, wrong = run()
    assert torch.equal(out, same)
    assert torch.nonzero(wrong).flatten().tolist() == [0, 1, 4, 9, 16, 25, 36]
    assert torch.equal(run()[1], right)


@pytest.mark.parametrize(
    ("factor", "primes"), [(1, ()), (2, (2,)), (4, (2, 2)), (14, (2, 7)), (45, (3, 3, 5))]
)
def test_prime_factors__ascending(factor, primes):
    assert prime_factors(factor) == primes


def test_stack__bad_input():
    low, guidance = torch.rand(1, 4, 4, 6), torch.rand(1, 3, 40, 50)
    for factor in (0, -2):
        with pytest.raises(ConfigError, match=f"factor is {factor}"):
            JointBilateralStack(4, factor)
    with pytest.raises(ConfigError, match=r"level 2 \(times 7\).* 56x84 .*40x50"):
        JointBilateralStack(4, 14)(low, guidance)
    with pytest.raises(ConfigError, match=r"2x12.*radius 3 needs 4"):
        JointBilateralStack(4, 2)(low[:, :, :1], guidance)
    with pytest.raises(ConfigError, match="'cuda'"):
        JointBilateralStack(4, 2, implementation="cuda")(low, guidance)


def test_stack__a_measurement_without_data_leaves_later_runs_alone():
    from radio_distill.plan.meter import fake_tensors

    stack = JointBilateralStack(channels=6, factor=3, implementation="folded").eval()
    low, guidance = torch.randn(1, 6, 5, 7), torch.rand(1, 3, 40, 56)
    with fake_tensors():
        stack(torch.empty(1, 6, 5, 7), torch.empty(1, 3, 40, 56))
    expected = JointBilateralStack(channels=6, factor=3, implementation="reference").eval()
    expected.load_state_dict(stack.state_dict())
    torch.testing.assert_close(stack(low, guidance), expected(low, guidance), rtol=1e-4, atol=1e-5)
