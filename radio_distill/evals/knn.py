"""k-nearest-neighbour classification on summaries, as DINO and RADIO report it.

Nothing is trained, so the number speaks of the features alone: k = 20, cosine similarity, each
neighbour votes with weight exp(similarity / 0.07), and the whole training split is the bank.
Left out: the sweep over k and temperature that some codes report the best of.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.folder import labelled_images, spread
from ..errors import ConfigError
from ..types import Report, Score, unheard
from .demand import Demand, at_most
from .encoder import Encoder, encode_summaries
from .metrics.classification import macro_accuracy
from .protocol import file_names, protocol_of
from .shared import scores_of

logger = logging.getLogger(__name__)

Labelled = tuple[Path, int]


@dataclass(frozen=True, slots=True)
class Knn:
    """Accuracy over a folder with ``train/CLASS`` and ``val/CLASS``.

    ``top1`` is the share of images that are right, so large classes decide it; ``macro_accuracy``
    is the mean over classes of the share of each, in which a small class that is never found shows.
    """

    folder: str
    size: int
    k: int = 20
    temperature: float = 0.07
    batch_size: int = 16

    name: ClassVar[str] = "knn"
    sources: ClassVar[dict[str, str]] = {"folder": "labels", "size": "size"}

    def demand(self, parts: Mapping[str, int], limit: int | None = None) -> Demand:
        """Count the images of both splits."""
        train, val = (at_most(parts[split], limit) for split in ("train", "val"))
        return Demand(
            images=train + val,
            passes={(self.size, self.size): train + val},
            batch=self.batch_size,
            products=train * val,
        )

    def run(
        self, encoder: Encoder, limit: int | None = None, progress: Report = unheard
    ) -> list[Score]:
        """Classify the validation split; ``limit`` thins out each split, evenly over the classes.

        An encoder without a summary is judged by the mean of its spatial features.
        """
        train, val, names = labelled_images(self.folder)
        train, val = thin_out(train, val, limit)
        self._check_bank(train, limit)
        self._log_contents(train, val, len(names))
        total = len(train) + len(val)

        def encode(split: Sequence[Labelled], before: int) -> Tensor:
            paths = [path for path, _ in split]
            return encode_summaries(
                encoder, paths, self.size, self.batch_size,
                lambda done, _: progress(before + done, total),
            )  # fmt: skip

        bank, queries = encode(train, 0), encode(val, len(train))
        known, truth = (torch.tensor([label for _, label in split]) for split in (train, val))
        votes = knn_votes(
            bank, known, queries, len(names), self.k, self.temperature, encoder.device
        )
        correct = votes.argmax(dim=1) == truth
        accuracy = {
            "top1": correct.double().mean().item(),
            "macro_accuracy": macro_accuracy(correct, truth),
        }
        used = [file_names(path for path, _ in split) for split in (train, val)]
        protocol = protocol_of(self, train=used[0], val=used[1])
        about = "Classification", len(val), ("top1",), protocol
        return scores_of(self.name, accuracy, *about, classes=len(truth.unique()))

    def _check_bank(self, train: Sequence[Labelled], limit: int | None) -> None:
        if len(train) < self.k:
            raise ConfigError(
                f"{self.name}: the bank has {len(train)} images, fewer than k={self.k}; "
                + ("raise --evaluation.limit, or " if limit else "add training images, or ")
                + f"set --evaluation.options '{{{self.name}: {{k: {max(1, len(train) // 2)}}}}}'"
            )

    def _log_contents(
        self, train: Sequence[Labelled], val: Sequence[Labelled], num_classes: int
    ) -> None:
        """Log how many images and classes there are, so that a class that is lost is noticed."""
        bank = Counter(label for _, label in train)
        shown = {label for _, label in val}
        logger.info(
            "%s: %d classes; %d training images, %d to %d a class; %d validation images of %d "
            "classes", self.name, num_classes, len(train), min(bank.values()), max(bank.values()),
            len(val), len(shown),
        )  # fmt: skip
        if len(bank) < num_classes:
            logger.warning(
                "%s: evaluation.limit leaves %d of %d classes; the score is of an easier task",
                self.name, len(bank), num_classes,
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ImagenetKnn(Knn):
    """The same over ImageNet-1k: 1,281,167 images are the bank, 50,000 are asked."""

    name: ClassVar[str] = "imagenet_knn"
    sources: ClassVar[dict[str, str]] = {"folder": "data.imagenet", "size": "size"}


def thin_out(
    train: Sequence[Labelled], val: Sequence[Labelled], limit: int | None
) -> tuple[list[Labelled], list[Labelled]]:
    """Take at most ``limit`` images of each split, of the same classes in both.

    Every class keeps its share, and one image at least; with fewer images than classes, that many
    classes are left.
    """
    if not limit:
        return list(train), list(val)
    classes = {label for _, label in train}
    if limit < len(classes):
        classes = set(spread(sorted({label for _, label in val}), limit))
    if len(classes) < 2:
        raise ConfigError(f"evaluation.limit {limit} leaves one class; raise it")
    return _thin_split(train, classes, limit), _thin_split(val, classes, limit)


def _thin_split(split: Sequence[Labelled], kept: set[int], limit: int) -> list[Labelled]:
    groups: dict[int, list[Labelled]] = {}
    for path, label in split:
        if label in kept:
            groups.setdefault(label, []).append((path, label))
    counts = dict.fromkeys(groups, 1)
    # The next image goes to the class that is furthest below its share.
    queue = [(1.5 / len(group), label) for label, group in groups.items() if len(group) > 1]
    heapify(queue)
    for _ in range(limit - len(groups)):
        if not queue:
            break
        _, label = heappop(queue)
        counts[label] += 1
        if counts[label] < len(groups[label]):
            heappush(queue, ((counts[label] + 0.5) / len(groups[label]), label))
    return [image for label, group in groups.items() for image in spread(group, counts[label])]


def knn_votes(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the weight of each class for each query, ``[Q, num_classes]``.

    Args:
        bank: ``[N, S]`` embeddings, of any length and of any precision.
        bank_labels: ``[N]`` class indices.
        queries: ``[Q, S]`` embeddings.
        num_classes: number of classes.
        k: neighbours that vote.
        temperature: of the vote's exponential.
        device: where neighbours are looked for; the bank passes through it once, in chunks.
    """
    similarity, index = nearest_in_bank(bank, queries, k, device)
    weight = (similarity / temperature).exp()
    votes = weight.new_zeros(len(queries), num_classes)
    return votes.scatter_add_(1, bank_labels[index], weight)


def nearest_in_bank(
    bank: Tensor,
    queries: Tensor,
    k: int,
    device: torch.device | str = "cpu",
    bank_chunk: int = 8192,
    query_chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Return the k largest cosines of each query and where in the bank they are, ``[Q, k]`` each.

    Each chunk of the bank visits the device once and is compared with all queries, whose k best so
    far stay there; so the device holds the queries, one chunk, and ``bank_chunk * query_chunk``
    similarities. Half precision is for keeping only: cosines are computed in float32 at least.
    """
    exact = torch.promote_types(queries.dtype, torch.float32)
    queries = F.normalize(queries.to(device, exact), dim=1)
    similarity = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.long, device=device)
    for start in range(0, len(bank), bank_chunk):
        part = F.normalize(bank[start : start + bank_chunk].to(device, exact), dim=1)
        found = [
            (some @ part.T).topk(min(k, len(part)), dim=1) for some in queries.split(query_chunk)
        ]
        similarity = torch.cat([similarity, torch.cat([values for values, _ in found])], dim=1)
        index = torch.cat([index, start + torch.cat([indices for _, indices in found])], dim=1)
        similarity, kept = similarity.topk(min(k, similarity.shape[1]), dim=1)
        index = index.gather(1, kept)
    return similarity.cpu(), index.cpu()
