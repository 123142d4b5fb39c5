"""Values pass through; gradients of zeros where one is not used, and exact zeros."""

import torch

from radio_distill.models.gradients import join_gradients, touch, zero_gradient


def test_join_gradients__unused_ones_get_zeros():
    first, second = torch.randn(3, requires_grad=True), torch.full((2,), torch.nan).requires_grad_()
    joined = join_gradients(first, second)
    assert torch.equal(joined[0], first)
    joined[0].sum().backward()
    assert first.grad.tolist() == [1, 1, 1]
    assert second.grad.tolist() == [0, 0]


def test_touch__zeros_unless_its_own_gradient_is_not_finite():
    weights = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    touch(*weights).backward()
    assert all(torch.equal(weight.grad, torch.zeros_like(weight)) for weight in weights)
    (touch(*weights) * torch.nan).backward()
    assert all(weight.grad.isnan().all() for weight in weights), "so that the step is skipped"


def test_zero_gradient__is_exact_also_for_infinite_gradients():
    value = torch.randn(3, requires_grad=True)
    result = zero_gradient(value)
    assert torch.equal(result, value)
    (result * float("inf")).sum().backward()
    assert value.grad.tolist() == [0, 0, 0]
