"""Hands the jobs of a chain to Slurm through submitit, or runs them here one after another.

The last lines of each job's script hand over to :mod:`slurm.requeue`. The batch shell must live
until then: a preemption, a requeue, a cancellation and the time limit send it SIGTERM too.
"""

import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radio_distill.errors import ConfigError, RadioDistillError
from radio_distill.system.files import reason_of

from .chain import Chain, Job, Task, private_folder, write_chain
from .cluster import Cluster
from .job import Call

if TYPE_CHECKING:
    import submitit

_REQUEUE = Path(__file__).with_name("requeue.py")
_ROOM_TO_KILL = 240  # seconds of signal_delay_s from which on srun gets a time limit of its own


def submit(folder: Path, chain: Chain) -> Chain:
    """Submit every task that has no id yet; returns the chain with the ids.

    Each job starts when the one before has succeeded.

    Raises:
        ConfigError: where there is no Slurm, or it refuses a job.
    """
    require_slurm()
    folder, after = private_folder(folder), ""
    write_chain(folder, chain)  # a job may start, and read it, before the next one is submitted
    for job in chain.jobs:
        if all(task.job_id for task in job.tasks):
            continue
        try:
            job, after = _submit_job(folder, chain.cluster, job, after)
        except Exception as error:  # submitit's errors have no common base
            raise ConfigError(_refusal(chain, job, error)) from error
        chain = chain.with_job(job)
        write_chain(folder, chain)
    return chain


def require_slurm() -> None:
    """Raise ConfigError where nothing can be submitted from."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on the path: run this on the cluster's login node, or take "
            "--executor local, or --dry-run"
        )


def _submit_job(folder: Path, settings: Cluster, job: Job, after: str) -> tuple[Job, str]:
    """Submit those tasks of a job that have no id; returns it with the ids, and the new job's."""
    import submitit

    cluster = job.cluster(settings)
    pending = [task for task in job.tasks if not task.job_id]
    executor = submitit.SlurmExecutor(folder, python=_interpreter(cluster))
    executor.update_parameters(**sbatch_parameters(cluster, job.name, folder, after, len(pending)))
    submitted = executor.submit_array([call_of(folder, cluster, job, task) for task in pending])
    numbers = iter([one.job_id for one in submitted])
    tasks = [task if task.job_id else replace(task, job_id=next(numbers)) for task in job.tasks]
    return replace(job, tasks=tuple(tasks)), submitted[0].job_id.partition("_")[0]


def _refusal(chain: Chain, job: Job, error: Exception) -> str:
    known = [number for other in chain.jobs for number in other.job_ids if number]
    done = f"; already submitted: {', '.join(known)}" if known else ""
    return f"{job.name} could not be submitted: {reason_of(error)}{done}"


def call_of(folder: Path, cluster: Cluster, job: Job, task: Task) -> Call:
    """Return what submitit runs for a task."""
    return Call(
        target=job.target,
        arguments=task.arguments,
        resumes=job.is_stage,
        name=job.name,
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
    for job in chain.jobs:
        cluster = job.cluster(chain.cluster)
        for task in job.tasks:
            name = f"{job.name} {task.label}".strip()
            try:
                runner = _executor_here(executor, folder, cluster)
                submitted = runner.submit(call_of(folder, cluster, job, task))
            except Exception as error:
                raise ConfigError(_refusal(chain, job, error)) from error
            job_ids.append(submitted.job_id)
            print(f"{executor} executor: waiting for {name} (job {submitted.job_id}, {folder})")
            try:
                submitted.results()
            except Exception as error:  # what the stage raised, in submitit's wrapping
                raise RadioDistillError(
                    f"{name} (job {submitted.job_id}) failed, and the jobs after it were not "
                    f"started; see {submitted.paths.stderr}"
                ) from error
    return job_ids


def _executor_here(kind: str, folder: Path, cluster: Cluster) -> "submitit.Executor":
    import submitit

    if kind == "debug":
        return submitit.DebugExecutor(folder)
    executor = submitit.LocalExecutor(folder, max_num_timeout=cluster.max_requeues)
    executor.update_parameters(
        nodes=cluster.nodes,
        tasks_per_node=cluster.processes_per_node,
        gpus_per_node=cluster.gpus_per_node,
        timeout_min=cluster.time_minutes,
        signal_delay_s=cluster.signal_delay_s,
        setup=[*_exports(cluster), *cluster.setup],
    )
    return executor


def scripts(folder: Path, chain: Chain) -> list[str]:
    """Return every job's sbatch script; a job id not known yet is ``STAGE_JOB_ID``."""
    folder, texts, after = folder.absolute(), [], ""
    for job in chain.jobs:
        cluster, count = job.cluster(chain.cluster), len(job.tasks)
        parameters = sbatch_parameters(cluster, job.name, folder, after, count)
        calls = [
            f"# ---- {job.name}{f' {task.label}' if task.label else ''}: "
            + shlex.join([job.target, *task.arguments])
            for task in job.tasks
        ]
        texts.append("\n".join([*calls, sbatch_script(folder, cluster, parameters, count)]))
        after = f"{job.name.upper()}_JOB_ID"
    return texts


def sbatch_script(folder: Path, cluster: Cluster, parameters: dict[str, Any], tasks: int) -> str:
    """Return the text that submitit would hand to sbatch; works without a cluster.

    The only use of a private function of submitit.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    count = tasks if tasks > 1 else None
    command = f"{_interpreter(cluster)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    text = _make_sbatch_string(command=command, folder=folder, map_count=count, **parameters)
    return str(text)


def sbatch_parameters(
    cluster: Cluster, name: str, folder: Path, after: str = "", tasks: int = 1
) -> dict[str, Any]:
    """Return submitit's Slurm parameters of a job, which waits for the job with the id ``after``.

    With several ``tasks`` it is an array.
    """
    extra = {"requeue": True, **cluster.sbatch}
    if after:
        extra["dependency"] = f"afterok:{after}"
        extra["kill-on-invalid-dep"] = "yes"  # else the rest of a failed chain waits for ever
    # Without the trap the shell would be gone when srun is; -e would end it as well.
    setup = [*_exports(cluster), *cluster.setup, "trap 'ENDING=--ending' TERM", "set +e"]
    requeue = shlex.join([sys.executable, str(_REQUEUE), str(folder), name])
    values = {
        "job_name": name,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.tasks_per_node,
        "cpus_per_task": cluster.cpus_of_task,
        "gpus_per_node": cluster.gpus_per_node or None,
        "mem": f"{cluster.memory_gb}GB" if cluster.memory_gb else None,
        "time": cluster.time_minutes,
        "signal_delay_s": cluster.signal_delay_s,
        "setup": setup,
        "teardown": ["STATUS=$?", "trap '' TERM", f"{requeue} $STATUS $ENDING", "exit $?"],
        "srun_args": _srun_arguments(cluster),
        "array_parallelism": cluster.max_running if tasks > 1 else None,
        "additional_parameters": extra,
    }
    for field in ("partition", "account", "qos", "constraint", "exclude"):
        values[field] = getattr(cluster, field) or None
    return {key: value for key, value in values.items() if value is not None}


def _srun_arguments(cluster: Cluster) -> list[str]:
    """Return what srun is told besides what submitit tells it."""
    # srun takes the cores of a task from sbatch no longer, since Slurm 22.05.
    arguments = [f"--cpus-per-task={cluster.cpus_of_task}", "--kill-on-bad-exit=1"]
    if cluster.signal_delay_s >= _ROOM_TO_KILL:
        # Processes that do not obey the signal end before the job does, which can then requeue.
        seconds = 60 * cluster.time_minutes - cluster.signal_delay_s // 2
        arguments.append(f"--time={seconds // 60}:{seconds % 60:02}")
    container = {
        "image": cluster.container_image,
        "mounts": ",".join(cluster.container_mounts),
        "workdir": cluster.container_workdir,
    }
    arguments += [f"--container-{name}={value}" for name, value in container.items() if value]
    return [*arguments, *cluster.srun]


def _exports(cluster: Cluster) -> list[str]:
    return [f"export {key}={shlex.quote(text)}" for key, text in cluster.environment.items()]


def _interpreter(cluster: Cluster) -> str:
    """Return the interpreter of a job's processes, as the shell is to read it."""
    return shlex.quote(cluster.python or sys.executable)
