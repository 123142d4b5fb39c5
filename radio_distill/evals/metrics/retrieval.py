"""Recall of image-text retrieval, in both directions."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


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
