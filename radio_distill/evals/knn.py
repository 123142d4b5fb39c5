"""k-nearest-neighbour classification on summaries, as DINO and RADIO report it.

Nothing is trained, so the number speaks of the features alone: k = 20, cosine similarity, each
neighbour votes with weight exp(similarity / 0.07), and the whole training split is the bank.
Left out: the sweep over k and temperature that some codes report the best of.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.folder import labelled_pictures
from ..errors import ConfigError
from ..types import Score
from .harness import Encoder, encode_pictures, spread


@dataclass(frozen=True, slots=True)
class Knn:
    """Top-1 accuracy over a folder with ``train/CLASS`` and ``val/CLASS``."""

    folder: str
    size: int
    k: int = 20
    temperature: float = 0.07
    batch_size: int = 16

    name: ClassVar[str] = "knn"
    sources: ClassVar[dict[str, str]] = {"folder": "labels", "size": "size"}

    def run(
        self,
        encoder: Encoder,
        limit: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Score]:
        """Classify the validation split; ``limit`` thins out each split, evenly over the classes.

        An encoder without a summary is judged by the mean of its spatial features.
        """
        train, val, names = labelled_pictures(self.folder)
        train, val = spread(train, limit), spread(val, limit)
        if len(train) < self.k:
            raise ConfigError(
                f"knn: the bank has {len(train)} pictures, fewer than k={self.k}; "
                "raise evaluation.limit or lower evaluation.options.knn.k"
            )
        embeddings = self._embed(encoder, [path for path, _ in train + val], progress)
        labels = torch.tensor([label for _, label in train + val])
        votes = knn_votes(
            embeddings[: len(train)],
            labels[: len(train)],
            embeddings[len(train) :],
            len(names),
            self.k,
            self.temperature,
        )
        correct = votes.argmax(dim=1) == labels[len(train) :]
        accuracy = 100 * correct.double().mean().item()
        return [Score(self.name, "top1", accuracy, "%", True, "Classification", len(val))]

    def _embed(
        self, encoder: Encoder, paths: Sequence[Path], progress: Callable[[int, int], None] | None
    ) -> Tensor:
        size = (self.size, self.size)
        batches = encode_pictures(encoder, paths, size, self.batch_size, progress)
        return torch.cat(
            [
                (spatial.mean(dim=(2, 3)) if summary is None else summary).cpu()
                for summary, spatial in batches
            ]
        )  # [N, S]


def knn_votes(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Return the weight of each class for each query, ``[Q, num_classes]``.

    Args:
        bank: ``[N, S]`` embeddings, of any length.
        bank_labels: ``[N]`` class indices.
        queries: ``[Q, S]`` embeddings.
        num_classes: number of classes.
        k: neighbours that vote.
        temperature: of the vote's exponential.
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    votes = []
    for chunk in queries.split(1024):  # the bank of ImageNet times all queries would not fit
        similarity, index = (chunk @ bank.T).topk(k, dim=1)
        weight = (similarity / temperature).exp()
        votes.append(
            weight.new_zeros(len(chunk), num_classes).scatter_add_(1, bank_labels[index], weight)
        )
    return torch.cat(votes)
