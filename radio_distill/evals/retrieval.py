"""Images found by their captions, and captions by their images: COCO and Flickr30k.

Captions are taken as they are, in no template, and compared with summaries by cosine, as
CLIP_benchmark does. So it is asked of encoders alone whose summary lies in the space of a text
tower.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from ..data.folder import in_batches, spread
from ..types import Report, Score, unheard
from .datasets.captions import Captions, CocoRetrieval, Flickr30k
from .demand import Demand, at_most
from .encoder import Encoder, encode_summaries
from .metrics.classification import recalls_both_ways
from .protocol import file_names, protocol_of
from .shared import scores_of

_TEXTS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class CocoCaptions:
    """Recall at 1, 5 and 10, in both directions, on Karpathy's test split."""

    data: str
    size: int
    ranks: tuple[int, ...] = (1, 5, 10)
    batch_size: int = 16

    name: ClassVar[str] = "coco_retrieval"
    sources: ClassVar[dict[str, str]] = {"data": "data.coco_retrieval", "size": "size"}

    def captions(self) -> Captions:
        """List the test images and their captions."""
        return CocoRetrieval(Path(self.data)).test()

    def demand(self, parts: Mapping[str, int], limit: int | None = None) -> Demand:
        """Count the images."""
        images = at_most(parts["images"], limit)
        return Demand(images=images, passes={(self.size, self.size): images}, batch=self.batch_size)

    def run(
        self, encoder: Encoder, limit: int | None = None, progress: Report = unheard
    ) -> list[Score]:
        """Score both directions; ``limit`` thins out the images, which keep all their captions.

        Progress counts images and captions. An encoder without a text tower is passed over.
        """
        if encoder.text is None:
            return []
        data = self.captions()
        kept = spread(range(len(data.images)), limit)
        position = {number: index for index, number in enumerate(kept)}
        pairs = [
            (text, position[image])
            for text, image in zip(data.texts, data.image_of, strict=True)
            if image in position
        ]
        total = len(kept) + len(pairs)

        images = encode_summaries(
            encoder, [data.images[number] for number in kept], self.size, self.batch_size,
            lambda done, _: progress(done, total),
        )  # fmt: skip
        texts, done = [], len(kept)
        for some in in_batches(pairs, _TEXTS_AT_ONCE):
            embedded = encoder.text.embed([text for text, _ in some])
            texts.append(embedded.float().to(encoder.device))
            progress(done := done + len(some), total)
        recalls = recalls_both_ways(
            images.to(encoder.device).float(), torch.cat(texts),
            torch.tensor([image for _, image in pairs]), self.ranks,
        )  # fmt: skip
        names = file_names(data.images[number] for number in kept)
        protocol = protocol_of(self, images=names, captions=len(pairs))
        firsts = [metric for metric in recalls if metric.endswith("@1")]
        about = "Retrieval", len(kept), firsts, protocol
        return scores_of(self.name, recalls, *about, images=len(kept), captions=len(pairs))


@dataclass(frozen=True, slots=True)
class FlickrCaptions(CocoCaptions):
    """The same on Flickr30k."""

    name: ClassVar[str] = "flickr_retrieval"
    sources: ClassVar[dict[str, str]] = {"data": "data.flickr30k", "size": "size"}

    def captions(self) -> Captions:
        """List the test images and their captions."""
        return Flickr30k(Path(self.data)).test()
