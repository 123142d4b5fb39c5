"""Normalizers fitted to each teacher before a stage trains.

The statistics are of the teacher's own grid, without upsampler: an upsampled map lives in the same
space, and comparing upsamplers is fair only when all of them are measured on one scale. They are
taken from the stage's own stream of views, so they are the teacher's response to what the stage
shows it, and are kept in a file for each teacher, size and set of images.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

from ..config import DataConfig, PartitionConfig, Recipe, StageConfig, partition_sizes, share_of
from ..data.loader import ShardBatches, StepSlice
from ..models.heads import DistilledStudent
from ..normalize import NORMALIZERS
from ..normalize.cache import Statistics, check_can_save, load_statistics, save_statistics
from ..normalize.dispersion import SummaryMoments
from ..normalize.moments import Moments
from ..normalize.normalizers import LayerNorm
from ..protocols import Normalizer
from ..stage import Partition, images_per_step
from ..system.distributed import World, broadcast_object, run_on_main
from ..system.progress import Progress
from ..train.health import check_targets
from ..types import Size, View
from .randomness import StepRandomness
from .targets import TargetMaker
from .views import Views

BATCH = 32
"""Images that one process encodes at once; with mosaics, those that share canvases."""

KEPT = 16_384
"""Images whose summaries give the dispersion; TAO Toolkit keeps as many for its tangent loss."""


def build_normalizers(recipe: Recipe) -> dict[str, Normalizer]:
    """Make an unfitted normalizer for each teacher of the recipe."""
    kind = NORMALIZERS.get(recipe.normalizer.name)
    return {name: kind() for name in recipe.teachers}


def fit_normalizers(
    targets: TargetMaker,
    recipe: Recipe,
    stage: str,
    world: World,
    device: torch.device,
    cache: Path,
) -> dict[str, float]:
    """Fit the normalizers of ``targets`` to the images of one stage.

    A teacher's statistics come from the first partition that shows it, one that asks for its
    summary before others. All processes end with equal normalizers, whatever their number.

    Returns:
        The dispersion of each teacher's summaries, where the loss asks for it.
    """
    dispersions = {}
    for partition in recipe.stages[stage].partitions:
        names = [
            name
            for name in partition.teachers
            if first_partition(recipe.stages[stage], name) is partition
            and (
                targets.normalizers[name].uses_statistics or _asks_dispersion(targets, recipe, name)
            )
        ]
        known = _statistics_of(targets, names, partition, recipe, stage, world, device, cache)
        for name, statistics in known.items():
            targets.normalizers[name].fit(statistics.moments)
            if statistics.dispersion is not None:
                dispersions[name] = statistics.dispersion
    return dispersions


def standard_moments(channels: int) -> Moments:
    """Return moments of mean 0 and covariance 1, for a teacher that nothing is known of."""
    axes = torch.eye(channels) * channels**0.5
    moments = Moments(channels)
    moments.update(torch.cat([axes, -axes], dim=1)[None, :, None])  # [1, C, 1, 2C]
    return moments


def first_partition(stage: StageConfig, teacher: str) -> PartitionConfig | None:
    """Return the partition whose images a teacher's statistics are estimated on."""
    partitions = [item for item in stage.partitions if teacher in item.teachers]
    with_summary = [item for item in partitions if teacher not in item.mosaic]
    return next(iter(with_summary or partitions), None)


def _asks_dispersion(targets: TargetMaker, recipe: Recipe, teacher: str) -> bool:
    asked = recipe.loss.summary == "angle" and recipe.teachers[teacher].summary_weight > 0
    return asked and targets.teachers[teacher].spec.summary_channels is not None


def _statistics_of(
    targets: TargetMaker,
    names: list[str],
    partition: PartitionConfig,
    recipe: Recipe,
    stage: str,
    world: World,
    device: torch.device,
    cache: Path,
) -> dict[str, Statistics]:
    config = recipe.stages[stage]
    images = share_of(recipe.normalizer.images, config.steps * images_per_step(config))
    stream = _Stream(targets, names, recipe, partition, world, max(images, 1))
    paths = {name: cache / _file_name(targets, name, partition, stream, recipe) for name in names}
    # Random weights have no hash, so nothing tells two such teachers apart.
    kept = [name for name in names if targets.teachers[name].spec.weights_hash]
    found = {name: load_statistics(paths[name]) for name in kept} if world.is_main else {}
    known = {name: value for name, value in broadcast_object(found).items() if value is not None}
    missing = [name for name in names if name not in known]
    if set(missing) & set(kept):
        run_on_main(world, lambda: check_can_save(cache))
    known |= _estimate(targets, missing, stream, recipe, device)
    for name in missing:
        if world.is_main and name in kept:
            save_statistics(paths[name], known[name])
    return known


class _Stream:
    """Images of a partition, each batch at one of its sizes, whatever the number of processes."""

    def __init__(
        self,
        targets: TargetMaker,
        teachers: Sequence[str],
        recipe: Recipe,
        partition: PartitionConfig,
        world: World,
        images: int,
    ):
        self.partition, self.images, self.world = partition, images, world
        self._targets, self._teachers = targets, teachers
        self._sizes = (Partition(partition, 0, 1.0),)
        self._draws = StepRandomness(
            recipe.seed, recipe.augmentation, BATCH, recipe.student.patch_size
        )
        self.source = ShardBatches(
            recipe.data,
            seed=recipe.seed,
            images_per_step=world.world_size * BATCH,
            slices=self._slices,
        )

    def _size(self, step: int) -> Size:
        batch = step * self.world.world_size + self.world.rank
        return self._draws.sizes(batch, self._sizes)[self.partition.name]

    def _slices(self, step: int) -> list[StepSlice]:
        start = self.world.rank * BATCH
        size = self._size(step)
        inputs = [self._targets.size(name, self.partition, size) for name in self._teachers]
        return [StepSlice(start, start + BATCH, size, {View(item): None for item in inputs})]

    def batches(self) -> Iterator[tuple[int, Views, tuple[str, ...]]]:
        """Yield this process's images: the index of the first, their views, their keys."""
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
                    pixels = {view: tensor[:used] for view, tensor in batch.views.items()}
                    yield first, Views(pixels, self._size(step)), batch.keys[:used]
                progress.update(min((step + 1) * per_step, self.images))


def _estimate(
    targets: TargetMaker, names: list[str], stream: _Stream, recipe: Recipe, device: torch.device
) -> dict[str, Statistics]:
    if not names:
        return {}
    specs = {name: targets.teachers[name].spec for name in names}
    moments = {name: Moments(spec.channels, device=device) for name, spec in specs.items()}
    summaries = {
        name: SummaryMoments(spec.summary_channels or 0, min(stream.images, KEPT), device)
        for name, spec in specs.items()
        if _asks_dispersion(targets, recipe, name) and name not in stream.partition.mosaic
    }
    for first, views, keys in stream.batches():
        on_device = views.to(device)
        for name in names:
            features = targets.own_grid(name, on_device, stream.partition)
            check_targets({name: features}, keys)
            moments[name].update(features.spatial)
            if name in summaries:
                assert features.summary is not None
                summaries[name].update(features.summary, first)
    for name in names:
        moments[name].all_reduce()
        if name in summaries:
            summaries[name].all_reduce()
    return {
        name: Statistics(moments[name], summaries[name].dispersion() if name in summaries else None)
        for name in names
    }


def _file_name(
    targets: TargetMaker,
    name: str,
    partition: PartitionConfig,
    stream: _Stream,
    recipe: Recipe,
) -> str:
    """Name a cache file after everything that its numbers depend on.

    Of the student's input only the aspect ratio is: what is cropped out of the photographs.
    """
    spec = targets.teachers[name].spec
    views = partition_sizes(partition)
    sizes = [targets.size(name, partition, view) for view in views]
    parts = (
        spec.weights_hash,
        spec.channels,
        sizes,
        [Fraction(*view) for view in views],
        name in partition.mosaic,
        _asks_dispersion(targets, recipe, name),
        stream.source.fingerprint,
        stream.images,
        recipe.seed,
        _without_effect(recipe.data),
        recipe.teachers[name].options,
        recipe.teachers[name].dtype,
    )
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    height, width = max(sizes)
    return f"{name}-{height}x{width}-{digest}.safetensors"


def _without_effect(data: DataConfig) -> DataConfig:
    """Level the fields that change no image; the shards are in the fingerprint."""
    return replace(
        data, shards=(), workers=0, max_bad_share=0.0, max_bad_shards=0.0, read_timeout=1.0
    )


def normalizer_tensors(normalizers: Mapping[str, Normalizer]) -> dict[str, torch.Tensor]:
    """Return the state of all normalizers as ``{"<teacher>/<tensor>": tensor}``."""
    return {
        f"{name}/{key}": value
        for name, normalizer in normalizers.items()
        for key, value in normalizer.state().items()
    }


def load_normalizers(
    normalizers: Mapping[str, Normalizer], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Restore what :func:`normalizer_tensors` returned."""
    for name, normalizer in normalizers.items():
        prefix = f"{name}/"
        state = {
            key.removeprefix(prefix): value
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        normalizer.load_state(state)


def refold_heads(
    model: DistilledStudent, before: Mapping[str, Normalizer], now: Mapping[str, Normalizer]
) -> None:
    """Make heads that were trained under earlier statistics predict the same under new ones.

    A stage estimates its statistics anew, and with them PHI-S's rotation changes; without this the
    heads of the stage before would have to be learned once more. Exact, since the normalizers are
    affine and a head ends in a linear layer. Ours: the papers freeze the body while heads relearn.
    A normalizer without inverse (layer_norm) has no statistics either, so nothing is to be done.
    """
    for name, head in model.heads.items():
        if isinstance(now[name], LayerNorm):
            continue
        final = head.spatial.final
        last = final[-1]
        assert isinstance(last, nn.Linear)
        final[-1] = now[name].unfold(before[name].fold(last))
