import copy

import pytest
import torch
from torch import nn

from radio_distill.models.ema import Ema


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    return model.train()


def walk(model, steps):
    """Return the weight at each of some random steps, made in place."""
    path = []
    for _ in range(steps):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(4, 3))
        path.append(model[0].weight.detach().clone())
    return path


def test_update__equals_the_closed_form(model):
    """After n steps: decay**n of the start, (1 - decay) decay**(n - 1 - i) of step i."""
    start, decay = model[0].weight.detach().clone(), 0.9
    ema = Ema(model)
    expected = decay**5 * start
    for i in range(5):
        (weight,) = walk(model, 1)
        ema.update(model, decay)
        expected = expected + (1 - decay) * decay ** (4 - i) * weight
    torch.testing.assert_close(ema.model[0].weight, expected)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_update__limits(model, decay):
    start = model[0].weight.detach().clone()
    ema = Ema(model)
    (last,) = walk(model, 1)
    ema.update(model, decay)
    assert torch.equal(ema.model[0].weight, last if decay == 0 else start)


def test_update__buffers_are_copied(model):
    ema = Ema(model)
    model(torch.randn(8, 3))
    ema.update(model, 0.99)
    assert torch.equal(ema.model[2].running_mean, model[2].running_mean)
    assert ema.model[2].num_batches_tracked == 1


def test_update__averages_bfloat16_in_float32(model):
    """A step of 2**-10 of the value is below bfloat16's resolution and must not be lost."""
    low = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(low.weight)
    ema = Ema(low)
    nn.init.constant_(low.weight, 2.0)
    ema.update(low, 1 - 2**-10)
    assert ema.model.weight.item() == 1 + 2**-10


def test_update__partial_parameter_is_a_bug_of_the_caller(model):
    ema, part = Ema(model), copy.deepcopy(model)
    part[0].weight = nn.Parameter(torch.empty(0))
    with pytest.raises(AssertionError, match=r"0\.weight"):
        ema.update(part, 0.9)


def test_model__is_its_own_and_ready_to_evaluate(model):
    ema = Ema(model)
    walk(model, 1)
    assert not torch.equal(ema.model[0].weight, model[0].weight)
    assert not any(module.training for module in ema.model.modules())
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_state_dict__resumes_to_the_same_numbers(model):
    ema = Ema(model)
    walk(model, 1)
    ema.update(model, 0.9)
    state = {name: value.clone() for name, value in ema.state_dict().items()}
    assert state.keys() == model.state_dict().keys()
    resumed = Ema(copy.deepcopy(model))
    resumed.load_state_dict(state)
    walk(model, 1)
    for one in (ema, resumed):
        one.update(model, 0.9)
    torch.testing.assert_close(ema.state_dict(), resumed.state_dict(), atol=0, rtol=0)
