"""Which jobs a recipe needs: its stages, then export and scores; or a sweep over the last stage.

Upsamplers that are still to be fitted are jobs too, before the first stage that needs them. Which
they are, the caller says: here nothing is known of teachers.

A sweep over teacher upsamplers ends with one job that scores all of them and prints the gain table.
A sweep over a field only trains: each value has a run folder of its own.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from radio_distill.config import Recipe, load
from radio_distill.config.recipes import find_recipe
from radio_distill.errors import ConfigError
from radio_distill.registry import nearest
from radio_distill.system.trust import FLAG

from .chain import Link, Task
from .job import RESUME

_CLI = "stages.cli:main"
TAKE_OVER = "--take-over"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """An upsampler that is to be fitted before a stage."""

    before: str
    """Name of the stage."""
    label: str
    arguments: tuple[str, ...]
    """Of ``radio-distill fit-upsampler``, the recipe's included."""
    folder: str
    most_processes: int
    """That share the images of its steps."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The recipe as the jobs of one stage read it; a sweep has several of its last stage."""

    stage: str
    label: str
    """Of the task in a sweep."""
    recipe: Recipe
    overrides: tuple[str, ...]
    """What made it of the file, as ``field.name=value``."""
    before: tuple[str, ...]
    """Stages of the chain that are trained before, and their folders."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be submitted."""

    recipe: str | Path
    """A recipe's file, or the name of one that comes with the project."""
    stages: tuple[str, ...] = ()
    """None for all of the recipe."""
    overrides: tuple[str, ...] = ()
    """Assignments ``field.name=value``."""
    upsamplers: tuple[str, ...] = ()
    """Of a sweep in the last stage."""
    sweep: str = ""
    """``FIELD=V1,V2,...``: a sweep over a field in the last stage."""
    export: bool = True
    evaluate: bool = True
    resume: bool = False
    take_over: bool = False
    """Whether the stages may take their folders from runs that are going on."""
    trust: bool = False
    """Whether the jobs may read weights that hold code."""
    fits: tuple[Fit, ...] = ()
    """What is to be fitted before stages."""
    fitted: tuple[str, ...] = ()
    """Assignments that name files of the run folder to the tasks of a sweep over a field, each of
    which has a run folder of its own."""


def links_of(request: Request) -> tuple[Recipe, tuple[Link, ...]]:
    """Check the recipe as every job will read it, and return it with its jobs.

    Raises:
        ConfigError: for a recipe, a stage or a sweep that cannot be right.
    """
    file, recipe, stages = _asked(request)
    links = [
        link
        for stage in stages
        for link in (*_fit_links(stage, request), _stage_link(file, stage, request))
    ]
    if request.upsamplers:
        links[-1] = _upsampler_array(file, stages[-1], request)
        links.append(_gain_link(file, stages[-1], request))
    elif request.sweep:
        links[-1] = _field_array(file, stages[-1], request)
    elif stages[-1] == list(recipe.stages)[-1]:
        links += _after_training(recipe, links[-1].tasks[0].stage_folder, request)
    if request.trust:
        links = [_with_flag(link, FLAG) for link in links]
    return recipe, tuple(links)


def _asked(request: Request) -> tuple[Path, Recipe, tuple[str, ...]]:
    """Return the recipe's file, the recipe, and the stages that are asked for."""
    file = find_recipe(str(request.recipe)).absolute()
    recipe = load(file, [item for item in request.overrides if not item.startswith("stage.")])
    stages = request.stages or tuple(recipe.stages)
    for stage in stages:
        if stage not in recipe.stages:
            raise ConfigError(
                f"recipe {recipe.name!r} has no {stage} ({nearest(stage, list(recipe.stages))})"
            )
    if request.upsamplers and request.sweep:
        raise ConfigError("--upsamplers and --sweep are two sweeps; submit one after the other")
    return file, recipe, stages


def variants_of(request: Request) -> list[Variant]:
    """Return the recipe as each stage of a request reads it, in order; of a sweep, each task's."""
    file, _, stages = _asked(request)
    variants: list[Variant] = []
    for stage in stages:
        tasks: list[tuple[str, list[str]]] = [("", [])]
        if stage == stages[-1] and request.upsamplers:
            tasks = _upsampler_tasks(stage, request)
        elif stage == stages[-1] and request.sweep:
            tasks = _field_tasks(file, stage, request)
        before = [item.stage for item in variants]
        before += [str(item.recipe.stage_folder(item.stage).absolute()) for item in variants]
        for label, extra in tasks:
            overrides = [_absolute(item, stage) for item in (*request.overrides, *extra)]
            variants.append(
                Variant(
                    stage=stage,
                    label=label,
                    recipe=load(file, overrides),
                    overrides=tuple(overrides),
                    before=tuple(before),
                )
            )
    return variants


def _absolute(override: str, stage: str) -> str:
    """Return an override that means the same whatever stage reads it."""
    return f"stages.{stage}.{override[6:]}" if override.startswith("stage.") else override


def _fit_links(stage: str, request: Request) -> list[Link]:
    """Return the job that fits what a stage needs; an array, where that is more than one thing."""
    fits = [fit for fit in request.fits if fit.before == stage]
    if not fits:
        return []
    flags = (*[RESUME] * request.resume, *[TAKE_OVER] * request.take_over)
    tasks = tuple(
        Task(label=fit.label, arguments=(*fit.arguments, *flags), stage_folder=fit.folder)
        for fit in fits
    )
    most = min(fit.most_processes for fit in fits)
    target = "stages.fit_upsampler:main"
    return [Link(name=f"fit-{stage}", target=target, tasks=tasks, most_processes=most)]


def _with_flag(link: Link, flag: str) -> Link:
    tasks = (replace(task, arguments=(*task.arguments, flag)) for task in link.tasks)
    return replace(link, tasks=tuple(tasks))


def _stage_link(file: Path, stage: str, request: Request) -> Link:
    task = _stage_task(file, stage, request)
    return Link(name=stage, target=f"stages.{stage}:main", tasks=(task,))


def _stage_task(
    file: Path, stage: str, request: Request, label: str = "", extra: Sequence[str] = ()
) -> Task:
    overrides = [*request.overrides, *extra]
    recipe = load(file, overrides, stage)
    arguments = [str(file), *(f"--{item}" for item in overrides)]
    return Task(
        label=label,
        arguments=(*arguments, *[RESUME] * request.resume, *[TAKE_OVER] * request.take_over),
        stage_folder=str(recipe.stage_folder(stage).absolute()),
    )


def _upsampler_array(file: Path, stage: str, request: Request) -> Link:
    tasks = tuple(
        _stage_task(file, stage, request, name, extra)
        for name, extra in _upsampler_tasks(stage, request)
    )
    if len({task.stage_folder for task in tasks}) < len(tasks):
        raise ConfigError(f"--upsamplers: no partition of {stage} upsamples a teacher")
    return Link(name=stage, target=f"stages.{stage}:main", tasks=tasks)


def _upsampler_tasks(stage: str, request: Request) -> list[tuple[str, list[str]]]:
    """Return each task of a sweep over upsamplers: its label, and what it changes."""
    if stage != "stage3":
        raise ConfigError(f"--upsamplers is a sweep of stage3, but {stage} is the last stage named")
    _no_doubles(request.upsamplers, "--upsamplers")
    return [(name, [f"stages.{stage}.upsampler.name={name}"]) for name in request.upsamplers]


def _gain_link(file: Path, stage: str, request: Request) -> Link:
    """Score and compare: `sweep` passes over the stages, which are complete by then."""
    names = request.upsamplers
    baseline = "bilinear" if "bilinear" in names else names[0]
    arguments = ["sweep", str(file), "--upsamplers", *names, "--baseline", baseline]
    for item in request.overrides:
        arguments += ["--override", _absolute(item, stage)]
    task = Task(arguments=tuple(arguments))
    return Link(name="gain", target=_CLI, tasks=(task,), is_stage=False)


def _field_array(file: Path, stage: str, request: Request) -> Link:
    """Train the stage once for each value of a field, each in a run folder of its own."""
    tasks = tuple(
        _stage_task(file, stage, request, label, [*request.fitted, *extra])
        for label, extra in _field_tasks(file, stage, request)
    )
    return Link(name=stage, target=f"stages.{stage}:main", tasks=tasks)


def _field_tasks(file: Path, stage: str, request: Request) -> list[tuple[str, list[str]]]:
    """Return each task of a sweep over a field: its label, and what it changes."""
    field, equals, text = request.sweep.partition("=")
    values = [value.strip() for value in text.split(",") if value.strip()]
    if not equals or not values:
        raise ConfigError(f"--sweep {request.sweep}: write it as FIELD=VALUE,VALUE,...")
    _no_doubles(values, "--sweep")
    base = load(file, request.overrides, stage)
    start = base.stages[stage].start_from
    extra = []
    if start in base.stages:  # a run of another name would look for it in its own folder
        extra = [f"stages.{stage}.start_from={base.stage_folder(start).absolute()}"]
    tasks = []
    for value in values:
        label = re.sub(r"[^\w.+-]+", "_", f"{field.rpartition('.')[2]}-{value}")
        tasks.append((label, [f"{field}={value}", f"name={base.name}-{label}", *extra]))
    return tasks


def _no_doubles(names: Sequence[str], flag: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{flag}: {name} is named twice")


def _after_training(recipe: Recipe, last_folder: str, request: Request) -> list[Link]:
    run = str(recipe.folder.absolute())
    links = []
    if request.export:
        task = Task(arguments=("export", run, "--format", "transformers"))
        links.append(Link(name="export", target=_CLI, tasks=(task,), is_stage=False))
    if request.evaluate:
        task = Task(arguments=("eval", last_folder))
        links.append(Link(name="eval", target=_CLI, tasks=(task,), is_stage=False))
    return links


def to_resume(
    links: Sequence[Link], complete: Collection[str], take_over: bool = False
) -> tuple[Link, ...]:
    """Return jobs as they are submitted to go on: with ``--resume``, and without their old ids.

    Those tasks whose ids are in ``complete`` stay as they are. With ``take_over``, stages take
    their folders from processes that are alive, for instance on a node that Slurm has lost.
    """
    flags = (RESUME, TAKE_OVER) if take_over else (RESUME,)

    def changed(link: Link, task: Task) -> Task:
        if task.job_id in complete:
            return task
        more = [flag for flag in flags if link.is_stage and flag not in task.arguments]
        return replace(task, arguments=(*task.arguments, *more), job_id="")

    return tuple(
        replace(link, tasks=tuple(changed(link, task) for task in link.tasks)) for link in links
    )
