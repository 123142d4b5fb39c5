"""What is said of whole images: their class, a class activation map, their captions."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


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


def average_drop(whole: Tensor, kept: Tensor) -> float:
    """Return A.D. = 100 · mean max(0, Y - O)/Y (Chattopadhay et al. 2018; FeatUp), in %.

    FeatUp's paper prints the sum without 1/N; its values are means.

    Args:
        whole: ``[N]`` Y, the class's probability on the whole image.
        kept: ``[N]`` O, on what the map leaves over.
    """
    whole, kept = whole.double(), kept.double()
    return 100 * ((whole - kept).clamp(min=0) / whole).mean().item()


def average_increase(whole: Tensor, kept: Tensor) -> float:
    """Return A.I., the share of images that the classifier is surer of without the rest, in %."""
    return 100 * (whole < kept).double().mean().item()


def recalls_both_ways(
    images: Tensor,
    texts: Tensor,
    image_of_text: Tensor,
    ranks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
) -> dict[str, float]:
    """Return ``text_to_image@k`` and ``image_to_text@k``, in [0, 1], as CLIP_benchmark has them.

    A text finds its image where that is among the ``k`` of largest cosine; an image finds its texts
    where *any* of them is.

    Args:
        images: ``[N, S]`` embeddings, of any length.
        texts: ``[M, S]`` embeddings.
        image_of_text: ``[M]`` index of each text's image.
        ranks: the k.
        chunk: queries at a time, so that the scores need ``chunk * max(N, M)`` values of memory.
    """
    images, texts = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    image_of_text = image_of_text.to(images.device)
    numbers = torch.arange(len(images), device=images.device)

    def hits(
        queries: Tensor, bank: Tensor, image_of_bank: Tensor, image_of_query: Tensor
    ) -> Tensor:
        """Return whether the first, the first two … of the best are right, ``[Q, max k]``."""
        most = min(max(ranks), len(bank))
        best = [(part @ bank.T).topk(most, dim=1).indices for part in queries.split(chunk)]
        right = image_of_bank[torch.cat(best)] == image_of_query[:, None]
        return right.cumsum(dim=1) > 0

    found = {
        "text_to_image": hits(texts, images, numbers, image_of_text),
        "image_to_text": hits(images, texts, image_of_text, numbers),
    }
    return {
        f"{way}@{k}": right[:, min(k, right.shape[1]) - 1].double().mean().item()
        for way, right in found.items()
        for k in ranks
    }
