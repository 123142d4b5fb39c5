"""Submits the stages of a recipe as a chain of jobs, each of which waits for the one before.

    radio-distill slurm am_radio --partition gpu --nodes 4 --gpus-per-node 8 --dry-run

A job runs one process for each GPU (``srun``), which finds its rank in the environment. Arrays,
hyper-parameter searches and other schedulers are left to submitit itself.
"""

import argparse
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a file: put the checkout, and only it, first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from radio_distill.config import Recipe, load
from radio_distill.errors import ConfigError, RadioDistillError
from radio_distill.registry import nearest
from slurm.cluster import Cluster, add_cluster_flags, cluster_from
from slurm.job import RESUME, Job

if TYPE_CHECKING:
    import submitit

EXECUTORS = ("slurm", "local", "debug")
TAKES_FIELDS = True  # `radio-distill slurm` hands the recipe's fields over in `args.fields`
_RECIPES = Path(__file__).resolve().parents[1] / "stages" / "recipes"


def submit_chain(
    recipe_path: str | Path,
    stages: Sequence[str],
    cluster: Cluster,
    overrides: Sequence[str] = (),
    executor: str = "slurm",
    folder: str | Path | None = None,
    resume: bool = False,
) -> list[str]:
    """Submit ``stages`` one after another and return their job ids.

    On Slurm each job starts when the one before has succeeded. The local and the debug executor
    know no dependencies: each stage is waited for before the next is started.

    Args:
        recipe_path: a recipe's file, or the name of one that comes with the project.
        stages: names of its stages; none for all of them.
        overrides: assignments ``field.name=value``.
        executor: ``slurm``, ``local`` (processes of this machine) or ``debug`` (this process).
        folder: where submitit keeps pickles and logs; None for ``slurm`` in the run folder.
        resume: let every stage go on from its newest checkpoint.

    Raises:
        ConfigError: before anything is submitted, or where Slurm refuses a job.
        RadioDistillError: where a stage that was waited for has failed.
    """
    if executor not in EXECUTORS:
        raise ConfigError(f"unknown executor {executor!r} ({nearest(executor, EXECUTORS)})")
    recipe, jobs = _jobs(recipe_path, stages, overrides, resume)
    if executor == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on the path: run this on the cluster's login node, or take "
            "--executor local, or --dry-run"
        )
    return submit_jobs(jobs, cluster, executor, _private(folder or recipe.folder / "slurm"))


def submit_jobs(jobs: dict[str, Job], cluster: Cluster, executor: str, folder: Path) -> list[str]:
    """Submit named jobs as a chain; see :func:`submit_chain`."""
    job_ids: list[str] = []
    for name, job in jobs.items():
        after = job_ids[-1] if job_ids and executor == "slurm" else ""
        try:
            submitted = _executor(executor, folder, cluster, name, after).submit(job)
        except Exception as error:  # submitit's errors have no common base
            done = f"; already submitted: {', '.join(job_ids)}" if job_ids else ""
            reason = " ".join(str(error).split())
            raise ConfigError(f"{name} could not be submitted: {reason}{done}") from error
        job_ids.append(submitted.job_id)
        if executor != "slurm":
            print(f"{executor} executor: waiting for {name} (job {submitted.job_id}, {folder})")
            _wait(name, submitted)
    return job_ids


def dry_run(
    recipe_path: str | Path,
    stages: Sequence[str],
    cluster: Cluster,
    overrides: Sequence[str] = (),
    folder: str | Path | None = None,
    resume: bool = False,
) -> list[str]:
    """Return the sbatch script of every stage; a job id not known yet is ``STAGE_JOB_ID``."""
    recipe, jobs = _jobs(recipe_path, stages, overrides, resume)
    folder = Path(folder or recipe.folder / "slurm").absolute()
    scripts, before = [], ""
    for name, job in jobs.items():
        script = sbatch_script(folder, sbatch_parameters(cluster, name, before))
        call = shlex.join([job.target, *job.arguments])
        scripts.append(f"# ---- {name}: {call}\n{script}")
        before = f"{name.upper()}_JOB_ID"
    return scripts


def sbatch_parameters(cluster: Cluster, name: str, after: str = "") -> dict[str, Any]:
    """Return submitit's Slurm parameters of one job; ``after`` is the job it waits for."""
    extra = {"requeue": True, **cluster.sbatch}
    if after:
        extra["dependency"] = f"afterok:{after}"
        extra["kill-on-invalid-dep"] = "yes"  # else the rest of a failed chain waits for ever
    values = {
        "job_name": name,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.tasks_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        "gpus_per_node": cluster.gpus_per_node or None,
        "mem": f"{cluster.memory_gb}GB" if cluster.memory_gb else None,
        "time": cluster.time_minutes,
        "signal_delay_s": cluster.signal_delay_s,
        "setup": list(cluster.setup) or None,
        # srun takes the cores of a task from sbatch no longer, since Slurm 22.05.
        "srun_args": [f"--cpus-per-task={cluster.cpus_per_task}"],
        "additional_parameters": extra,
    }
    for field in ("partition", "account", "qos", "constraint", "exclude"):
        values[field] = getattr(cluster, field) or None
    return {key: value for key, value in values.items() if value is not None}


def sbatch_script(folder: Path, parameters: dict[str, Any]) -> str:
    """Return the text that submitit would hand to sbatch; works without a cluster.

    The only use of a private function of submitit.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    command = (
        f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    )
    return str(_make_sbatch_string(command=command, folder=folder, **parameters))


def _executor(
    kind: str, folder: Path, cluster: Cluster, name: str, after: str
) -> "submitit.Executor":
    import submitit

    if kind == "debug":
        return submitit.DebugExecutor(folder)
    if kind == "slurm":
        executor = submitit.SlurmExecutor(folder, max_num_timeout=cluster.max_requeues)
        executor.update_parameters(**sbatch_parameters(cluster, name, after))
        return executor
    executor = submitit.LocalExecutor(folder, max_num_timeout=cluster.max_requeues)
    executor.update_parameters(
        nodes=cluster.nodes,
        tasks_per_node=cluster.tasks_per_node,
        gpus_per_node=cluster.gpus_per_node,
        timeout_min=cluster.time_minutes,
        signal_delay_s=cluster.signal_delay_s,
        setup=cluster.setup,
    )
    return executor


def _wait(name: str, job: "submitit.Job[None]") -> None:
    try:
        job.results()
    except Exception as error:  # what the stage raised, in submitit's wrapping
        raise RadioDistillError(
            f"{name} (job {job.job_id}) failed, and the stages after it were not started; "
            f"see {job.paths.stderr}"
        ) from error


def _jobs(
    recipe_path: str | Path, stages: Sequence[str], overrides: Sequence[str], resume: bool
) -> tuple[Recipe, dict[str, Job]]:
    """Check the recipe as every stage will read it, and make the jobs."""
    file = _find(str(recipe_path))
    recipe = load(file, [item for item in overrides if not item.startswith("stage.")])
    stages = list(stages) or list(recipe.stages)
    for stage in stages:
        if stage not in recipe.stages:
            raise ConfigError(
                f"recipe {recipe.name!r} has no {stage} ({nearest(stage, list(recipe.stages))})"
            )
        load(file, overrides, stage)
    arguments = ["--recipe", str(file.absolute())]
    arguments += [f"--{item}" for item in overrides] + [RESUME] * resume
    return recipe, {stage: Job(f"stages.{stage}:main", tuple(arguments)) for stage in stages}


def _find(name: str) -> Path:
    """Find a recipe as the stages do, of which nothing is imported here."""
    shipped = {path.stem: path for path in _RECIPES.glob("*.yaml")}
    if name in shipped or Path(name).is_file():
        return shipped.get(name, Path(name))
    raise ConfigError(f"no recipe {name!r} ({nearest(name, list(shipped))})")


def _private(folder: str | Path) -> Path:
    """Make the folder for submitit's pickles, which run when a job is requeued: ours alone."""
    folder = Path(folder).absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make {folder}: {error.strerror}; choose another --folder"
        ) from error
    if folder.stat().st_mode & 0o077:
        raise ConfigError(
            f"{folder} is open to other users, and what lies in it is run; chmod 700 it, or choose "
            "another --folder"
        )
    return folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``radio-distill slurm`` takes besides the fields of the recipe."""
    parser.add_argument("recipe", help="name or file")
    parser.add_argument("--stages", nargs="+", default=[], metavar="STAGE", help="default: all")
    parser.add_argument("--cluster", metavar="FILE", help="YAML file with the fields named below")
    parser.add_argument(
        "--teacher-upsampler", metavar="NAME", help="upsampler of stage 3's upsampled teachers"
    )
    parser.add_argument("--executor", choices=EXECUTORS, default="slurm")
    parser.add_argument("--folder", metavar="DIR", help="job files and logs (default: RUN/slurm)")
    parser.add_argument("--output", metavar="DIR", help="folder for run folders (default: runs)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoints")
    parser.add_argument("--dry-run", action="store_true", help="only print the sbatch scripts")
    add_cluster_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Submit, or print with ``--dry-run``; ``args.fields`` holds ``field.name=value`` texts."""
    cluster = cluster_from(args, args.cluster)
    overrides = [f"output={args.output}"] if args.output else []
    if args.teacher_upsampler:
        overrides.append(f"stages.stage3.upsampler.name={args.teacher_upsampler}")
    overrides += args.fields
    common = (args.recipe, args.stages, cluster, overrides)
    if args.dry_run:
        print("\n\n".join(dry_run(*common, folder=args.folder, resume=args.resume)))
        return 0
    job_ids = submit_chain(*common, args.executor, args.folder, args.resume)
    print("jobs: " + " -> ".join(job_ids))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="slurm/launch.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add_arguments(parser)
    args, rest = parser.parse_known_args(argv)
    try:
        args.fields = list(_fields(rest, parser))
        return run(args)
    except RadioDistillError as error:
        print(f"radio-distill: {error}", file=sys.stderr)
        return 2


def _fields(rest: Sequence[str], parser: argparse.ArgumentParser) -> Iterator[str]:
    for item in rest:
        if not item.startswith("--") or "=" not in item:
            flags = [flag for action in parser._actions for flag in action.option_strings]
            raise ConfigError(f"unknown argument {item!r} ({nearest(item, flags)})")
        yield item[2:]


if __name__ == "__main__":
    sys.exit(main())
