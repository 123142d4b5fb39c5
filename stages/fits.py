"""Fitted upsamplers of stages: how they are named, where they lie, which of them a stage uses.

A teacher that goes through a fitted upsampler has a file: the one that the recipe names, else that
of the run folder, else one that comes with the project. :func:`with_files` writes into the stage
which one it is, its sha256 and the size that it was fitted at. So run folders and checkpoints know
what a student was made of, and a file that was exchanged since is noticed.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radio_distill.config import (
    FitConfig,
    Recipe,
    TeacherConfig,
    UpsamplerConfig,
    build,
    dump,
    parse_yaml,
    yaml_line,
)
from radio_distill.errors import RadioDistillError
from radio_distill.stage import Stage
from radio_distill.system.files import sha256_of
from radio_distill.types import format_size

from .recipes import Asked, describe_stage

if TYPE_CHECKING:
    from radio_distill.types import Size
    from upsamplers.fitted_files import FittedHeader

FITTED = "upsampler.safetensors"
"""Name of the file in the folder of a fit."""

_MOST_BYTES = 1 << 30
"""Weights of a teacher that are read to compare a file with; larger ones wait for the stage."""


def fit_of(recipe: Recipe, teacher: str, upsampler: str, factor: int) -> FitConfig:
    """Return how a recipe fits an upsampler; its options are those of ``fit.upsampler`` alone."""
    options = recipe.fit.options if upsampler == recipe.fit.upsampler else {}
    return replace(recipe.fit, teacher=teacher, upsampler=upsampler, factor=factor, options=options)


def fit_folder(recipe: Recipe, config: FitConfig) -> Path:
    """Return the folder that an upsampler is fitted in, inside the run folder."""
    return recipe.folder / "fit" / fit_name(config)


def fit_name(config: FitConfig) -> str:
    """Name a fit: TEACHER-UPSAMPLER-FACTORx, and what changes the model from its defaults.

    For instance ``dino-featsharp-2x-inputs_bilinear_tiles-no_debias``.
    """
    parts = [f"{config.teacher}-{config.upsampler}-{config.factor}x"]
    for name, value in changed_options(config.upsampler, config.options).items():
        parts.append(f"{name}_{'_'.join(map(str, value)) if isinstance(value, list) else value}")
    if not config.de_bias:
        parts.append("no_debias")
    return re.sub(r"[^\w.+-]+", "_", "-".join(parts))


def changed_options(upsampler: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options of a network that are not its defaults, sorted by name."""
    if not options:
        return {}
    from upsamplers.networks import NETWORKS

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, (list, tuple)) else value

    known = signature(NETWORKS.get(upsampler)).parameters
    defaults = {name: plain(item.default) for name, item in known.items()}
    given = {name: plain(options[name]) for name in sorted(options)}
    return {
        name: value
        for name, value in given.items()
        if name not in defaults or defaults[name] != value
    }


@dataclass(frozen=True)
class Need:
    """A fitted upsampler that a stage cannot do without."""

    stage: Stage
    teacher: str
    views: "tuple[tuple[str, Size], ...]"
    """The teacher's inputs there, in pixels, each with the name of its partition."""

    @property
    def config(self) -> UpsamplerConfig:
        return self.stage.upsampler

    @property
    def sides(self) -> list[int]:
        """Longer sides of the inputs; a fit has one."""
        return sorted({max(size) for _, size in self.views})

    @property
    def fit(self) -> FitConfig:
        """The recipe's section `fit` for it, at the first of its sizes."""
        recipe, config = self.stage.recipe, self.config
        fit = fit_of(recipe, self.teacher, config.name, config.factor)
        return replace(fit, size=self.sides[0])

    @property
    def folder(self) -> Path:
        """The folder of that fit."""
        return fit_folder(self.stage.recipe, self.fit)


@dataclass(frozen=True)
class Problem:
    """Why a stage cannot have a fitted upsampler."""

    need: Need
    text: str
    """One line: what is wrong, and the hint."""
    is_unfitted: bool = False
    """Whether nothing is wrong but that it is still to be fitted."""


def needs_of(stage: Stage) -> list[Need]:
    """Return the fitted upsamplers of a stage, one for each teacher that goes through it."""
    from upsamplers import is_fitted

    if stage.is_fit or not is_fitted(stage.upsampler.name):
        return []
    needs = []
    for name in stage.teachers:
        views = stage.views(name)
        shown = {(item.name, view.size): None for item, view in views if view.is_upsampled}
        needs += [Need(stage, name, tuple(shown))] if shown else []
    return needs


def upsampler_of(stage: Stage) -> UpsamplerConfig:
    """Return a stage's upsampler with the files that it will use, as far as there are any."""
    files = {need.teacher: _locate(need) for need in needs_of(stage)}
    return replace(stage.upsampler, weights={name: file for name, file in files.items() if file})


def with_files(stage: Stage, asked: Asked | None = None) -> tuple[Stage, list[str]]:
    """Write into a stage which files its upsampler has.

    Args:
        stage: resolved or not.
        asked: how its recipe was named on the command line, for the commands in messages.

    Returns:
        The stage, with file, sha256 and size of every file that is there; and why it cannot be
        trained with them, a line for each problem.
    """
    if not needs_of(stage):
        return stage, []
    from upsamplers.fitted_files import path_of, read_header

    problems = [item.text for item in problems_of(stage, asked, check_weights=False)]
    config = upsampler_of(stage)
    checksums, sizes = dict(config.sha256), dict(config.sizes)
    for name, file in config.weights.items():
        path = path_of(file)
        if path.is_file():
            checksums[name] = sha256_of(path)
        try:
            height, width = read_header(path).size
        except RadioDistillError:
            continue  # one of the problems
        sizes[name] = height if height == width else (height, width)
    return with_upsampler(stage, replace(config, sha256=checksums, sizes=sizes)), problems


def with_upsampler(stage: Stage, upsampler: UpsamplerConfig) -> Stage:
    """Return a stage with another section of its upsampler."""
    stages = {**stage.recipe.stages, stage.name: replace(stage.config, upsampler=upsampler)}
    return replace(stage, recipe=replace(stage.recipe, stages=stages))


def problems_of(
    stage: Stage, asked: Asked | None = None, check_weights: bool = True
) -> list[Problem]:
    """Say what a stage lacks of its fitted upsamplers, before anything is trained.

    Args:
        stage: resolved or not.
        asked: how its recipe was named on the command line.
        check_weights: compare the teacher's own weights with those that a file was fitted to, as
            far as they lie on this machine and are not large; the stage compares them in any case.
    """
    asked = asked or Asked(stage.recipe.name)
    return [
        problem for need in needs_of(stage) for problem in _problems(need, asked, check_weights)
    ]


def _problems(need: Need, asked: Asked, check_weights: bool) -> Iterator[Problem]:
    from upsamplers.fitted_files import path_of

    where, teacher, name = f"stages.{need.stage.name}", need.teacher, need.config.name
    any_size = bool(need.config.options.get("any_size"))
    if len(need.sides) > 1 and not any_size:
        shown = ", ".join(f"{size[0]}x{size[1]}" for _, size in need.views)
        yield Problem(
            need,
            f"{where}: a fitted {name} has one size, and teacher {teacher!r} is shown at {shown} "
            f"px; set teacher_sizes.{teacher} of the partitions, or "
            f"{where}.upsampler.options.any_size",
        )
        return
    file = _locate(need)
    hint = f"{_hint(need, asked)}, or set {where}.upsampler.weights.{teacher}"
    lacking = f"{where}: no {name} {need.config.factor}x is fitted to teacher {teacher!r}"
    if not file:
        yield Problem(need, f"{lacking} at {need.sides[0]} px; {hint}", is_unfitted=True)
        return
    is_named, path = teacher in need.config.weights, path_of(file)
    if not path.is_file():
        yield Problem(need, f"{where}.upsampler.weights.{teacher}: nothing at {file}")
        return
    wrong = _mismatch(need, path, check_weights, any_size)
    if not wrong:
        return
    if not is_named and is_shipped(file):
        text = f"{lacking} at {need.sides[0]} px, and the one that comes with the project {wrong}"
        yield Problem(need, f"{text}; {hint}", is_unfitted=True)
    else:
        text = f"{where}: the {name} of teacher {teacher!r} ({file}) {wrong}; {hint}"
        yield Problem(need, text)


def _mismatch(need: Need, path: Path, check_weights: bool, any_size: bool) -> str:
    """Say how a file is not what a stage needs; empty where it is."""
    from radio_distill.system.trust import check_sha256
    from upsamplers.fitted_files import check_fitted_for, check_size, read_header

    config, name = need.config, need.teacher
    field = f"stages.{need.stage.name}.upsampler"
    try:
        header = read_header(path)
        known = weights_hash(name, need.stage.teachers[name]) if check_weights else None
        spec = replace(
            need.stage.specs[name], weights_hash=header.weights_hash if known is None else known
        )
        check_fitted_for(header, config.name, spec, config.factor)
        check_sha256([path], config.sha256.get(name, ""), f"{field}.sha256.{name}")
        check_size(header, config.sizes.get(name), f"{field}.sizes.{name}")
    except RadioDistillError as error:
        return f"does not serve: {error}"
    return "" if any_size else _size_mismatch(header, need)


def _size_mismatch(header: "FittedHeader", need: Need) -> str:
    """Views that are not square keep their longer side, as the recipe's input sizes do."""
    for partition, size in need.views:
        if max(size) != max(header.size):
            fitted, given = format_size(header.size), format_size(size)
            return (
                f"was fitted at {fitted} px, the partition shows it {given}: set "
                f"teacher_sizes.{need.teacher} of {need.stage.name}'s partition {partition!r}"
            )
    return ""


def _hint(need: Need, asked: Asked) -> str:
    """Return the command that fits what a stage needs, where one fit can serve all stages."""
    for other in need.stage.recipe.stages:
        if other == need.stage.name:
            continue
        for rival in needs_of(describe_stage(need.stage.recipe, other)):
            if rival.folder == need.folder and rival.sides != need.sides:
                return (
                    f"one fit has one size, and {other} shows this teacher at {rival.sides[0]} px: "
                    f"make its teacher_sizes.{need.teacher} equal"
                )
    return f"run {fit_command(asked, need.stage.recipe, need.fit)}"


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
        words += ["--fit.options", yaml_line(dict(config.options))]
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
    from upsamplers.fitted_files import SHIPPED_AS

    return file.startswith(SHIPPED_AS)


def _locate(need: Need) -> str:
    """Return the file that a stage will use, as a recipe names it; empty where there is none."""
    named = need.config.weights.get(need.teacher)
    if named:
        return named
    path = need.folder / FITTED
    return str(path) if path.is_file() else _shipped(need)


def _shipped(need: Need) -> str:
    """Return the name of the project's own file for a teacher, empty where there is none.

    A teacher whose weights are not here to compare with is known by its preset.
    """
    from upsamplers.fitted_files import SHIPPED, SHIPPED_AS, read_header, shipped

    teacher, spec = need.stage.teachers[need.teacher], need.stage.specs[need.teacher]
    name, factor = need.config.name, need.config.factor
    headers = map(read_header, sorted(SHIPPED.glob("*.safetensors")))
    wanted = (name, factor, spec.channels)
    if not any((item.upsampler, item.factor, item.channels) == wanted for item in headers):
        return ""
    known = weights_hash(need.teacher, teacher)
    if known is not None:
        path = shipped(name, factor, replace(spec, weights_hash=known))
    elif not teacher.weights:
        path = SHIPPED / f"{teacher.preset}-{name}-{factor}x.safetensors"
    else:
        path = None
    return f"{SHIPPED_AS}{path.name}" if path is not None and path.exists() else ""


def weights_hash(name: str, config: TeacherConfig) -> str | None:
    """Return the hash of a teacher's weights (``TeacherSpec.weights_hash``) if they are at hand.

    None where they would have to be downloaded, cannot be read, or are larger than 1 GiB.
    """
    from radio_distill.weights.files import checksummed_files
    from teachers import resolve
    from teachers.weights import local_path

    try:
        if not config.weights:
            preset = resolve(config)
            if preset.random:
                return ""
            return _read_hash(name, dump(config)) if preset.package else None
        files = checksummed_files(local_path(config.weights))
        if sum(file.stat().st_size for file in files) > _MOST_BYTES:
            return None
        return _read_hash(name, dump(config), *(file.stat().st_mtime_ns for file in files))
    except (RadioDistillError, OSError):
        return None  # whoever builds the teacher says why


@lru_cache(maxsize=64)
def _read_hash(name: str, config: str, *versions: int) -> str:
    from teachers import build_teacher

    return build_teacher(name, build(TeacherConfig, parse_yaml(config))).spec.weights_hash
