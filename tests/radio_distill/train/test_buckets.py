"""Buckets are summed over processes, whatever each runs, and leave while the pass goes on."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from radio_distill.train.buckets import GradientBuckets

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


def train_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/store")
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
    torch.save((found, early, len(buckets._sent)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_buckets__are_the_sum_and_leave_before_the_pass_ends(tmp_path):
    mp.start_processes(train_on_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    answers = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
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
