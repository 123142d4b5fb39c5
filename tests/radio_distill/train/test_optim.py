"""Learning rates are arrays; what is periodic is due when it should be."""

import numpy as np
import pytest
import torch

from radio_distill.config import PartitionConfig, StageConfig
from radio_distill.train.optim import build_optimizer, cosine, every, learning_rates


def test_cosine__equals_torch_without_warmup():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=99, eta_min=0.1)
    expected = []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(cosine(100, 0.5, 0.1), expected, rtol=1e-9)


def test_cosine__warmup_ends_at_the_peak():
    rates = cosine(50, 1.0, 0.0, warmup_steps=10)
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.0)
    assert (np.diff(rates[10:]) < 0).all()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_cosine__short_stages_with_long_warmup(steps):
    rates = cosine(steps, 1.0, 0.0, warmup_steps=10)
    assert rates.shape == (steps,)
    assert np.isfinite(rates).all()


def test_build_optimizer__the_fused_update_is_the_plain_one():
    torch.manual_seed(0)
    start = [torch.randn(40, 30), torch.randn(7)]
    ends = []
    for fused in (True, False):
        weights = [torch.nn.Parameter(value.clone()) for value in start]
        groups = [
            {"name": "a", "params": weights[:1], "lr": 0.01, "weight_decay": 0.1},
            {"name": "b", "params": weights[1:], "lr": 0.01, "weight_decay": 0.0},
        ]
        made = build_optimizer("adamw", groups) if fused else torch.optim.AdamW(groups)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            made.step()
        ends.append(weights)
    for one, other in zip(*ends, strict=True):
        assert float((one - other).detach().norm() / other.detach().norm()) < 1e-6


def test_learning_rates__frozen_body_has_rate_zero():
    partition = PartitionConfig(name="p", size=16, teachers=("t",), batch_size=1)
    rates = learning_rates(StageConfig(partitions=(partition,), steps=20, freeze_body_steps=5))
    assert (rates["body"][:5] == 0).all()
    assert (rates["head"][:5] > 0).all()
    np.testing.assert_array_equal(rates["body"][5:], rates["head"][5:])


def test_every__the_last_step_is_always_due():
    assert [step for step in range(1, 11) if every(step, 4, 10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if every(step, 0, 10)] == [10]
