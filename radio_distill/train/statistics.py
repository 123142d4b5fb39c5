"""Normalizers fitted to each teacher before a stage trains.

The statistics are of the teacher's own grid, without upsampler: an upsampled map lives in the same
space, and comparing upsamplers is fair only when all of them are measured on one scale. They are
taken from the stage's own stream of views, so they are the teacher's response to what the stage
shows it, and are kept in a file for each teacher, size and set of images.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..balance import NORMALIZERS
from ..balance.cache import load_moments, save_moments
from ..balance.moments import Moments
from ..balance.normalizers import LayerNorm
from ..config import DataConfig, PartitionConfig, Recipe, size_pair
from ..data.loader import ShardBatches, StepSlice
from ..models.adaptors import Adaptor
from ..models.distilled import DistilledStudent
from ..progress import Progress
from ..protocols import Normalizer
from ..targets import TargetMaker
from .distributed import World, from_main
from .guard import check_targets

logger = logging.getLogger(__name__)

BATCH = 32
"""Images that one process encodes at once; changes speed and no number."""


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
) -> None:
    """Fit the normalizers of ``targets`` to the images of one stage.

    A teacher's statistics come from the first partition that shows it. All processes end with equal
    normalizers, whatever their number.
    """
    for partition in recipe.stages[stage].partitions:
        names = [
            name
            for name in partition.teachers
            if targets.normalizers[name].uses_statistics
            and _first_partition(recipe, stage, name) is partition
        ]
        moments = _moments_of(targets, names, partition, recipe, world, device, cache)
        for name, value in moments.items():
            targets.normalizers[name].fit(value)


def _first_partition(recipe: Recipe, stage: str, teacher: str) -> PartitionConfig | None:
    partitions = recipe.stages[stage].partitions
    return next((item for item in partitions if teacher in item.teachers), None)


def _moments_of(
    targets: TargetMaker,
    names: list[str],
    partition: PartitionConfig,
    recipe: Recipe,
    world: World,
    device: torch.device,
    cache: Path,
) -> dict[str, Moments]:
    images = recipe.normalizer.images
    source = _source(recipe.data, recipe.seed, partition, world)
    paths = {
        name: cache / _file_name(targets, name, partition, source.fingerprint, recipe)
        for name in names
    }
    # Random weights have no hash, so nothing tells two such teachers apart.
    kept = [name for name in names if targets.teachers[name].spec.weights_hash]
    known = from_main({name: load_moments(paths[name]) for name in kept} if world.is_main else {})
    missing = [name for name in names if known.get(name) is None]
    moments = {name: value for name, value in known.items() if value is not None}
    moments |= _estimate(targets, missing, partition, source, images, world, device)
    for name in missing:
        if world.is_main and name in kept:
            save_moments(paths[name], moments[name])
    return moments


def _source(data: DataConfig, seed: int, partition: PartitionConfig, world: World) -> ShardBatches:
    start = world.rank * BATCH
    return ShardBatches(
        data,
        seed=seed,
        images_per_step=world.world_size * BATCH,
        slices=[StepSlice(start, start + BATCH, size_pair(partition.size))],
    )


def _estimate(
    targets: TargetMaker,
    names: list[str],
    partition: PartitionConfig,
    source: ShardBatches,
    images: int,
    world: World,
    device: torch.device,
) -> dict[str, Moments]:
    if not names:
        return {}
    moments = {name: Moments(targets.teachers[name].spec.channels, device=device) for name in names}
    per_step = world.world_size * BATCH
    label = f"statistics of {', '.join(names)}"
    with Progress(label, images, visible=world.is_main) as progress:
        for step, batches in enumerate(source.batches(0)):
            first = step * per_step + world.rank * BATCH
            if step * per_step >= images:
                break
            pixels, keys = batches[0].pixels.to(device), batches[0].keys
            # The last step is cut, so that the images do not depend on the number of processes.
            used = min(max(images - first, 0), BATCH)
            if used:
                _update(moments, targets, pixels[:used], keys[:used], partition)
            progress.update(min((step + 1) * per_step, images))
    for value in moments.values():
        value.all_reduce()
    return moments


def _update(
    moments: dict[str, Moments],
    targets: TargetMaker,
    pixels: torch.Tensor,
    keys: tuple[str, ...],
    partition: PartitionConfig,
) -> None:
    for name, value in moments.items():
        features = targets.own_grid(name, pixels, partition)
        check_targets({name: features}, keys)
        value.update(features.spatial)


def _file_name(
    targets: TargetMaker,
    name: str,
    partition: PartitionConfig,
    fingerprint: str,
    recipe: Recipe,
) -> str:
    """Name a cache file after everything that its numbers depend on."""
    spec = targets.teachers[name].spec
    parts = (
        spec.weights_hash,
        spec.channels,
        targets.size(name, partition),
        size_pair(partition.size),
        fingerprint,
        recipe.normalizer.images,
        recipe.seed,
        replace(recipe.data, workers=0, max_bad_share=0.0),  # neither changes an image
        recipe.teachers[name].options,
    )
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    height, width = targets.size(name, partition)
    return f"{name}-{height}x{width}-{digest}.safetensors"


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


def carry_heads_over(
    model: DistilledStudent, before: Mapping[str, Normalizer], now: Mapping[str, Normalizer]
) -> None:
    """Make heads that were trained under earlier statistics predict the same under new ones.

    A stage estimates its statistics anew, and with them PHI-S's rotation changes; without this the
    heads of the stage before would have to be learned once more. Exact, since the normalizers are
    affine and a head ends in a linear layer. Ours: the papers freeze the body while heads relearn.
    A normalizer without inverse (layer_norm) has no statistics either, so nothing is to be done.
    """
    for name, adaptor in model.adaptors.items():
        if isinstance(now[name], LayerNorm):
            continue
        assert isinstance(adaptor, Adaptor)
        head = adaptor.spatial.final
        last = head[-1]
        assert isinstance(last, nn.Linear)
        head[-1] = now[name].unfold(before[name].fold(last))
