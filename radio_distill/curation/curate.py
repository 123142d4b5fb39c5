"""From summaries to a verdict on every image: leaked, a near-duplicate, not drawn, or kept.

What takes long is kept in a folder, so that a pass that was stopped goes on: the pairs that are
alike, and every level of the clusters, under names that are digests of all that they depend on.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import share_of
from ..errors import DataError
from ..system.files import replacing
from ..system.progress import Progress
from .clusters import Clusters, balanced, level_sizes, next_level
from .duplicates import Pairs, cosines, groups_of, kept_of_groups, near_pairs
from .summaries import Summaries


class Verdict(IntEnum):
    """What becomes of an image."""

    KEPT = 0
    BAD = 1
    """It cannot be decoded, or is beyond the limits of the data."""
    LEAKED = 2
    """It, or one of its group, is alike to an image of an evaluation set."""
    DUPLICATE = 3
    """Another image of its group is kept."""
    NOT_DRAWN = 4
    """Its clusters have given enough."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How images are chosen."""

    duplicates: float
    """Cosine from which two images are near-duplicates; above 1: none are."""
    leaks: float
    """The same of an image and one of an evaluation set."""
    images: float = 0
    """Images to draw; below 1 a share of those without duplicates; 0 for all of them."""
    clusters: tuple[int, ...] = ()
    """Of each level, the lowest first; empty for those of ``level_sizes``."""
    seed: int = 0


@dataclass(frozen=True)
class Curated:
    """The result."""

    verdicts: np.ndarray
    """Of each image, ``[N]``."""
    like: np.ndarray
    """Of a duplicate the image that is kept, of a leak the image of the evaluation set; else -1."""
    cosine: np.ndarray
    """With that one."""
    candidates: np.ndarray
    """The images that were clustered, ``[M]``."""
    levels: Sequence[Clusters]
    """Of the candidates; the first level's labels are ``[M]``."""

    @property
    def kept(self) -> np.ndarray:
        """Which images are kept, bool ``[N]``."""
        return self.verdicts == Verdict.KEPT

    def at_level(self, level: int) -> np.ndarray:
        """Return the cluster of each candidate at a level, ``[M]``."""
        labels = self.levels[0].labels
        for above in self.levels[1 : level + 1]:
            labels = above.labels[labels]
        return labels.numpy()


def curate(
    summaries: Summaries,
    tested: Tensor | None,
    settings: Settings,
    device: torch.device,
    folder: Path,
) -> Curated:
    """Judge every image.

    Args:
        summaries: of the images.
        tested: those of images of evaluation sets, ``[E, S]``; None for none.
        settings: how.
        device: where products are computed.
        folder: where pairs and clusters are kept.

    Raises:
        DataError: every image is bad, or like one of an evaluation set.
    """
    good = summaries.pixels > 0
    verdicts = np.where(good, Verdict.KEPT, Verdict.BAD).astype(np.uint8)
    like, cosine = np.full(len(good), -1), np.zeros(len(good))
    groups = _groups(summaries, settings, device, folder)
    if tested is not None:
        leaked, nearest = _leaks(summaries.vectors, tested, settings, groups, device)
        verdicts[leaked], like[leaked] = Verdict.LEAKED, nearest
        cosine[leaked] = cosines(summaries.vectors[leaked], tested[nearest])
    stands = kept_of_groups(groups, summaries.pixels)
    copies = np.flatnonzero((verdicts == Verdict.KEPT) & (stands != np.arange(len(good))))
    verdicts[copies], like[copies] = Verdict.DUPLICATE, stands[copies]
    cosine[copies] = cosines(summaries.vectors[copies], summaries.vectors[stands[copies]])
    candidates = np.flatnonzero(verdicts == Verdict.KEPT)
    if not len(candidates):
        counts = {it: np.count_nonzero(verdicts == it) for it in (Verdict.BAD, Verdict.LEAKED)}
        raise DataError(
            f"none of {len(good)} images is left to draw: {counts[Verdict.BAD]} bad, "
            f"{counts[Verdict.LEAKED]} like those of evaluation sets"
        )
    levels = _levels(summaries, candidates, settings, device, folder)
    wanted = share_of(settings.images, len(candidates)) or len(candidates)
    drawn = balanced([level.labels.numpy() for level in levels], wanted, settings.seed)
    verdicts[candidates[~drawn]] = Verdict.NOT_DRAWN
    return Curated(verdicts, like, cosine, candidates, levels)


def _groups(
    summaries: Summaries, settings: Settings, device: torch.device, folder: Path
) -> np.ndarray:
    """Return the group of near-duplicates that each image is in, as its first image."""
    number = len(summaries.vectors)
    if settings.duplicates > 1:
        return np.arange(number)

    def make() -> dict[str, Tensor]:
        with Progress("near-duplicates", number) as bar:
            pairs = near_pairs(
                summaries.vectors,
                None,
                settings.duplicates,
                device,
                lambda done, _: bar.update(done),
            )
        return {name: torch.from_numpy(value) for name, value in pairs._asdict().items()}

    name = _digest(summaries.digest, settings.duplicates)
    found = _kept(folder / f"pairs-{name}.safetensors", make)
    return groups_of(number, Pairs(*(found[name].numpy() for name in Pairs._fields)))


def _leaks(
    vectors: Tensor, tested: Tensor, settings: Settings, groups: np.ndarray, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of all groups with a leak, and for each the image that it is alike to."""
    with Progress("leaks", len(vectors)) as bar:
        pairs = near_pairs(
            vectors, tested, settings.leaks, device, lambda done, _: bar.update(done)
        )
    order = np.lexsort((-pairs.cosine, pairs.first))
    images, firsts = np.unique(pairs.first[order], return_index=True)
    nearest = pairs.second[order][firsts]
    leaked_groups, member = np.unique(groups[images], return_index=True)
    leaked = np.flatnonzero(np.isin(groups, leaked_groups))
    found = nearest[member][np.searchsorted(leaked_groups, groups[leaked])]
    found[np.searchsorted(leaked, images)] = nearest
    return leaked, found


def _levels(
    summaries: Summaries,
    candidates: np.ndarray,
    settings: Settings,
    device: torch.device,
    folder: Path,
) -> list[Clusters]:
    sizes = settings.clusters or level_sizes(len(candidates))
    chosen = hashlib.sha256(candidates.tobytes()).hexdigest()
    points = summaries.vectors[torch.from_numpy(candidates)]

    levels: list[Clusters] = []
    with Progress("clusters", len(sizes), unit="levels") as bar:

        def make(size: int) -> dict[str, Tensor]:
            def say(text: str) -> None:
                bar.update(len(levels), text)

            return asdict(next_level(points, levels, size, settings.seed, device, say))

        for number, size in enumerate(sizes, 1):
            name = _digest(summaries.digest, chosen, sizes[:number], settings.seed)
            found = _kept(folder / f"clusters-{name}.safetensors", partial(make, size))
            levels.append(Clusters(**found))
            bar.update(number)
    return levels


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _kept(path: Path, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors that a file keeps; where it does not, make and keep them."""
    try:
        kept: dict[str, Tensor] = load_file(path)
        return kept
    except (OSError, SafetensorError):  # none, or one that is not whole
        made = {name: value.contiguous() for name, value in make().items()}
    with replacing(path) as draft:
        save_file(made, draft)
    return made
