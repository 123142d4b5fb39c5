"""The sbatch script of a job: its resources, its processes, and what runs after them.

The last lines of each script hand over to :mod:`slurm.aftermath`. The batch shell must live until
then: a preemption, a requeue, a cancellation and the time limit send it SIGTERM too.
"""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cluster import Cluster

if TYPE_CHECKING:
    import submitit

_AFTERMATH = Path(__file__).with_name("aftermath.py")
_ROOM_TO_KILL = 240  # seconds of signal_delay_s from which on srun gets a time limit of its own


def sbatch_parameters(
    cluster: Cluster, name: str, folder: Path, after: str = "", tasks: int = 1
) -> dict[str, Any]:
    """Return submitit's Slurm parameters of one job.

    Args:
        cluster: what it asks for.
        name: of the job.
        folder: of the chain.
        after: id of the job that it waits for.
        tasks: more than 1 for an array.
    """
    extra = {"requeue": True, **cluster.sbatch}
    if after:
        extra["dependency"] = f"afterok:{after}"
        extra["kill-on-invalid-dep"] = "yes"  # else the rest of a failed chain waits for ever
    processes = cluster.processes_per_node // cluster.tasks_per_node
    values = {
        "job_name": name,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.tasks_per_node,
        "cpus_per_task": cluster.cpus_per_task * processes,
        "gpus_per_node": cluster.gpus_per_node or None,
        "mem": f"{cluster.memory_gb}GB" if cluster.memory_gb else None,
        "time": cluster.time_minutes,
        "signal_delay_s": cluster.signal_delay_s,
        "setup": setup_lines(cluster),
        "teardown": teardown_lines(folder, name),
        "srun_args": srun_arguments(cluster),
        "array_parallelism": cluster.max_running if tasks > 1 else None,
        "additional_parameters": extra,
    }
    for field in ("partition", "account", "qos", "constraint", "exclude"):
        values[field] = getattr(cluster, field) or None
    return {key: value for key, value in values.items() if value is not None}


def srun_arguments(cluster: Cluster) -> list[str]:
    """Return what srun is told besides what submitit tells it."""
    processes = cluster.processes_per_node // cluster.tasks_per_node
    # srun takes the cores of a task from sbatch no longer, since Slurm 22.05.
    arguments = [f"--cpus-per-task={cluster.cpus_per_task * processes}", "--kill-on-bad-exit=1"]
    if cluster.signal_delay_s >= _ROOM_TO_KILL:
        # Processes that do not obey the signal end before the job does, which can then requeue.
        seconds = 60 * cluster.time_minutes - cluster.signal_delay_s // 2
        arguments.append(f"--time={seconds // 60}:{seconds % 60:02}")
    if cluster.container_image:
        arguments.append(f"--container-image={cluster.container_image}")
    if cluster.container_mounts:
        arguments.append(f"--container-mounts={','.join(cluster.container_mounts)}")
    if cluster.container_workdir:
        arguments.append(f"--container-workdir={cluster.container_workdir}")
    return [*arguments, *cluster.srun]


def setup_lines(cluster: Cluster) -> list[str]:
    """Return the shell lines before srun."""
    exports = [f"export {key}={shlex.quote(text)}" for key, text in cluster.environment.items()]
    # Without the trap the shell would be gone when srun is; -e would end it as well.
    return [*exports, *cluster.setup, "trap 'ENDING=--ending' TERM", "set +e"]


def teardown_lines(folder: Path, name: str) -> list[str]:
    """Return the shell lines after srun."""
    call = shlex.join([sys.executable, str(_AFTERMATH), str(folder), name])
    return ["STATUS=$?", "trap '' TERM", f"{call} $STATUS $ENDING", "exit $?"]


def interpreter(cluster: Cluster) -> str:
    """Return the interpreter of a job's processes, as the shell is to read it."""
    return shlex.quote(cluster.python or sys.executable)


def sbatch_script(folder: Path, cluster: Cluster, parameters: dict[str, Any], tasks: int) -> str:
    """Return the text that submitit would hand to sbatch; works without a cluster.

    The only use of a private function of submitit.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    count = tasks if tasks > 1 else None
    command = f"{interpreter(cluster)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    text = _make_sbatch_string(command=command, folder=folder, map_count=count, **parameters)
    return str(text)


def slurm_executor(
    folder: Path, cluster: Cluster, parameters: dict[str, Any]
) -> "submitit.Executor":
    """Return submitit's executor for a job on Slurm."""
    import submitit

    executor = submitit.SlurmExecutor(folder, python=interpreter(cluster))
    executor.update_parameters(**parameters)
    return executor


def local_executor(folder: Path, cluster: Cluster) -> "submitit.Executor":
    """Return submitit's executor for a job of processes on this machine."""
    import submitit

    executor = submitit.LocalExecutor(folder, max_num_timeout=cluster.max_requeues)
    executor.update_parameters(
        nodes=cluster.nodes,
        tasks_per_node=cluster.processes_per_node,
        gpus_per_node=cluster.gpus_per_node,
        timeout_min=cluster.time_minutes,
        signal_delay_s=cluster.signal_delay_s,
        setup=(
            *(f"export {key}={shlex.quote(text)}" for key, text in cluster.environment.items()),
            *cluster.setup,
        ),
    )
    return executor
