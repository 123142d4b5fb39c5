"""How alike the features of neighbouring cells are."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn import functional as F

from radio_distill.data.folder import list_images, spread
from radio_distill.evals.encoder import encode_images
from radio_distill.types import Score


@dataclass(frozen=True)
class MyBenchmark:
    """Cosine of horizontal neighbours."""

    images: str
    size: int = 224

    name: ClassVar[str] = "my_benchmark"
    sources: ClassVar[dict[str, str]] = {"images": "images"}  # own field: evaluation's

    def run(self, encoder, limit=None, progress=None):
        """Return scores of at most `limit` images; `progress` takes (done, total)."""
        images = spread(list_images(self.images), limit)
        size = encoder.nearest_size((self.size, self.size))
        total = 0.0
        for features in encode_images(encoder, images, size, progress=progress):
            left, right = features.spatial[..., :-1], features.spatial[..., 1:]
            total += F.cosine_similarity(left, right, dim=1).mean((1, 2)).sum().item()
        return [
            Score(
                benchmark=self.name,
                metric="cosine",
                value=100 * total / len(images),
                unit="%",
                higher_is_better=True,
                group="Smoothness",  # its column in the Δm table
                num_samples=len(images),
                headline=True,  # False: reported, and not counted in Δm
            )
        ]
