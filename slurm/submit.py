"""Hands the jobs of a chain to Slurm, or runs them here one after another."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from radio_distill.errors import ConfigError, RadioDistillError
from radio_distill.system.files import reason_of

from .chain import Chain, Link, Task, private_folder, write_chain
from .cluster import Cluster
from .job import Job
from .script import local_executor, sbatch_parameters, sbatch_script, slurm_executor

if TYPE_CHECKING:
    import submitit


def submit(folder: Path, chain: Chain) -> Chain:
    """Submit every task that has no id yet; returns the chain with the ids.

    Each job starts when the one before has succeeded.

    Raises:
        ConfigError: where there is no Slurm, or it refuses a job.
    """
    require_slurm()
    folder, after = private_folder(folder), ""
    write_chain(folder, chain)  # a job may start, and read it, before the next one is submitted
    for link in chain.links:
        if all(task.job_id for task in link.tasks):
            continue
        try:
            link, after = _submit_link(folder, chain.cluster, link, after)
        except Exception as error:  # submitit's errors have no common base
            raise ConfigError(_refusal(chain, link, error)) from error
        chain = chain.with_link(link)
        write_chain(folder, chain)
    return chain


def require_slurm() -> None:
    """Raise ConfigError where nothing can be submitted from."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on the path: run this on the cluster's login node, or take "
            "--executor local, or --dry-run"
        )


def _submit_link(folder: Path, settings: Cluster, link: Link, after: str) -> tuple[Link, str]:
    """Submit those tasks of a job that have no id; returns it with the ids, and the new job's."""
    cluster = link.cluster(settings)
    pending = [task for task in link.tasks if not task.job_id]
    parameters = sbatch_parameters(cluster, link.name, folder, after, len(pending))
    executor = slurm_executor(folder, cluster, parameters)
    jobs = executor.submit_array([job_of(folder, cluster, link, task) for task in pending])
    numbers = iter([job.job_id for job in jobs])
    tasks = [task if task.job_id else replace(task, job_id=next(numbers)) for task in link.tasks]
    return replace(link, tasks=tuple(tasks)), jobs[0].job_id.partition("_")[0]


def _refusal(chain: Chain, link: Link, error: Exception) -> str:
    known = [number for other in chain.links for number in other.job_ids if number]
    done = f"; already submitted: {', '.join(known)}" if known else ""
    return f"{link.name} could not be submitted: {reason_of(error)}{done}"


def job_of(folder: Path, cluster: Cluster, link: Link, task: Task) -> Job:
    """Return what submitit runs for a task."""
    return Job(
        target=link.target,
        arguments=task.arguments,
        resumes=link.is_stage,
        name=link.name,
        folder=str(folder),
        launcher=cluster.launcher,
        processes_per_node=cluster.processes_per_node,
        master_address=cluster.master_address,
        master_port=cluster.master_port,
    )


def run_here(folder: Path, chain: Chain, executor: str) -> list[str]:
    """Run a chain on this machine with submitit's local or debug executor; returns the job ids.

    These know no dependencies: each job is waited for before the next is started.

    Raises:
        ConfigError: where one cannot be started.
        RadioDistillError: where one has failed; those after it are not started.
    """
    folder, job_ids = private_folder(folder), []
    for link in chain.links:
        cluster = link.cluster(chain.cluster)
        for task in link.tasks:
            name = f"{link.name} {task.label}".strip()
            try:
                submitted = _executor(executor, folder, cluster).submit(
                    job_of(folder, cluster, link, task)
                )
            except Exception as error:
                raise ConfigError(_refusal(chain, link, error)) from error
            job_ids.append(submitted.job_id)
            print(f"{executor} executor: waiting for {name} (job {submitted.job_id}, {folder})")
            _wait(name, submitted)
    return job_ids


def _executor(kind: str, folder: Path, cluster: Cluster) -> "submitit.Executor":
    import submitit

    return submitit.DebugExecutor(folder) if kind == "debug" else local_executor(folder, cluster)


def _wait(name: str, job: "submitit.Job[None]") -> None:
    try:
        job.results()
    except Exception as error:  # what the stage raised, in submitit's wrapping
        raise RadioDistillError(
            f"{name} (job {job.job_id}) failed, and the jobs after it were not started; "
            f"see {job.paths.stderr}"
        ) from error


def scripts(folder: Path, chain: Chain) -> list[str]:
    """Return every job's sbatch script; a job id not known yet is ``STAGE_JOB_ID``."""
    folder, texts, after = folder.absolute(), [], ""
    for link in chain.links:
        cluster, count = link.cluster(chain.cluster), len(link.tasks)
        parameters = sbatch_parameters(cluster, link.name, folder, after, count)
        calls = [
            f"# ---- {link.name}{f' {task.label}' if task.label else ''}: "
            + shlex.join([link.target, *task.arguments])
            for task in link.tasks
        ]
        texts.append("\n".join([*calls, sbatch_script(folder, cluster, parameters, count)]))
        after = f"{link.name.upper()}_JOB_ID"
    return texts
