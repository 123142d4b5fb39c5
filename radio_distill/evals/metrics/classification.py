"""Accuracy over images."""

import torch
from torch import Tensor


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Return the share of images whose class is among the ``k`` of highest score, in [0, 1].

    Args:
        scores: ``[Q, K]``, of each class for each image.
        labels: ``[Q]`` class indices.
        k: classes that are looked at.
    """
    best = scores.topk(k, dim=1).indices
    return (best == labels[:, None]).any(dim=1).double().mean().item()


def macro_accuracy(correct: Tensor, labels: Tensor) -> float:
    """Return the mean over classes of the share of images that are right, in [0, 1].

    Args:
        correct: ``[Q]`` bool.
        labels: ``[Q]`` class indices; a class that does not occur does not count.
    """
    shares = [correct[labels == label].double().mean() for label in labels.unique()]
    return torch.stack(shares).mean().item()
