"""The weight of each term of the loss."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from radio_distill.config import (
    DataConfig,
    LossConfig,
    PartitionConfig,
    Recipe,
    StageConfig,
    TeacherConfig,
)
from radio_distill.distill.loss_weights import SMALLEST, AdaLoss, TermWeights
from radio_distill.distill.losses import uncertain
from radio_distill.models.heads import Uncertainty
from radio_distill.stage import resolve_stage
from radio_distill.types import TeacherSpec

CPU = torch.device("cpu")


def weights_of(dispersions=None, **loss) -> TermWeights:
    """`clip` is in the first partition alone, a quarter of the step; `sam` in both."""
    stage = StageConfig(
        partitions=(
            PartitionConfig(name="a", size=64, teachers=("clip", "sam"), batch_size=4),
            PartitionConfig(name="b", size=64, teachers=("sam",), batch_size=8, weight=3.0),
        )
    )
    recipe = Recipe(
        name="any",
        data=DataConfig(shards=("none",)),
        teachers={
            "clip": TeacherConfig(preset="x", summary_weight=0.5, feature_weight=2.0),
            "sam": TeacherConfig(preset="x", summary_weight=0.0),
        },
        loss=LossConfig(**loss),
        stages={"stage1": stage},
    )
    specs = {
        name: TeacherSpec(name, 8, 8, 16, (64, 64), None, (0.5,) * 3, (0.5,) * 3)
        for name in recipe.teachers
    }
    return TermWeights(resolve_stage(recipe, "stage1", specs), dispersions or {}, CPU)


def test_now__those_of_the_teachers():
    expected = {"clip/summary": 0.5, "clip/features": 2, "sam/summary": 0, "sam/features": 1}
    assert weights_of().now() == expected


def test_now__rebalanced_by_the_part_of_the_step():
    weights = weights_of(rebalance=True).now()
    assert weights["clip/features"] == pytest.approx(2 / 0.25)
    assert weights["sam/features"] == pytest.approx(1)


def test_now__angles_over_their_dispersion():
    weights = weights_of({"clip": 0.25}, summary="angle").now()
    assert weights["clip/summary"] == pytest.approx(2)
    assert weights["clip/features"] == 2


def test_end_step__adaloss_of_means_over_images():
    weights = weights_of({"clip": 0.25}, summary="angle", weighting="adaloss")
    assert weights.now()["clip/summary"] == 0.5, "AdaLoss divides by the size itself"
    weights.add({"clip/summary": torch.tensor(4.0), "sam/features": torch.tensor(10.0)}, 1)
    weights.add({"sam/features": torch.tensor(40.0)}, 2)
    weights.end_step()
    now = weights.now()
    assert now["clip/summary"] == pytest.approx(0.5 / 4)
    assert now["sam/features"] == pytest.approx(1 / 30)
    assert now["clip/features"] == 2, "not met yet"


def test_end_step__adaloss_reads_no_number():
    """A fake tensor has none, so that reading one raises; the next step reads what has arrived."""
    with FakeTensorMode():
        weights = weights_of(weighting="adaloss")
        weights.add({"clip/summary": torch.tensor(4.0)}, 1)
        weights.end_step()
        with pytest.raises(RuntimeError):
            weights.now()


def test_state__goes_on_with_equal_weights():
    first = weights_of({"clip": 0.25}, summary="angle", weighting="adaloss")
    first.add({"clip/features": torch.tensor(3.0)}, 2)
    first.end_step()
    second = weights_of(summary="angle", weighting="adaloss")
    second.load_state(first.state())
    assert second.now() == first.now()
    assert second.state() == first.state()

    fixed = weights_of(summary="angle")
    fixed.load_state(weights_of({"clip": 0.25}, summary="angle").state())
    assert fixed.now()["clip/summary"] == pytest.approx(2)
    assert not weights_of().state(), "nothing to keep"


CLIP, SAM = "clip/summary", "sam/features"


def ada_loss(*steps: dict[str, float], momentum: float = 0.9) -> AdaLoss:
    weighting = AdaLoss(momentum)
    for means in steps:
        weighting.update(means)
    return weighting


def test_ada_loss__is_the_inverse_of_a_constant_loss():
    weighting = ada_loss(*[{CLIP: 0.02, SAM: 30.0}] * 7)
    assert weighting.weight(CLIP) == pytest.approx(1 / 0.02, rel=1e-12)
    assert weighting.weight(SAM) == pytest.approx(1 / 30, rel=1e-12)


def test_ada_loss__weight_of_a_term_not_met_is_one():
    assert AdaLoss(0.99).weight(CLIP) == 1
    assert ada_loss({SAM: 5.0}).weight(CLIP) == 1


def test_ada_loss__by_hand():
    weighting = ada_loss({CLIP: 4.0}, {CLIP: 2.0}, {SAM: 8.0}, {CLIP: 1.0, SAM: 8.0})
    assert weighting.weight(CLIP) == pytest.approx(1 / (0.9 * (0.9 * 4 + 0.1 * 2) + 0.1 * 1))
    assert weighting.weight(SAM) == pytest.approx(1 / 8)


def test_ada_loss__momentum_0_takes_the_last_loss():
    assert ada_loss({CLIP: 4.0}, {CLIP: 0.5}, momentum=0).weight(CLIP) == pytest.approx(2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_ada_loss__number_that_is_not_finite_leaves_no_trace(bad):
    spoiled = ada_loss({CLIP: bad}, {CLIP: 4.0, SAM: 1.0}, {CLIP: bad, SAM: 3.0}, {CLIP: 2.0})
    assert spoiled.weight(CLIP) == ada_loss({CLIP: 4.0}, {CLIP: 2.0}).weight(CLIP)
    assert spoiled.weight(SAM) == ada_loss({SAM: 1.0}, {SAM: 3.0}).weight(SAM)


def test_ada_loss__weight_is_bounded_where_the_loss_is_zero():
    for mean in (0.0, -1e-9):
        weighting = ada_loss({CLIP: mean})
        assert weighting.weight(CLIP) == 1 / SMALLEST
        weighting.update({CLIP: 1.0})
        assert weighting.weight(CLIP) == pytest.approx(10)


def test_ada_loss__state_goes_on_where_it_was():
    weighting = ada_loss({SAM: 3.0, CLIP: 0.1}, {SAM: 2.9})
    state = weighting.state()
    copy = AdaLoss(0.9)
    copy.load_state(state)
    for item in (weighting, copy):
        item.update({CLIP: 0.3, SAM: 1.0})
    assert copy.state() == weighting.state()
    assert copy.weight(CLIP) == weighting.weight(CLIP)
    assert list(state) == [CLIP, SAM]


@pytest.mark.parametrize("value", [1e-3, 0.5, 1.0, 40.0])
def test_uncertain__least_where_the_derivative_says(value):
    """Of e^-b L + log(1 + e^b), zero where u = e^-b solves L u (1 + u) = 1."""
    loss = torch.full((3,), value, dtype=torch.float64)
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [b], max_iter=100, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = uncertain(loss, b).mean()
        total.backward()
        return total

    optimizer.step(closure)
    expected = (math.sqrt(1 + 4 / value) - 1) / 2
    assert math.exp(-b.item()) == pytest.approx(expected, rel=1e-6)


def test_uncertain__by_hand():
    loss = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(uncertain(loss, torch.zeros(())), loss + math.log(2))
    weighted = uncertain(loss, torch.tensor(math.log(4)))
    torch.testing.assert_close(weighted, loss / 4 + math.log(5))


def test_uncertain__gradients():
    loss = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = torch.tensor(-0.7, dtype=torch.float64)
    assert torch.autograd.gradcheck(uncertain, (loss.requires_grad_(), b.requires_grad_()))


def test_uncertain__is_float32_with_a_bfloat16_parameter():
    weighted = uncertain(torch.ones(2), torch.tensor(1.0, dtype=torch.bfloat16))
    assert weighted.dtype == torch.float32
    torch.testing.assert_close(weighted, torch.full((2,), math.exp(-1) + math.log(1 + math.e)))


def test_uncertainty__starts_with_weights_of_one():
    module = Uncertainty(["clip", "sam"])
    log_variances = module()
    assert log_variances.shape == (2, 2)
    loss = torch.tensor([0.3, 5.0])
    (gradient,) = torch.autograd.grad(
        uncertain(loss.requires_grad_(), log_variances[0, 1]).sum(), loss
    )
    torch.testing.assert_close(gradient, torch.ones(2))


def test_uncertainty__gradient_reaches_the_term_that_was_used():
    module = Uncertainty(["clip", "sam"])
    uncertain(torch.tensor([3.0]), module()[1, 0]).sum().backward()
    # The slope of e^-b L + softplus(b) at 0 is 1/2 - L.
    expected = torch.tensor([[0.0, 0.0], [0.5 - 3.0, 0.0]])
    torch.testing.assert_close(module.log_variances.grad, expected)


def test_uncertainty__returns_a_copy():
    module = Uncertainty(["clip"])
    returned = module()
    module.log_variances.data.fill_(9)
    assert not returned.any()
