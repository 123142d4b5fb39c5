"""Which files of fitted upsamplers a stage learns through: found, checked, written down.

A teacher that goes through a fitted upsampler has a file: the one that the recipe names, else that
of the run folder, else one that comes with the project. :func:`with_files` writes into the recipe
which one it is, its sha256 and the size that it was fitted at. So run folders and checkpoints know
what a student was made of, and a file that was exchanged since is noticed.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from radio_distill.config import (
    FitConfig,
    Recipe,
    TeacherConfig,
    UpsamplerConfig,
    build,
    dump,
    parse_yaml,
)
from radio_distill.errors import RadioDistillError
from radio_distill.system.files import sha256_of

from .common import (
    FITTED,
    Asked,
    changed_options,
    describe_stage,
    fit_folder,
    fit_of,
    stage_of,
)

if TYPE_CHECKING:
    from radio_distill.train.checkpoint import Checkpoint
    from radio_distill.types import Size
    from upsamplers.fitted import FittedHeader

_MOST_BYTES = 1 << 30
"""Weights of a teacher that are read to compare a file with; larger ones wait for the stage."""


@dataclass(frozen=True)
class Need:
    """A fitted upsampler that a stage cannot do without."""

    stage: str
    teacher: str
    upsampler: str
    factor: int
    views: "tuple[tuple[str, Size], ...]"
    """The teacher's inputs there, in pixels, each with the name of its partition."""

    @property
    def sides(self) -> list[int]:
        """Longer sides of the inputs; a fit has one."""
        return sorted({max(size) for _, size in self.views})

    def fit(self, recipe: Recipe) -> FitConfig:
        """Return how the recipe fits it, at the first of its sizes."""
        config = fit_of(recipe, self.teacher, self.upsampler, self.factor)
        return replace(config, size=self.sides[0])

    def folder(self, recipe: Recipe) -> Path:
        """Return the folder of that fit."""
        return fit_folder(recipe, self.fit(recipe))


@dataclass(frozen=True)
class Problem:
    """Why a stage cannot have a fitted upsampler."""

    need: Need
    text: str
    """One line: what is wrong, and the hint."""
    is_unfitted: bool = False
    """Whether nothing is wrong but that it is still to be fitted."""


def needs_of(recipe: Recipe, stage: str) -> list[Need]:
    """Return the fitted upsamplers of a stage, one for each teacher that goes through it.

    Raises ConfigError or WeightsError for a teacher that cannot be described.
    """
    from upsamplers import is_fitted

    upsampler = stage_of(recipe, stage).upsampler
    if not is_fitted(upsampler.name):
        return []
    resolved = describe_stage(recipe, stage)
    views = {
        name: dict.fromkeys(
            (partition.name, view.size)
            for partition, view in resolved.views(name)
            if view.is_upsampled
        )
        for name in recipe.teachers
    }
    return [
        Need(stage, name, upsampler.name, upsampler.factor, tuple(seen))
        for name, seen in views.items()
        if seen
    ]


def upsampler_of(recipe: Recipe, stage: str) -> UpsamplerConfig:
    """Return a stage's upsampler with the files that it will use, as far as there are any."""
    config = stage_of(recipe, stage).upsampler
    found = {need.teacher: _locate(recipe, need) for need in needs_of(recipe, stage)}
    return replace(config, weights={name: file for name, file in found.items() if file})


def with_files(recipe: Recipe, stage: str, asked: Asked | None = None) -> tuple[Recipe, list[str]]:
    """Write into the recipe which files a stage's upsampler has.

    Args:
        recipe: as a person wrote it.
        stage: of the recipe.
        asked: how it was named on the command line, for the commands in messages.

    Returns:
        The recipe, with file, sha256 and size of every file that is there; and why the stage cannot
        be trained with them, a line for each problem.
    """
    from upsamplers.fitted import path_of, read_header

    needs = needs_of(recipe, stage)
    if not needs:
        return recipe, []
    problems = [item.text for item in problems_of(recipe, stage, asked, check_weights=False)]
    config = upsampler_of(recipe, stage)
    sums, sizes = dict(config.sha256), dict(config.sizes)
    for name, file in config.weights.items():
        path = path_of(file)
        if path.is_file():
            sums[name] = sha256_of(path)
        try:
            height, width = read_header(path).size
        except RadioDistillError:
            continue  # one of the problems
        sizes[name] = height if height == width else (height, width)
    changed = replace(config, sha256=sums, sizes=sizes)
    config_of_stage = replace(recipe.stages[stage], upsampler=changed)
    return replace(recipe, stages={**recipe.stages, stage: config_of_stage}), problems


def problems_of(
    recipe: Recipe, stage: str, asked: Asked | None = None, check_weights: bool = True
) -> list[Problem]:
    """Say what a stage lacks of its fitted upsamplers, before anything is trained.

    Args:
        recipe: whose stage it is.
        stage: its name.
        asked: how the recipe was named on the command line.
        check_weights: compare the teacher's own weights with those that a file was fitted to, as
            far as they lie on this machine and are not large; the stage compares them in any case.
    """
    asked = asked or Asked(recipe.name)
    return [
        problem
        for need in needs_of(recipe, stage)
        for problem in _problems(recipe, need, asked, check_weights)
    ]


def _problems(recipe: Recipe, need: Need, asked: Asked, check_weights: bool) -> Iterator[Problem]:
    from upsamplers.fitted import path_of

    config = stage_of(recipe, need.stage).upsampler
    where, teacher = f"stages.{need.stage}", need.teacher
    any_size = bool(config.options.get("any_size"))
    if len(need.sides) > 1 and not any_size:
        shown = ", ".join(f"{size[0]}x{size[1]}" for _, size in need.views)
        yield Problem(
            need,
            f"{where}: a fitted {need.upsampler} has one size, and teacher {teacher!r} is shown at "
            f"{shown} px; set teacher_sizes.{teacher} of the partitions, or "
            f"{where}.upsampler.options.any_size",
        )
        return
    file = _locate(recipe, need)
    mends = f"{_hint(recipe, need, asked)}, or set {where}.upsampler.weights.{teacher}"
    lacking = f"{where}: no {need.upsampler} {need.factor}x is fitted to teacher {teacher!r}"
    if not file:
        yield Problem(need, f"{lacking} at {need.sides[0]} px; {mends}", is_unfitted=True)
        return
    named, path = teacher in config.weights, path_of(file)
    if not path.is_file():
        yield Problem(need, f"{where}.upsampler.weights.{teacher}: nothing at {file}")
        return
    wrong = _mismatch(recipe, need, path, check_weights, any_size)
    if not wrong:
        return
    if not named and is_shipped(file):
        text = f"{lacking} at {need.sides[0]} px, and the one that comes with the project {wrong}"
        yield Problem(need, f"{text}; {mends}", is_unfitted=True)
    else:
        what = f"the {need.upsampler} of teacher {teacher!r} ({file}) {wrong}"
        yield Problem(need, f"{where}: {what}; {mends}")


def _mismatch(recipe: Recipe, need: Need, path: Path, check_weights: bool, any_size: bool) -> str:
    """Say how a file is not what a stage needs; empty where it is."""
    from radio_distill.system.trust import check_sha256
    from teachers import teacher_spec
    from upsamplers.fitted import check_fitted_for, check_size, read_header

    config = stage_of(recipe, need.stage).upsampler
    field, name = f"stages.{need.stage}.upsampler", need.teacher
    try:
        header = read_header(path)
        spec = teacher_spec(name, recipe.teachers[name])
        known = weights_hash(name, recipe.teachers[name]) if check_weights else None
        spec = replace(spec, weights_hash=header.weights_hash if known is None else known)
        check_fitted_for(header, need.upsampler, spec, need.factor)
        check_sha256([path], config.sha256.get(name, ""), f"{field}.sha256.{name}")
        check_size(header, config.sizes.get(name), f"{field}.sizes.{name}")
    except RadioDistillError as error:
        return f"does not serve: {error}"
    return "" if any_size else _size_mismatch(header, need)


def _size_mismatch(header: "FittedHeader", need: Need) -> str:
    """Views that are not square keep their longer side, as the recipe's input sizes do."""
    from upsamplers.fitted import times

    for partition, size in need.views:
        if max(size) != max(header.size):
            return (
                f"was fitted at {times(header.size)} px, the partition shows it {times(size)}: set "
                f"teacher_sizes.{need.teacher} of {need.stage}'s partition {partition!r}"
            )
    return ""


def _hint(recipe: Recipe, need: Need, asked: Asked) -> str:
    """Return the command that fits what a stage needs, where one fit can serve all stages."""
    for other in recipe.stages:
        if other == need.stage:
            continue
        for rival in needs_of(recipe, other):
            if rival.folder(recipe) == need.folder(recipe) and rival.sides != need.sides:
                return (
                    f"one fit has one size, and {other} shows this teacher at {rival.sides[0]} px: "
                    f"make its teacher_sizes.{need.teacher} equal"
                )
    return f"run {fit_command(asked, recipe, need.fit(recipe))}"


def fit_command(asked: Asked, recipe: Recipe, config: FitConfig) -> str:
    """Return the command line that makes a fit, as it can be pasted.

    Args:
        asked: how the recipe was named.
        recipe: what was read there.
        config: the fit.
    """
    words = ["radio-distill", "fit-upsampler", asked.recipe]
    return shlex.join([*words, *fit_words(recipe, config), *asked.flags(*SET_BY_FIT)])


def fit_words(recipe: Recipe, config: FitConfig) -> list[str]:
    """Return the arguments of ``radio-distill fit-upsampler`` that make a fit out of a recipe's."""
    words = ["--teacher", config.teacher, "--upsampler", config.upsampler]
    words += ["--factor", str(config.factor)]
    if recipe.fit.options or changed_options(config.upsampler, config.options):
        options = yaml.safe_dump(dict(config.options), default_flow_style=True, width=10**6)
        words += ["--fit.options", options.strip()]
    if not (config.de_bias and recipe.fit.de_bias):
        words += ["--fit.de_bias", str(config.de_bias).lower()]
    if config.size:
        words += ["--fit.size", str(config.size)]
    return words


SET_BY_FIT = (
    "fit.teacher=", "fit.upsampler=", "fit.factor=", "fit.options", "fit.de_bias=", "fit.size=",
    "stages.",
)  # fmt: skip
"""Fields of a command line that a fit's own arguments replace, or that it does not read."""


def is_shipped(file: str) -> bool:
    """Return whether a file, as a recipe names it, is one that comes with the project."""
    from upsamplers.fitted import SHIPPED_AS

    return file.startswith(SHIPPED_AS)


def _locate(recipe: Recipe, need: Need) -> str:
    """Return the file that a stage will use, as a recipe names it; empty where there is none."""
    named = stage_of(recipe, need.stage).upsampler.weights.get(need.teacher)
    if named:
        return named
    path = need.folder(recipe) / FITTED
    return str(path) if path.is_file() else _shipped(recipe, need)


def _shipped(recipe: Recipe, need: Need) -> str:
    """Return the name of the project's own file for a teacher, empty where there is none.

    A teacher whose weights are not here to compare with is known by its preset.
    """
    from teachers import teacher_spec
    from upsamplers.fitted import SHIPPED, SHIPPED_AS, read_header, shipped

    config, spec = (
        recipe.teachers[need.teacher],
        teacher_spec(need.teacher, recipe.teachers[need.teacher]),
    )
    wanted = (need.upsampler, need.factor, spec.channels)
    headers = map(read_header, sorted(SHIPPED.glob("*.safetensors")))
    if not any((item.upsampler, item.factor, item.channels) == wanted for item in headers):
        return ""
    known = weights_hash(need.teacher, config)
    if known is not None:
        path = shipped(need.upsampler, need.factor, replace(spec, weights_hash=known))
    elif not config.weights:
        path = SHIPPED / f"{config.preset}-{need.upsampler}-{need.factor}x.safetensors"
    else:
        path = None
    return f"{SHIPPED_AS}{path.name}" if path is not None and path.exists() else ""


def weights_hash(name: str, config: TeacherConfig) -> str | None:
    """Return the hash of a teacher's weights (``TeacherSpec.weights_hash``) if they are at hand.

    None where they would have to be downloaded, cannot be read, or are larger than 1 GiB.
    """
    from teachers import resolve
    from teachers.weights import local_path, summed_files

    try:
        if not config.weights:
            preset = resolve(config)
            return (
                "" if preset.random else _read_hash(name, dump(config)) if preset.package else None
            )
        files = summed_files(local_path(config.weights))
        if sum(file.stat().st_size for file in files) > _MOST_BYTES:
            return None
        return _read_hash(name, dump(config), *(file.stat().st_mtime_ns for file in files))
    except (RadioDistillError, OSError):
        return None  # whoever builds the teacher says why


@lru_cache(maxsize=64)
def _read_hash(name: str, config: str, *versions: int) -> str:
    from teachers import build_teacher

    return build_teacher(name, build(TeacherConfig, parse_yaml(config))).spec.weights_hash


def same_files(old: Recipe, new: Recipe, stage: str) -> Recipe:
    """Return the new recipe with the old one's words for what is the same in a stage's upsampler.

    Files are told apart by their sums, wherever they lie. What only one of the recipes knows the
    sum of is taken to be the same: see :func:`unknown_files`. The upsampler of a stage that
    upsamples nothing is no difference at all.
    """
    if stage not in old.stages or stage not in new.stages:
        return new
    before, after = old.stages[stage].upsampler, new.stages[stage].upsampler
    if not any(partition.upsample for partition in new.stages[stage].partitions):
        changed = before
    else:
        sums = {**after.sha256, **{k: v for k, v in before.sha256.items() if k not in after.sha256}}
        sums = {name: text for name, text in sums.items() if name in before.sha256}
        changed = replace(after, weights=before.weights, sizes=before.sizes, sha256=sums)
    config = replace(new.stages[stage], upsampler=changed)
    return replace(new, stages={**new.stages, stage: config})


def unknown_files(checkpoint: "Checkpoint", recipe: Recipe, stage: str) -> list[str]:
    """Name the teachers of whose upsampler a checkpoint does not say which file it was.

    Earlier versions did not write it down.
    """
    if stage not in recipe.stages or stage not in checkpoint.recipe.stages:
        return []
    known = checkpoint.recipe.stages[stage].upsampler.sha256
    return [name for name in recipe.stages[stage].upsampler.sha256 if name not in known]


def changed_since(checkpoint: "Checkpoint") -> list[str]:
    """Say how what a checkpoint was made of is not what its recipe would make it of today.

    Files of its upsamplers that were exchanged, and what was changed on its way.
    """
    from upsamplers.fitted import path_of

    lines = [f"{checkpoint.folder} was changed {line}" for line in checkpoint.origin.changed]
    if checkpoint.stage not in checkpoint.recipe.stages:
        return lines
    config = checkpoint.recipe.stages[checkpoint.stage].upsampler
    for name, known in config.sha256.items():
        path = path_of(config.weights.get(name, ""))
        if path.is_file() and sha256_of(path) != known:
            lines.append(
                f"{checkpoint.folder} was trained with another {config.name} of teacher {name!r} "
                f"than lies at {path} now"
            )
    return lines
