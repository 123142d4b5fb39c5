"""Submit the stages of a recipe to Slurm as jobs that wait for each other, then export and scores.

    radio-distill slurm am_radio --partition gpu --nodes 4 --gpus-per-node 8 --dry-run
    radio-distill slurm am_radio --cluster my_cluster.yaml
    radio-distill slurm demo --stages stage3 --upsamplers bilinear tile s2 --max-running 2
    radio-distill slurm demo --stages stage3 --sweep stage.learning_rate=1e-3,3e-4

    radio-distill slurm status RUN     how each job is doing, and why it stopped last
    radio-distill slurm cancel RUN     end all jobs that are not over
    radio-distill slurm resume RUN     submit what is not complete again

RUN is the run folder. A job that is told to stop saves, queues again and goes on; one that crashed
is tried again on other nodes. docs/slurm.md says what happens when. A recipe that is called
`status`, `cancel` or `resume` must be named by its path.

Before anything is submitted it is made sure that the recipe can run: shards, weights, fitted
upsamplers, what scores need. Upsamplers that are not fitted yet are fitted by jobs of their own.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from radio_distill.config import Recipe, by_student, for_stage
from radio_distill.config.recipes import find_recipe
from radio_distill.errors import ConfigError
from radio_distill.registry import nearest
from radio_distill.stage import Stage
from radio_distill.system.files import reason_of
from radio_distill.system.progress import duration
from radio_distill.system.trust import FLAG, FLAG_HELP
from slurm import scontrol
from slurm.chain import (
    Chain,
    Fit,
    Request,
    Variant,
    find_chain,
    jobs_of,
    read_chain,
    to_resume,
    variants_of,
)
from slurm.cluster import Cluster, add_cluster_flags, cluster_from
from slurm.status import print_rows, rows_here, rows_of
from slurm.submit import require_slurm, run_here, scripts, submit

from ..arguments import add_run_folder_argument
from ..fits import FITTED, SET_BY_FIT, Need, fit_name, fit_words, is_shipped, needs_of, upsampler_of
from ..recipes import Asked, describe_stage

EXECUTORS = ("slurm", "local", "debug")
ACTIONS = ("status", "cancel", "resume")
TAKES_FIELDS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill slurm``."""
    add = parser.add_argument
    add("recipe", help=f"name or file of a recipe; or {', '.join(ACTIONS)} and then a run folder")
    add("run", nargs="?", type=Path, help="run folder, behind status, cancel and resume")
    add("--stages", nargs="+", default=[], metavar="STAGE", help="default: all")
    add("--no-export", action="store_true", help="do not export the student behind the last stage")
    add("--no-eval", action="store_true", help="do not score the student behind the last stage")
    add("--teacher-upsampler", metavar="NAME", help="upsampler of stage 3's upsampled teachers")
    add(
        "--upsamplers",
        nargs="+",
        default=[],
        metavar="NAME",
        help="sweep: stage 3 once for each of them, at the same time, then their gain table",
    )
    add(
        "--sweep",
        default="",
        metavar="FIELD=VALUE,...",
        help="sweep: the last stage once for each value, each in a run folder of its own",
    )
    add("--cluster", metavar="FILE", help="YAML file with the fields named below")
    add("--executor", choices=EXECUTORS, default="slurm", help="default: slurm")
    add("--folder", metavar="DIR", type=Path, help="job files and logs (default: RUN/slurm)")
    add_run_folder_argument(parser)
    add("--resume", action="store_true", help="go on from the newest checkpoints")
    add(
        "--take-over",
        action="store_true",
        help="let stages take their folders from runs that are going on; those stop",
    )
    add(FLAG, action="store_true", help=FLAG_HELP)
    add(
        "--skip-check",
        action="store_true",
        help="submit although something is missing here that only the jobs' nodes have",
    )
    add("--dry-run", action="store_true", help="only print the sbatch scripts")
    add_cluster_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Submit, or look after what was submitted; ``args.fields`` are ``field.name=value`` texts."""
    if args.recipe in ACTIONS:
        if args.run is None:
            raise ConfigError(f"name the run folder: radio-distill slurm {args.recipe} RUN")
        return {"status": _status, "cancel": _cancel, "resume": _resume}[args.recipe](args)
    if args.run is not None:
        raise ConfigError(
            f"{args.recipe!r} is followed by {str(args.run)!r}, but only status, cancel and resume "
            f"take a run folder ({nearest(args.recipe, list(ACTIONS))})"
        )
    return _submit(args)


def request_from(args: argparse.Namespace) -> Request:
    """Return what the command line asks for."""
    name = args.teacher_upsampler
    overrides = [f"stages.stage3.upsampler.name={name}"] if name else []
    return Request(
        recipe=args.recipe,
        stages=tuple(args.stages),
        overrides=(*overrides, *args.fields),
        upsamplers=tuple(args.upsamplers),
        sweep=args.sweep,
        export=not args.no_export,
        evaluate=not args.no_eval,
        resume=args.resume,
        take_over=args.take_over,
        trust=args.trust_checkpoint,
    )


def _submit(args: argparse.Namespace) -> int:
    request = request_from(args)
    recipe, jobs = jobs_of(request)
    chain = Chain(jobs=jobs, cluster=cluster_from(args, args.cluster))
    folder = _folder(args, recipe)
    submits = args.executor == "slurm" and not args.dry_run
    if submits:
        require_slurm()
        earlier = read_chain(folder)
        if earlier is not None:
            _refuse_alive(folder, earlier)
    refuses = not (args.skip_check or args.dry_run)
    _, jobs = jobs_of(prepare(request, chain.cluster, refuses))
    chain = replace(chain, jobs=jobs)
    if args.dry_run:
        print("\n\n".join(scripts(folder, chain)))
    elif submits:
        _report(folder, submit(folder, chain))
    else:
        print("jobs: " + " -> ".join(run_here(folder, chain, args.executor)))
    return 0


def _folder(args: argparse.Namespace, recipe: Recipe) -> Path:
    return (args.folder or recipe.folder / "slurm").absolute()


def _report(folder: Path, chain: Chain) -> None:
    names = (f"{job.name} {'+'.join(job.job_ids)}" for job in chain.jobs)
    print("jobs: " + " -> ".join(names))
    print(f"`radio-distill slurm status {_run_of(folder)}` shows how they are doing")


def _run_of(folder: Path) -> Path:
    return folder.parent if folder.name == "slurm" else folder


def _refuse_alive(folder: Path, chain: Chain) -> None:
    """Raise ConfigError while jobs of a chain wait or run: two would write into one folder."""
    alive = [f"{row.name} {row.job_id}" for row in rows_of(folder, chain) if row.alive]
    if alive:
        raise ConfigError(
            f"{_run_of(folder)} has jobs that are not over ({', '.join(alive)}): wait for them, or "
            f"cancel them first with `radio-distill slurm cancel {_run_of(folder)}`"
        )


def _status(args: argparse.Namespace) -> int:
    rows, folder = rows_here(args.run), args.run / "slurm"
    if read_chain(args.run) or read_chain(folder) or not (rows or folder.is_dir()):
        print_rows(rows_of(*find_chain(args.run)))
        return 0
    here = f"its jobs run on this machine, see {folder}"
    how = here if folder.is_dir() else "nothing was submitted"
    print(f"{args.run} has no jobs in Slurm ({how}); what its stages say:")
    if rows:
        print_rows(rows, "state")
    else:
        print("nothing yet: no stage has begun to train")
    return 0


def _cancel(args: argparse.Namespace) -> int:
    alive = [row for row in rows_of(*find_chain(args.run)) if row.alive]
    if not alive:
        print("no job is left to cancel")
        return 0
    scontrol.cancel([row.job_id for row in reversed(alive)])
    print("cancelled: " + ", ".join(f"{row.name} {row.job_id}" for row in alive))
    return 0


def _resume(args: argparse.Namespace) -> int:
    folder, chain = find_chain(args.run)
    require_slurm()
    _refuse_alive(folder, chain)
    complete = {row.job_id for row in rows_of(folder, chain) if row.complete}
    jobs = to_resume(chain.jobs, complete, args.take_over)
    if all(task.job_id for job in jobs for task in job.tasks):
        print("every job is complete")
        return 0
    cluster = cluster_from(args, args.cluster, asdict(chain.cluster))
    _report(folder, submit(folder, Chain(jobs=jobs, cluster=cluster)))
    return 0


def prepare(request: Request, cluster: Cluster, refuses: bool) -> Request:
    """Look up what the jobs of a request need, say what they cost, and add the fits before them.

    What is missing is named, and a ConfigError where it ``refuses``.
    """
    variants = variants_of(request)
    missing, notes, fits, fitted = look_up(request, variants)
    if missing and refuses:
        raise ConfigError(
            *missing,
            "nothing is submitted; --no-eval leaves the scores out, and --skip-check submits where "
            "only the jobs' nodes have what is missing",
        )
    for line in (*(f"missing here: {line}" for line in missing), *notes):
        _say(line)
    for stage in dict.fromkeys(fit.before for fit in fits):
        labels = [fit.label for fit in fits if fit.before == stage]
        _say(f"fitted before {stage}: {', '.join(labels)}")
    _say(cost_of(request, variants, cluster))
    return replace(request, fits=fits, fitted=fitted)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def look_up(
    request: Request, variants: Sequence[Variant]
) -> tuple[list[str], list[str], tuple[Fit, ...], tuple[str, ...]]:
    """Return what the variants of a recipe lack, notes, and ``fits`` and ``fitted`` to request."""
    from .missing import find_missing

    shared = _shared_by_sweep(request, variants)
    missing: dict[str, None] = {}
    notes: dict[str, None] = {}
    fits: dict[str, Fit] = {}
    for variant in (*variants, *([shared] if shared else [])):
        is_last = variant.stage == variants[-1].stage
        found = find_missing(
            variant.recipe,
            Asked(str(request.recipe), variant.overrides),
            [variant.stage],
            scores=is_last and _is_scored(request),
            before=variant.before,
        )
        missing |= dict.fromkeys(found.missing)
        notes |= dict.fromkeys(found.notes)
        if shared is None or not is_last or variant is shared:
            for need in found.unfitted.values():
                made = _fit(request, variant, need)
                fits.setdefault(made.folder, made)
    fitted = _assignments(shared) if shared else ()
    return list(missing), list(notes), tuple(fits.values()), fitted


def _is_scored(request: Request) -> bool:
    return bool(request.upsamplers) or (request.evaluate and not request.sweep)


def _shared_by_sweep(request: Request, variants: Sequence[Variant]) -> Variant | None:
    """Return the recipe whose fitted upsamplers serve every value of a sweep over a field.

    None where there is no such sweep, or where it changes what is fitted.
    """
    if not request.sweep:
        return None
    base = variants_of(replace(request, sweep=""))[-1]
    fits = [
        [(need.teacher, need.views, need.fit) for need in needs_of(_stage(item))]
        for item in (base, *(item for item in variants if item.stage == base.stage))
    ]
    return base if fits[0] and all(other == fits[0] for other in fits[1:]) else None


def _assignments(base: Variant) -> tuple[str, ...]:
    """Return what names the files of a run folder, or of its fits to come, to other run folders."""
    stage = _stage(base)
    files = upsampler_of(stage).weights
    return tuple(
        f"stages.{base.stage}.upsampler.weights.{need.teacher}={(need.folder / FITTED).absolute()}"
        for need in needs_of(stage)
        if need.teacher not in stage.upsampler.weights
        and not is_shipped(files.get(need.teacher, ""))
    )


def _stage(variant: Variant) -> Stage:
    return describe_stage(variant.recipe, variant.stage)


def _fit(request: Request, variant: Variant, need: Need) -> Fit:
    recipe, config = variant.recipe, need.fit
    asked = Asked(str(find_recipe(str(request.recipe)).absolute()), variant.overrides)
    words = [asked.recipe, *fit_words(recipe, config), *asked.flags(*SET_BY_FIT)]
    return Fit(
        before=variant.stage,
        label=fit_name(config),
        arguments=tuple(words),
        folder=str(need.folder.absolute()),
        most_processes=config.batch_size,
    )


def cost_of(request: Request, variants: Sequence[Variant], cluster: Cluster) -> str:
    """Say in a line what the stages of a request cost, as ``radio-distill plan`` reckons."""
    devices = cluster.nodes * cluster.processes_per_node
    kind = "h100" if cluster.gpus_per_node else "cpu"
    try:
        hours = hours_of(variants, devices, kind, one_for_all=bool(request.sweep))
    except Exception as error:  # a teacher of one's own may not run on tensors without data
        return f"cost: not known ({type(error).__name__}: {reason_of(error)})"
    stages = ", ".join(f"{name} {duration(3600 * value)}" for name, value in hours.items())
    total = duration(3600 * devices * sum(hours.values()))
    plan = shlex.join(["radio-distill", "plan", str(request.recipe)])
    where = f"{devices} device{'s' * (devices > 1)}"
    return (
        f"cost: {stages} on {where}, which makes {total} of one; a {kind} at 35% of its peak is "
        "assumed, and fits and scores are left out "
        f"(`{plan} --devices {devices} --device TYPE` has the parts)"
    )


def hours_of(
    variants: Sequence[Variant], devices: int, kind: str, one_for_all: bool
) -> dict[str, float]:
    """Return the hours of each stage, of a sweep's of each task, by their names.

    ``one_for_all`` takes the hours of the first task of a sweep for each of them.
    """
    from radio_distill.plan.time import DEVICES

    from ..planning import build_models
    from ..plans import plan_stages

    names = [f"{item.stage} {item.label}".strip() for item in variants]
    first = {item.stage: name for item, name in reversed(list(zip(variants, names, strict=True)))}
    measured = {
        name: (item.stage, for_stage(item.recipe, item.stage).stages[item.stage])
        for item, name in zip(variants, names, strict=True)
        if not one_for_all or name == first[item.stage]
    }
    recipe, device, hours = variants[-1].recipe, DEVICES[kind], dict[str, float]()
    for group in by_student(recipe):
        stages = {name: stage for name, (of, stage) in measured.items() if of in group}
        if not stages:
            continue
        models = build_models(recipe, device.native_dtype, group[0])
        models = replace(models, recipe=replace(models.recipe, stages=stages))
        counts = dict.fromkeys(stages, devices)
        plans = plan_stages(models, counts, device, with_memory=False)
        hours |= {plan.stage.name: plan.hours for plan in plans}
    return {
        name: hours[first[item.stage] if one_for_all else name]
        for item, name in zip(variants, names, strict=True)
    }
