"""ImageNet without training: each image gets the class whose name is nearest to it.

As in CLIP (Radford et al., arXiv 2103.00020), open_clip and RADIO: a class's vector is the mean of
its name in 80 templates, each normalised, and it is compared with the image's summary by cosine.
So it is asked of encoders alone whose summary lies in the space of a text tower.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.folder import spread
from ..protocols import TextTower
from ..types import Report, Score, unheard
from .datasets.imagenet import ImageNet
from .demand import Demand, at_most
from .encoder import Encoder, encode_summaries
from .metrics.classification import top_k_accuracy
from .protocol import protocol_of
from .shared import scores_of


@dataclass(frozen=True, slots=True)
class ImagenetZeroShot:
    """Top-1 and top-5 accuracy on the validation split, all 1,000 classes to choose from."""

    data: str
    size: int
    batch_size: int = 16

    name: ClassVar[str] = "imagenet_zero_shot"
    sources: ClassVar[dict[str, str]] = {"data": "data.imagenet", "size": "size"}

    def demand(self, parts: Mapping[str, int], limit: int | None = None) -> Demand:
        """Count the images."""
        val = at_most(parts["val"], limit)
        return Demand(images=val, passes={(self.size, self.size): val}, batch=self.batch_size)

    def run(
        self, encoder: Encoder, limit: int | None = None, progress: Report = unheard
    ) -> list[Score]:
        """Classify the images; progress counts classes and images.

        An encoder without a text tower is passed over.
        """
        if encoder.text is None:
            return []
        images = spread(ImageNet(Path(self.data)).split("val"), limit)
        names, templates = class_names(), prompt_templates()
        total = len(names) + len(images)

        sentences = [[template(name) for template in templates] for name in names]
        embed = partial(
            text_classifier, encoder.text, sentences, lambda done: progress(done, total)
        )
        cache = encoder.cache
        classifier = embed() if cache is None else cache.get_classes(sentences, embed)
        summaries = encode_summaries(
            encoder, [path for path, _ in images], self.size, self.batch_size,
            lambda done, _: progress(len(names) + done, total),
        )  # fmt: skip
        similarity = summaries.float() @ classifier.T  # [N, K]
        labels = torch.tensor([label for _, label in images])
        protocol = protocol_of(self, classes=len(names), prompts=len(templates), val=len(images))
        accuracy = {f"top{k}": top_k_accuracy(similarity, labels, k) for k in (1, 5)}
        about = "Classification", len(images), ("top1",), protocol
        return scores_of(self.name, accuracy, *about, classes=len(names))


def text_classifier(
    text: TextTower,
    sentences: Sequence[Sequence[str]],
    report: Callable[[int], object] = lambda done: None,
) -> Tensor:
    """Return a unit vector for each class ``[K, S]``, float32 on the CPU.

    Args:
        text: the text tower.
        sentences: that describe each of the K classes.
        report: called with the classes that are done.
    """
    classes = []
    for some in sentences:
        classes.append(F.normalize(text.embed(some).float()).mean(dim=0).cpu())
        report(len(classes))
    return F.normalize(torch.stack(classes), dim=1)


def class_names() -> list[str]:
    """Return the names of ImageNet's 1,000 classes as open_clip writes them."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)


def prompt_templates() -> list[Callable[[str], str]]:
    """Return the 80 templates of CLIP's authors for ImageNet."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return list(OPENAI_IMAGENET_TEMPLATES)
