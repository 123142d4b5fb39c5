"""Buckets are summed over processes, whatever each runs, and leave while the pass goes on."""

import pytest
import torch
from torch import nn

from radio_distill.train.deepspeed_engine import GradientBuckets

STEPS = 2


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))


def loss(layers: nn.Sequential, rank: int, step: int, number: int) -> torch.Tensor:
    """Of one pass; rank 1 leaves out a layer, and uses the others in another order."""
    generator = torch.Generator().manual_seed(100 * rank + 10 * step + number)
    values = torch.randn(4, 8, generator=generator)
    for index in (0, 1, 2, 3, 4, 5) if rank == 0 else (4, 2, 1, 5, 0):
        values = layers[index](values)
    return values.square().sum()


def train_on_rank(rank: int):
    """Return the gradients of each step, buckets that had left when each came, and all buckets."""
    layers, found, early = model(), [], []
    buckets = GradientBuckets(layers.parameters(), bucket_bytes=288)
    layers[0].weight.register_post_accumulate_grad_hook(lambda _: early.append(len(buckets._sent)))
    for step in range(STEPS):
        layers.zero_grad()
        for number in range(2 + rank):  # one pass more on rank 1
            if number == 1 + rank:
                buckets.open()
            loss(layers, rank, step, number).backward()
        buckets.close()
        found.append([parameter.grad.clone() for parameter in layers.parameters()])
    return found, early, len(buckets._sent)


@pytest.mark.distributed
def test_buckets__are_the_sum_and_leave_before_the_pass_ends(two_processes):
    answers = two_processes(train_on_rank)
    for step in range(STEPS):
        parts = []
        for rank in range(2):
            layers = model()
            for number in range(2 + rank):
                loss(layers, rank, step, number).backward()
            parts.append(
                [torch.zeros_like(it) if it.grad is None else it.grad for it in layers.parameters()]
            )
        for found, _, _ in answers:
            assert all(map(torch.equal, found[step], map(torch.add, *parts)))
    (_, early, total), _ = answers
    assert total == 6, "a weight and a bias each"
    assert min(early[1::2]) >= 5, "the others left before the first layer was reached"
