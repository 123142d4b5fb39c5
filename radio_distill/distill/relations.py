"""Relational losses: how images lie to each other, in the student as in a teacher.

Such a loss needs the summaries of all images of a partition, whichever process has them, before it
has a gradient for any. So each process runs its student ahead without gradients, the summaries are
put together, and the gradient of the loss by each summary is taken of the whole, once. In the pass
that follows, an image's part of the loss is its summary times that gradient: exact, on any number
of processes and micro-batches.

What it costs: the student's forward pass a second time (where a process has one pass in a step, its
first serves), the targets of a step kept until its end, and B² distances on each process.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..stage import Partition, Stage
from ..system.distributed import all_reduce_sum
from ..types import Features

RELATION = "relation"
"""A relational term is called ``teacher/relation``."""


class Relation(NamedTuple):
    """The relational loss of a partition's images."""

    value: Tensor
    """Scalar."""
    slopes: Tensor
    """``[B, S]``: the gradient by the student's summaries, B times as large."""

    def of(self, summaries: Tensor, first: int) -> Tensor:
        """Return the loss of the images from the ``first`` on, whose summaries are ``[n, S]``.

        ``[n]``; all are the value of the whole. Their mean over the partition has its gradient.
        """
        slopes = self.slopes[first : first + len(summaries)]
        moved = (summaries.to(slopes) * slopes).sum(1)
        return self.value + moved - moved.detach()


class Summaries:
    """The summaries of a step's images, student's and teachers', where a relation is asked for.

    Args:
        stage: its partitions, its teachers and their relations.
        device: where they lie.
        dtype: of the student's weights; they are kept in float32 at least.
    """

    def __init__(self, stage: Stage, device: torch.device, dtype: torch.dtype = torch.float32):
        kept = torch.promote_types(dtype, torch.float32)
        self._stage = stage
        self._partitions = {partition.name: partition for partition in stage.partitions}
        self._tables = {
            (partition.name, name): torch.zeros(
                (2, partition.batch_size, stage.specs[name].summary_channels or 0),
                dtype=kept,
                device=device,
            )
            for partition in stage.partitions
            for name in teachers_related(stage, partition)
        }

    def add(
        self,
        partition: Partition,
        first: int,
        predictions: Mapping[str, Features],
        targets: Mapping[str, Features],
    ) -> None:
        """Take in what student and teachers say of some images, ``first`` in the step's order."""
        for (name, teacher), table in self._tables.items():
            if name == partition.name:
                for row, item in enumerate((predictions[teacher], targets[teacher])):
                    assert item.summary is not None, f"no summary of teacher {teacher}"
                    start = first - partition.start
                    table[row, start : start + len(item.summary)] = item.summary.detach()

    def relations(self) -> dict[tuple[str, str], Relation]:
        """Return the relation by partition and teacher; every rank must call, once a step."""
        return {
            (partition, teacher): relate(
                self._stage.losses[teacher].relation, *all_reduce_sum(table)
            )
            for (partition, teacher), table in self._tables.items()
        }


def teachers_related(stage: Stage, partition: Partition) -> list[str]:
    """Return the teachers whose relations a partition's images take over."""
    losses = stage.losses
    return [
        name
        for name in partition.teachers
        if losses[name].relation
        and stage.teachers[name].summary_weight
        and stage.specs[name].summary_channels is not None
        and partition.has_summaries[name]
    ]


def relate(weights: Mapping[Any, float], student: Tensor, teacher: Tensor) -> Relation:
    """Return the weighted sum of relational losses of summaries ``[B, S]``, and its gradient."""
    student = student.detach().requires_grad_()
    with torch.enable_grad(), torch.autocast(student.device.type, enabled=False):
        losses = [weight * RELATIONS[name](student, teacher) for name, weight in weights.items()]
        loss = torch.stack(losses).sum()
        (slopes,) = torch.autograd.grad(loss, student)
    return Relation(loss.detach(), slopes * len(student))


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return how far the distances between summaries ``[B, S]`` are from the teacher's.

    RKD (arXiv 1904.05068): distances over their mean, smooth L1, averaged over pairs.
    """
    ours, theirs = _distances(student), _distances(teacher)
    return _over_pairs(F.smooth_l1_loss(ours, theirs, reduction="none"))


def arkd(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the asymmetric form of :func:`rkd_distance` (SigLino, arXiv 2512.20157).

    Pairs that are nearer than the teacher's median are only pulled together, where they are too far
    apart; the others only pushed apart. The paper spells out the first half.
    """
    ours, theirs = _distances(student), _distances(teacher)
    itself = torch.eye(len(theirs), dtype=torch.bool, device=theirs.device)
    ordered = theirs.masked_fill(itself, torch.inf).flatten().sort().values
    is_near = theirs < ordered[(len(theirs) * (len(theirs) - 1) - 1) // 2]  # the lower median
    errors = F.smooth_l1_loss(ours, theirs, reduction="none")
    return _over_pairs(errors * torch.where(is_near, ours > theirs, ours < theirs))


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Return how far the angles of triangles of summaries ``[B, S]`` are from the teacher's.

    RKD (arXiv 1904.05068): the cosine at each corner, smooth L1, averaged over triples of images,
    whose number grows with B³.
    """
    total = F.smooth_l1_loss(_corners(student), _corners(teacher), reduction="sum")
    count = len(student)
    return total / max(count * (count - 1) * (count - 2), 1)


RELATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
    "arkd": arkd,
}


def _distances(summaries: Tensor) -> Tensor:
    """Return the distances of ``[B, S]`` over their mean, ``[B, B]``, 0 on its diagonal."""
    summaries = summaries - summaries.mean(0)  # the same distances, with fewer digits lost below
    squares = summaries.square().sum(1)
    squared = squares[:, None] + squares - 2 * summaries @ summaries.T
    squared = (squared + squared.T) / 2  # rounded alike: a median of pairs counts both or neither
    # The root's slope at 0 is infinite. Equal images stay where they are.
    is_apart = squared > 1e-12 * squares.mean()
    is_apart = is_apart & ~torch.eye(len(summaries), dtype=torch.bool, device=summaries.device)
    distances = torch.where(is_apart, torch.where(is_apart, squared, 1).sqrt(), 0)
    return distances / _over_pairs(distances).clamp(min=1e-12)


def _over_pairs(values: Tensor) -> Tensor:
    """Average ``[B, B]``, zero on its diagonal, over pairs of different images."""
    return values.sum() / max(len(values) * (len(values) - 1), 1)


def _corners(summaries: Tensor) -> Tensor:
    """Return the cosine at the first of each three of ``[B, S]``: ``[B, B, B]``."""
    sides = F.normalize(summaries[None] - summaries[:, None], dim=2)
    return sides @ sides.mT
