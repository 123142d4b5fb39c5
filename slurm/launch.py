"""Submits the stages of a recipe as jobs that wait for each other, and looks after them.

The arguments are those of ``radio-distill slurm`` (:mod:`stages.commands.submission` knows recipes
better than anything here may).
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from radio_distill.config import Recipe
from radio_distill.errors import ConfigError
from radio_distill.registry import nearest
from radio_distill.system.trust import FLAG, FLAG_HELP

from . import commands, status
from .chain import Chain, find_chain, ran_here_in, read_chain, was_submitted
from .cluster import Cluster, add_cluster_flags, cluster_from
from .links import Request, links_of, to_resume
from .submit import require_slurm, run_here, scripts, submit

EXECUTORS = ("slurm", "local", "debug")
ACTIONS = ("status", "cancel", "resume")
TAKES_FIELDS = True  # `radio-distill slurm` hands the recipe's fields over in `args.fields`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``radio-distill slurm`` takes besides the fields of the recipe."""
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
    add("--output", metavar="DIR", help="folder for run folders (default: runs)")
    add("--resume", action="store_true", help="go on from the newest checkpoints")
    add(
        "--take-over",
        action="store_true",
        help="let stages take their folders from runs that are going on; those stop",
    )
    add(FLAG, action="store_true", help=FLAG_HELP)
    add("--dry-run", action="store_true", help="only print the sbatch scripts")
    add_cluster_flags(parser)


Prepare = Callable[[Request, Cluster], Request]
"""Looks at a request before its jobs are submitted: adds fits, or raises ConfigError."""


def run(args: argparse.Namespace, prepare: Prepare = lambda request, _: request) -> int:
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
    return _submit(args, prepare)


def request_from(args: argparse.Namespace) -> Request:
    """Return what the command line asks for."""
    overrides = [f"output={args.output}"] if args.output else []
    if args.teacher_upsampler:
        overrides.append(f"stages.stage3.upsampler.name={args.teacher_upsampler}")
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


def _submit(args: argparse.Namespace, prepare: Prepare) -> int:
    request = request_from(args)
    recipe, links = links_of(request)
    chain = Chain(links=links, cluster=cluster_from(args, args.cluster))
    folder = _folder(args, recipe)
    submits = args.executor == "slurm" and not args.dry_run
    if submits:
        require_slurm()
        earlier = read_chain(folder)
        if earlier is not None:
            _refuse_alive(folder, earlier)
    _, links = links_of(prepare(request, chain.cluster))
    chain = replace(chain, links=links)
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
    names = (f"{link.name} {'+'.join(link.job_ids)}" for link in chain.links)
    print("jobs: " + " -> ".join(names))
    print(f"`radio-distill slurm status {_run_of(folder)}` shows how they are doing")


def _run_of(folder: Path) -> Path:
    return folder.parent if folder.name == "slurm" else folder


def _refuse_alive(folder: Path, chain: Chain) -> None:
    """Raise ConfigError while jobs of a chain wait or run: two would write into one folder."""
    alive = [f"{row.name} {row.job_id}" for row in status.rows_of(folder, chain) if row.alive]
    if alive:
        raise ConfigError(
            f"{_run_of(folder)} has jobs that are not over ({', '.join(alive)}): wait for them, or "
            f"cancel them first with `radio-distill slurm cancel {_run_of(folder)}`"
        )


def _status(args: argparse.Namespace) -> int:
    if was_submitted(args.run):
        status.print_rows(status.rows_of(*find_chain(args.run)))
        return 0
    rows, ran_here = status.rows_here(args.run), ran_here_in(args.run)
    if not rows and ran_here is None:
        find_chain(args.run)  # raises
    how = f"its jobs run on this machine, see {ran_here}" if ran_here else "nothing was submitted"
    print(f"{args.run} has no jobs in Slurm ({how}); what its stages say:")
    if rows:
        status.print_rows(rows, "state")
    else:
        print("nothing yet: no stage has begun to train")
    return 0


def _cancel(args: argparse.Namespace) -> int:
    alive = [row for row in status.rows_of(*find_chain(args.run)) if row.alive]
    if not alive:
        print("no job is left to cancel")
        return 0
    commands.cancel([row.job_id for row in reversed(alive)])
    print("cancelled: " + ", ".join(f"{row.name} {row.job_id}" for row in alive))
    return 0


def _resume(args: argparse.Namespace) -> int:
    folder, chain = find_chain(args.run)
    require_slurm()
    _refuse_alive(folder, chain)
    complete = {row.job_id for row in status.rows_of(folder, chain) if row.complete}
    links = to_resume(chain.links, complete, args.take_over)
    if all(task.job_id for link in links for task in link.tasks):
        print("every job is complete")
        return 0
    cluster = cluster_from(args, args.cluster, asdict(chain.cluster))
    _report(folder, submit(folder, Chain(links=links, cluster=cluster)))
    return 0
