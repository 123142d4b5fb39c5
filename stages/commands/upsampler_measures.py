"""What the report of upsamplers measures on held-out images, a progress bar for each part."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from radio_distill.config import FitConfig
from radio_distill.errors import ConfigError, WeightsError
from radio_distill.evals.encoder import to_pixels
from radio_distill.evals.masks import SegmentationSet, open_set
from radio_distill.protocols import Normalizer
from radio_distill.system.progress import Progress
from upsamplers import UPSAMPLERS
from upsamplers.comparison import (
    Cost,
    Labelled,
    costs,
    fit_probe,
    load_fitted,
    native_error,
    preservation,
    without_parameters,
)
from upsamplers.fit.consistency import Consistency
from upsamplers.measure import measure as measure_upsampler
from upsamplers.methods.interpolate import Bilinear
from upsamplers.methods.tile import Tile
from upsamplers.preservation import LinearProbe

from ..common import fit_name, fit_of
from ..fit_upsampler import held_out
from .upsampler_fits import Subject, is_network

logger = logging.getLogger(__name__)

Scores = dict[str, float]
BATCH = 8


@dataclass
class Bench:
    """A subject, its fitted files, and what was measured of them so far."""

    subject: Subject
    files: Mapping[str, Path]
    """Fitted files by the names of their fits (:func:`.common.fit_name`)."""
    scores: dict[str, Scores] = field(default_factory=dict)
    """Of upsamplers, by the same names: what :func:`.measure.measure` returns, and for those of
    Table 9 ``preservation`` and ``preservation_low``."""
    notes: list[str] = field(default_factory=list)
    """A line for each thing that could not be measured, and why."""
    num_images: int = 0

    def load(self, config: FitConfig) -> Consistency | None:
        """Load an upsampler onto the device; None, once with a note, where it is not there."""
        name = fit_name(config)
        if name in self.files:
            return load_fitted(self.files[name]).to(self.subject.device)
        if is_network(config.upsampler):
            return None
        reference = self.load(self._bilinear(config.factor))
        if reference is None:
            self._note(
                f"{name} is not measured: its downsampler would be that of a fitted bilinear"
            )
            return None
        upsampler = UPSAMPLERS.get(config.upsampler)(factor=config.factor)
        made = without_parameters(upsampler, self.subject.teacher, reference)
        return made.to(self.subject.device)

    def measure(self, factor: int, configs: Sequence[FitConfig]) -> None:
        """Measure upsamplers of one factor, each once."""
        subject, evaluation = self.subject, self.subject.recipe.evaluation
        batches = held_out(evaluation.images, subject.size, factor, evaluation.limit)
        self.num_images = sum(map(len, batches))
        for name, config in {fit_name(config): config for config in configs}.items():
            try:
                consistency = self.load(config)
                if consistency is None or name in self.scores:
                    continue
                with _bar(f"{name}: held-out images", len(batches)) as progress:
                    self.scores[name] = measure_upsampler(
                        consistency, subject.teacher, batches, subject.size, factor, progress,
                        subject.recipe.engine.precision,
                    )  # fmt: skip
            except (ConfigError, WeightsError) as error:
                # A teacher that cannot be shown so much; a converted file, without a downsampler.
                self._note(f"{name} is not measured: {error}")

    def measure_preservation(self, factor: int, configs: Sequence[FitConfig]) -> None:
        """Add what a probe of the teacher's maps makes of upsampled ones."""
        if not self.subject.recipe.evaluation.segmentation:
            return
        subject = self.subject
        images = self._labelled("val", subject.size[0] * factor)
        for config in configs:
            name = fit_name(config)
            consistency = self.load(config) if name in self.scores else None
            if consistency is None:
                continue
            with _bar(f"{name}: segmentation", len(images)) as progress:
                fine, low = preservation(
                    consistency.model, subject.teacher, self._probe, images, subject.size, factor,
                    progress, subject.recipe.engine.precision,
                )  # fmt: skip
            self.scores[name] |= {"preservation": fine, "preservation_low": low}

    def tile_errors(self, levels: Sequence[int]) -> dict[int, Scores]:
        """Return for each level how far tiles and interpolation are from the teacher itself."""
        subject, evaluation = self.subject, self.subject.recipe.evaluation
        found: dict[int, Scores] = {}
        for level in levels:
            batches = held_out(evaluation.images, subject.size, level, evaluation.limit)
            with _bar(f"tiles of level {level}", len(batches)) as progress:
                try:
                    found[level] = native_error(
                        subject.teacher,
                        self.normalizer,
                        {"tiles": Tile(level), "bilinear": Bilinear(level)},
                        batches,
                        subject.size,
                        level,
                        subject.device,
                        progress,
                    )
                except ConfigError as error:
                    self._note(f"tiles of level {level} are not compared: {error}")
        return found

    def costs(self, factors: Sequence[int]) -> list[Cost]:
        """Time the teacher, FeatUp and FeatSharp."""
        subject = self.subject
        with _bar("throughput", len(factors), "sizes") as progress:
            return costs(subject.teacher, subject.size, factors, subject.device, progress)

    @cached_property
    def normalizer(self) -> Normalizer:
        """The scale of the first file; all were estimated on the same teacher."""
        return load_fitted(next(iter(self.files.values()))).model.normalizer

    @property
    def num_classes(self) -> int:
        """Classes of the segmentation set."""
        return len(self._segmentation.classes)

    @cached_property
    def _probe(self) -> LinearProbe:
        images = self._labelled("train", self.subject.size[0])
        return fit_probe(self.subject.teacher, images, self.num_classes)

    @cached_property
    def _segmentation(self) -> SegmentationSet:
        evaluation = self.subject.recipe.evaluation
        return open_set(evaluation.segmentation, evaluation.limit, evaluation.segmentation_ignore)

    def _labelled(self, split: Literal["train", "val"], side: int) -> Labelled:
        """Load images with their classes, ``side`` pixels a side, in batches."""
        data, device = self._segmentation, self.subject.device
        pairs = data.train if split == "train" else data.val
        return [
            (
                torch.stack([to_pixels(pair.image, (side, side)) for pair in part]).to(device),
                torch.stack([data.mask(pair, side) for pair in part]),
            )
            for part in (pairs[at : at + BATCH] for at in range(0, len(pairs), BATCH))
        ]

    def _bilinear(self, factor: int) -> FitConfig:
        return fit_of(self.subject.recipe, self.subject.name, "bilinear", factor)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            logger.warning("%s", text)


@contextmanager
def _bar(label: str, total: int, unit: str = "batches") -> Iterator[Callable[[int, int], None]]:
    with Progress(label, total, unit) as bar:
        yield lambda done, _: bar.update(done)
