"""Normalizers fitted to each teacher before a stage, or the fit of an upsampler, begins.

The statistics are of the teacher's own grid, without upsampler: an upsampled map lives in the same
space, and comparing upsamplers is fair only when all of them are measured on one scale. They are
taken from the stage's own stream of images, so they are the teacher's response to what the stage
shows it, and are kept in a file for each teacher, size and set of images.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import torch

from ..config import DataConfig, of_summary, share_of
from ..data.device import on_device
from ..data.loader import ShardBatches, StepSlice
from ..data.rendering import PIXELS
from ..distill.colours import is_plain
from ..distill.randomness import StepRandomness
from ..distill.targets import encode
from ..distill.views import Views
from ..protocols import Normalizer, Teacher
from ..stage import Partition, Stage
from ..system.distributed import World, broadcast_object, run_on_main
from ..system.progress import Progress
from ..teacher_view import TeacherView
from ..train.health import check_targets
from ..types import Size, View
from . import NORMALIZERS
from .statistics import (
    Moments,
    Statistics,
    SummaryMoments,
    check_can_save,
    load_statistics,
    save_statistics,
)

BATCH = 32
"""Images that one process encodes at once; with mosaics, those that share canvases."""

KEPT = 16_384
"""Images whose summaries give the dispersion; TAO Toolkit keeps as many for its tangent loss."""


def fit_normalizers(
    stage: Stage,
    teachers: Mapping[str, Teacher],
    normalizers: Mapping[str, Normalizer],
    world: World,
    device: torch.device,
) -> dict[str, float]:
    """Fit the normalizers of a stage to what its teachers say of its images.

    A teacher's statistics come from the first partition that shows it, one that asks for its
    summary before others. All processes end with equal normalizers, whatever their number.

    Returns:
        The dispersion of each teacher's summaries, where the loss asks for it.
    """
    dispersions = {}
    for partition in stage.partitions:
        names = [
            name
            for name in partition.teachers
            if stage.statistics_partition(name) is partition
            and (
                normalizers[name].uses_statistics
                or _asks_dispersion(stage, name)
                or _asks_summary(stage, partition, name)
            )
        ]
        shown = {name: teachers[name] for name in names}
        for name, statistics in _statistics_of(stage, partition, shown, world, device).items():
            normalizers[name].fit(statistics.moments)
            if statistics.summary is not None:
                normalizers[of_summary(name)].fit(statistics.summary)
            if statistics.dispersion is not None:
                dispersions[name] = statistics.dispersion
    return dispersions


def is_fitted(stage: Stage, normalizer: str) -> bool:
    """Return whether :func:`fit_normalizers` fits one: whether a stage shows what it normalises."""
    teacher, _, summary = normalizer.partition(".")
    partition = stage.statistics_partition(teacher)
    return partition is not None and (not summary or partition.has_summaries[teacher])


def _asks_summary(stage: Stage, partition: Partition, teacher: str) -> bool:
    kind = "" if stage.is_fit else stage.recipe.normalizers.get(of_summary(teacher), "")
    has_summary = stage.specs[teacher].summary_channels is not None
    if not kind or not has_summary or not partition.has_summaries[teacher]:
        return False
    return bool(NORMALIZERS.get(kind).uses_statistics)


def _asks_dispersion(stage: Stage, teacher: str) -> bool:
    asked = stage.losses[teacher].summary == "angle" and stage.teachers[teacher].summary_weight > 0
    has_summary = stage.specs[teacher].summary_channels is not None
    return asked and has_summary and not stage.is_fit


def _statistics_of(
    stage: Stage,
    partition: Partition,
    teachers: Mapping[str, Teacher],
    world: World,
    device: torch.device,
) -> dict[str, Statistics]:
    """Load the statistics of some teachers over a partition's images, or estimate them."""
    images = share_of(stage.normalizer.images, stage.steps * stage.images_per_step)
    stream = ImageStream(stage, partition, [*teachers], world, max(images, 1))
    folder = stage.statistics_folder
    paths = {name: folder / _file_name(stage, teachers[name], stream) for name in teachers}
    # Random weights have no hash, so nothing tells two such teachers apart.
    kept = [name for name in teachers if teachers[name].spec.weights_hash]
    loaded = {name: load_statistics(paths[name]) for name in kept} if world.is_main else {}
    known = {name: value for name, value in broadcast_object(loaded).items() if value is not None}
    missing = {name: teacher for name, teacher in teachers.items() if name not in known}
    if set(missing) & set(kept):
        run_on_main(world, lambda: check_can_save(folder))
    known |= _estimate(stage, missing, stream, device)
    for name in missing:
        if world.is_main and name in kept:
            save_statistics(paths[name], known[name])
    return known


class ImageStream:
    """Images of a partition, each batch at one of its sizes, whatever the number of processes.

    Args:
        stage: whose partition it is.
        partition: the images.
        teachers: whose views of them are rendered.
        world: this process's place.
        images: over all processes.
    """

    def __init__(
        self,
        stage: Stage,
        partition: Partition,
        teachers: Sequence[str],
        world: World,
        images: int,
    ):
        self.partition, self.images, self.world = partition, images, world
        self._teachers = teachers
        self._draws = StepRandomness(
            stage.base_seed, stage.augmentation, BATCH, stage.student.patch_size
        )
        self.source = ShardBatches(
            stage.data,
            seed=stage.base_seed,
            images_per_step=world.world_size * BATCH,
            own=[(0, world.world_size * BATCH, partition.source)] if partition.source else (),
            slices=self._slices,
        )

    def _views(self, step: int) -> dict[str, TeacherView]:
        """Return how each teacher sees the images of a batch."""
        sizes, partition = self._sizes(step), self.partition
        views = {**partition.views[sizes[partition.name]], **partition.views_drawn(sizes)}
        return {name: views[name].without_upsampler() for name in self._teachers}

    def batches(
        self, device: torch.device
    ) -> Iterator[tuple[int, Views, dict[str, TeacherView], tuple[str, ...]]]:
        """Yield this process's images: index of the first, pixels on a device, how each teacher
        sees them, keys."""
        per_step = self.world.world_size * BATCH
        label = f"statistics of {self.partition.name}"
        with Progress(label, self.images, visible=self.world.is_main) as progress:
            for step, (batch,) in enumerate(self.source.batches(0)):
                first = step * per_step + self.world.rank * BATCH
                if step * per_step >= self.images:
                    return
                # The last step is cut, so that the images are the same on any number of processes.
                used = min(max(self.images - first, 0), BATCH)
                if used:
                    (arrived,) = on_device([batch], device)
                    size, batch_index = self._sizes(step)[self.partition.name], self._batch(step)
                    cut = {view: tensor[:used] for view, tensor in arrived.views.items()}
                    pixels = self._draws.recoloured(batch_index, 0, used, size, cut)
                    yield first, Views(pixels, size), self._views(step), batch.keys[:used]
                progress.update(min((step + 1) * per_step, self.images))

    def _sizes(self, step: int) -> dict[str, Size]:
        return self._draws.sizes(self._batch(step), (self.partition,))

    def _batch(self, step: int) -> int:
        return step * self.world.world_size + self.world.rank

    def _slices(self, step: int) -> list[StepSlice]:
        start, size = self.world.rank * BATCH, self._sizes(step)[self.partition.name]
        sizes = [view.size for view in self._views(step).values()]
        return [StepSlice(start, start + BATCH, size, {View(item): None for item in sizes})]


def _estimate(
    stage: Stage, teachers: Mapping[str, Teacher], stream: ImageStream, device: torch.device
) -> dict[str, Statistics]:
    if not teachers:
        return {}
    specs = {name: teacher.spec for name, teacher in teachers.items()}
    moments = {name: Moments(spec.channels, device=device) for name, spec in specs.items()}
    summaries = {
        name: SummaryMoments(spec.summary_channels or 0, min(stream.images, KEPT), device)
        for name, spec in specs.items()
        if _asks_dispersion(stage, name) and stream.partition.has_summaries[name]
    }
    of_summaries = {
        name: Moments(spec.summary_channels or 0, device=device)
        for name, spec in specs.items()
        if _asks_summary(stage, stream.partition, name)
    }
    for first, views, teacher_views, keys in stream.batches(device):
        for name, teacher in teachers.items():
            pixels = teacher.spec.seen(views.of_teacher(name, teacher_views[name].size))
            features = encode(teacher, pixels, teacher_views[name])
            check_targets({name: features}, keys)
            moments[name].update(features.spatial)
            if name in summaries:
                assert features.summary is not None
                summaries[name].update(features.summary, first)
            if name in of_summaries:
                assert features.summary is not None
                of_summaries[name].update(features.summary[:, :, None, None])
    for name in teachers:
        moments[name].all_reduce()
        if name in summaries:
            summaries[name].all_reduce()
        if name in of_summaries:
            of_summaries[name].all_reduce()
    dispersions = {name: item.dispersion() for name, item in summaries.items()}
    return {
        name: Statistics(moments[name], dispersions.get(name), of_summaries.get(name))
        for name in teachers
    }


def _file_name(stage: Stage, teacher: Teacher, stream: ImageStream) -> str:
    """Name a cache file after everything that its numbers depend on.

    Of the student's input only the aspect ratio is: what is cropped out of the photographs.
    """
    spec, partition = teacher.spec, stream.partition
    name = spec.name
    views = [view for shown, view in stage.views(name) if shown is partition]
    sizes, mosaic = [view.size for view in views], views[0].mosaic
    parts: tuple[object, ...] = (
        spec.weights_hash,
        spec.channels,
        sizes,
        [Fraction(*size) for size in partition.sizes],
        mosaic is not None and (mosaic.most or True),
        _asks_dispersion(stage, name),
        stream.source.fingerprint,
        stream.images,
        stage.base_seed,
        _without_effect(stage.data),
        stage.teachers[name].options,
        stage.teachers[name].dtype,
        PIXELS,
        *(["summary"] if _asks_summary(stage, partition, name) else []),
    )
    if not is_plain(stage.augmentation):
        parts = (*parts, stage.augmentation)
    if partition.source:
        parts = (*parts, partition.source)
    if spec.bands:
        parts = (*parts, spec.bands)
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    height, width = max(sizes)
    return f"{name}-{height}x{width}-{digest}.safetensors"


def _without_effect(data: DataConfig) -> DataConfig:
    """Level the fields that change no image; the shards are in the fingerprint."""
    return replace(
        data,
        shards=(),
        curation="",
        workers=0,
        max_bad_share=0.0,
        max_bad_shards=0.0,
        read_timeout=1.0,
    )
