"""The jobs of one submission: which ones a recipe needs, and ``RUN/slurm/chain.json``.

A recipe's stages wait for each other, then come export and scores; or the last stage is swept.
Upsamplers that are still to be fitted are jobs too, before the first stage that needs them; which
they are, the caller says, since nothing is known of teachers here. A sweep over teacher upsamplers
ends with one job that scores all of them and prints the gain table. A sweep over a field only
trains: each value has a run folder of its own.

One folder holds all that belongs to a chain: its file, submitit's pickles and logs, the outcomes of
processes and the history. It is its user's alone, since what lies in it is run.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from radio_distill.config import Recipe, for_stage, load, section_of, yaml_line
from radio_distill.config.recipes import find_recipe
from radio_distill.errors import ConfigError
from radio_distill.registry import nearest
from radio_distill.system.files import make_private, reason_of, replacing
from radio_distill.system.nested import plain_data
from radio_distill.system.trust import FLAG as TRUST

from .cluster import Cluster, load_cluster

CHAIN, RESUME, TAKE_OVER = "chain.json", "--resume", "--take-over"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One call of a job's target; a job with several is an array."""

    label: str = ""
    """What tells it from the other tasks of an array, for instance ``tile``."""
    arguments: tuple[str, ...] = ()
    stage_folder: str = ""
    """Where the stage writes its status and checkpoints; empty where the job is no stage."""
    job_id: str = ""
    """``41``, or ``41_2`` in an array; empty while it is still to be submitted."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job of a chain, which waits for the one before."""

    name: str
    tasks: tuple[Task, ...]
    target: str = "stages.cli:main"
    """``module:function``, called with each task's arguments."""
    is_stage: bool = True
    """A stage, or a fit, runs on all nodes and takes ``--resume``; other jobs are one process."""
    most_processes: int = 0
    """That have something to do, of a fit with few images in a step; 0 for any number."""

    def cluster(self, settings: Cluster) -> Cluster:
        """Return the resources of this job."""
        if not self.is_stage:
            gpus = min(1, settings.gpus_per_node)
            return replace(settings, nodes=1, gpus_per_node=gpus, launcher="srun")
        if not 0 < self.most_processes < settings.processes:
            return settings
        gpus = min(settings.gpus_per_node, self.most_processes)
        nodes = max(1, self.most_processes // settings.processes_per_node)
        return replace(settings, nodes=nodes, gpus_per_node=gpus)

    @property
    def job_ids(self) -> list[str]:
        """Ids of the jobs that its tasks were submitted as: one, or more after a resume."""
        return list(dict.fromkeys(task.job_id.partition("_")[0] for task in self.tasks))

    def with_flags(self, *flags: str) -> "Job":
        """Return the job with flags behind the arguments of each task, each flag once."""
        tasks = (
            replace(task, arguments=(*task.arguments, *_missing(flags, task.arguments)))
            for task in self.tasks
        )
        return replace(self, tasks=tuple(tasks))


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Jobs in their order, and the settings that all of them share."""

    jobs: tuple[Job, ...]
    cluster: Cluster = field(default_factory=Cluster)

    def job(self, name: str) -> Job:
        """Return a job by its name."""
        return next(job for job in self.jobs if job.name == name)

    def task(self, name: str, job_id: str) -> Task:
        """Return a task by its job's name and its id, which may not be noted yet."""
        tasks = self.job(name).tasks
        if job_id in (task.job_id for task in tasks):
            return next(task for task in tasks if task.job_id == job_id)
        return [task for task in tasks if not task.job_id][int(job_id.partition("_")[2] or 0)]

    def with_job(self, changed: Job) -> "Chain":
        """Return the chain with the job of that name replaced."""
        jobs = tuple(changed if job.name == changed.name else job for job in self.jobs)
        return replace(self, jobs=jobs)


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

    @property
    def folder(self) -> str:
        """Where the stage writes."""
        return str(self.recipe.stage_folder(self.stage).absolute())


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

    @property
    def flags(self) -> list[str]:
        """Flags of each stage and fit."""
        return [*[RESUME] * self.resume, *[TAKE_OVER] * self.take_over]


def jobs_of(request: Request) -> tuple[Recipe, tuple[Job, ...]]:
    """Check the recipe as every job will read it, and return it with its jobs.

    Raises:
        ConfigError: for a recipe, a stage or a sweep that cannot be right.
    """
    file, recipe, stages = _asked(request)
    variants, jobs = variants_of(request), []
    for stage in stages:
        jobs += _fit_jobs(stage, request)
        fitted = request.fitted if request.sweep and stage == stages[-1] else ()
        tasks = tuple(
            Task(
                label=variant.label,
                arguments=(
                    *("train", str(file), "--stages", stage),
                    *(f"--{text}" for text in (*variant.overrides, *fitted)),
                    *request.flags,
                ),
                stage_folder=variant.folder,
            )
            for variant in variants
            if variant.stage == stage
        )
        if len({task.stage_folder for task in tasks}) < len(tasks):
            raise ConfigError(f"--upsamplers: no partition of {stage} upsamples a teacher")
        jobs.append(Job(name=stage, tasks=tasks))
    if request.upsamplers:
        jobs.append(_gain_job(file, stages[-1], request))
    elif not request.sweep and stages[-1] == list(recipe.stages)[-1]:
        run = str(recipe.folder.absolute())
        jobs += [_command("export", run, "--format", "transformers")] * request.export
        jobs += [_command("eval", variants[-1].folder)] * request.evaluate
    return recipe, tuple(job.with_flags(*[TRUST] * request.trust) for job in jobs)


def variants_of(request: Request) -> list[Variant]:
    """Return the recipe as each stage of a request reads it, in order; of a sweep, each task's."""
    file, _, stages = _asked(request)
    variants: list[Variant] = []
    for stage in stages:
        before = [text for variant in variants for text in (variant.stage, variant.folder)]
        for label, extra in _tasks_of(file, stage, stages[-1], request):
            overrides = tuple(_absolute(text, stage) for text in (*request.overrides, *extra))
            variants.append(
                Variant(
                    stage=stage,
                    label=label,
                    recipe=load(file, list(overrides)),
                    overrides=overrides,
                    before=tuple(before),
                )
            )
    return variants


def to_resume(
    jobs: Sequence[Job], complete: Collection[str], take_over: bool = False
) -> tuple[Job, ...]:
    """Return jobs as they are submitted to go on: with ``--resume``, and without their old ids.

    Those tasks whose ids are in ``complete`` stay as they are. With ``take_over``, stages take
    their folders from processes that are alive, for instance on a node that Slurm has lost.
    """
    flags = (RESUME, *[TAKE_OVER] * take_over)

    def again(job: Job) -> Job:
        flagged = job.with_flags(*flags) if job.is_stage else job
        tasks = (
            old if old.job_id in complete else replace(new, job_id="")
            for old, new in zip(job.tasks, flagged.tasks, strict=True)
        )
        return replace(job, tasks=tuple(tasks))

    return tuple(map(again, jobs))


def _missing(flags: Sequence[str], arguments: Collection[str]) -> list[str]:
    return [flag for flag in flags if flag not in arguments]


def _asked(request: Request) -> tuple[Path, Recipe, tuple[str, ...]]:
    """Return the recipe's file, the recipe, and the stages that are asked for."""
    file = find_recipe(str(request.recipe)).absolute()
    recipe = load(file, [text for text in request.overrides if not text.startswith("stage.")])
    stages = request.stages or tuple(recipe.stages)
    for stage in stages:
        if stage not in recipe.stages:
            raise ConfigError(
                f"recipe {recipe.name!r} has no {stage} ({nearest(stage, list(recipe.stages))})"
            )
    if request.upsamplers and request.sweep:
        raise ConfigError("--upsamplers and --sweep are two sweeps; submit one after the other")
    return file, recipe, stages


def _tasks_of(
    file: Path, stage: str, last: str, request: Request
) -> list[tuple[str, tuple[str, ...]]]:
    """Return the tasks of a stage's job: the label of each, and what it changes of the recipe."""
    if stage != last or not (request.upsamplers or request.sweep):
        return [("", ())]
    if request.upsamplers:
        if stage != "stage3":
            raise ConfigError(f"--upsamplers is a sweep of stage3, but {stage} is the last named")
        _no_doubles(request.upsamplers, "--upsamplers")
        return [(name, (f"stages.{stage}.upsampler.name={name}",)) for name in request.upsamplers]
    name, equals, text = request.sweep.partition("=")
    values = [value.strip() for value in text.split(",") if value.strip()]
    if not equals or not values:
        raise ConfigError(f"--sweep {request.sweep}: write it as FIELD=VALUE,VALUE,...")
    _no_doubles(values, "--sweep")
    base = load(file, list(request.overrides), stage)
    # A run of another name would look for earlier stages in its own folder.
    start = base.stages[stage].start_from
    places = {f"stages.{stage}.start_from": start} if start in base.stages else {}
    places |= {
        f"teachers.{teacher}.weights": base.teachers[teacher].stage
        for teacher in for_stage(base, stage).teachers
        if base.teachers[teacher].stage and not base.teachers[teacher].weights
    }
    extra = tuple(f"{field}={base.stage_folder(of).absolute()}" for field, of in places.items())
    if start in base.stages and section_of(base, stage) != "student":
        # A stage whose start is a path has the recipe's student, or its own.
        student = plain_data(for_stage(base, stage).student)
        extra += (f"stages.{stage}.student={yaml_line(student)}",)
    short = name.rpartition(".")[2]
    labels = [re.sub(r"[^\w.+-]+", "_", f"{short}-{value}") for value in values]
    return [
        (label, (f"{name}={value}", f"name={base.name}-{label}", *extra))
        for label, value in zip(labels, values, strict=True)
    ]


def _no_doubles(names: Sequence[str], flag: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{flag}: {name} is named twice")


def _absolute(override: str, stage: str) -> str:
    """Return an override that means the same whatever stage reads it."""
    return f"stages.{stage}.{override[6:]}" if override.startswith("stage.") else override


def _fit_jobs(stage: str, request: Request) -> list[Job]:
    """Return the job that fits what a stage needs; an array, where that is more than one thing."""
    fits = [fit for fit in request.fits if fit.before == stage]
    tasks = tuple(
        Task(
            label=fit.label,
            arguments=("fit-upsampler", *fit.arguments, *request.flags),
            stage_folder=fit.folder,
        )
        for fit in fits
    )
    most = min((fit.most_processes for fit in fits), default=0)
    return [Job(name=f"fit-{stage}", tasks=tasks, most_processes=most)] * bool(fits)


def _gain_job(file: Path, stage: str, request: Request) -> Job:
    """Score and compare: `sweep` passes over the stages, which are complete by then."""
    names = request.upsamplers
    baseline = "bilinear" if "bilinear" in names else names[0]
    overrides = [
        part for text in request.overrides for part in ("--override", _absolute(text, stage))
    ]
    job = _command("sweep", str(file), "--upsamplers", *names, "--baseline", baseline, *overrides)
    return replace(job, name="gain")


def _command(name: str, *arguments: str) -> Job:
    """Return a job of one process that runs a command of ``radio-distill``."""
    task = Task(arguments=(name, *arguments))
    return Job(name=name, tasks=(task,), is_stage=False)


def private_folder(folder: Path) -> Path:
    """Make the folder of a chain; raises ConfigError where others can look into it."""
    folder = folder.absolute()
    try:
        make_private(folder)
    except OSError as error:
        raise ConfigError(
            f"cannot make {folder}: {reason_of(error)}; choose another --folder"
        ) from error
    if folder.stat().st_mode & 0o077:
        raise ConfigError(
            f"{folder} is open to other users, and what lies in it is run; chmod 700 it, or choose "
            "another --folder"
        )
    return folder


def write_chain(folder: Path, chain: Chain) -> None:
    """Replace the file of a chain."""
    with replacing(folder / CHAIN) as temporary:
        temporary.write_text(json.dumps(asdict(chain), indent=1) + "\n", encoding="utf-8")


def read_chain(folder: Path) -> Chain | None:
    """Return the chain of a folder, or None where there is none.

    Raises:
        ConfigError: where the file cannot be understood.
    """
    try:
        data = json.loads((folder / CHAIN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {folder / CHAIN}: {reason_of(error)}") from error
    try:
        rows = data["jobs"] if "jobs" in data else data["links"]  # before version 0.2.0
        jobs = tuple(map(_job_from, rows))
        return Chain(jobs=jobs, cluster=load_cluster(before=data["cluster"]))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder / CHAIN} is damaged; remove it, and submit again") from error


def _job_from(data: dict[str, Any]) -> Job:
    tasks = tuple(Task(**{**task, "arguments": tuple(task["arguments"])}) for task in data["tasks"])
    return Job(**{**data, "tasks": tasks})


def find_chain(run: Path) -> tuple[Path, Chain]:
    """Return the folder and the chain of a run, given the run's folder or the chain's own.

    Raises:
        ConfigError: where nothing was submitted from there.
    """
    for folder in (run, run / "slurm"):
        chain = read_chain(folder)
        if chain is not None:
            return folder.absolute(), chain
    raise ConfigError(
        f"{run} has no {CHAIN}: name the folder of a run that was submitted with "
        "`radio-distill slurm RECIPE`"
    )
