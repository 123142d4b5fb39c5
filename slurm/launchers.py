"""The command that starts the processes of one Slurm task.

With ``srun`` a task is one process. With ``torchrun`` and ``accelerate`` there is one task on each
node, whose launcher starts a process for each GPU.
"""

import os
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .cluster import Launcher

if TYPE_CHECKING:
    from submitit import JobEnvironment

WORKER = "slurm.worker"
AGENT_SIGNALS = {"PET_SIGNALS_TO_HANDLE": "SIGINT,SIGHUP,SIGQUIT"}
"""Of torchrun's agent, also inside accelerate: on SIGTERM it would end processes that save."""


def meeting_point(environment: "JobEnvironment", address: str, port: int) -> tuple[str, int]:
    """Return host and port at which all processes of a job meet.

    Args:
        environment: of the job.
        address: the user's choice; empty for the job's first node.
        port: the user's choice; 0 for one made of the job's number, so that two jobs on one node
            differ, and of its restarts, since processes of a lost start may still hold the port.
            It lies below the range that systems draw client ports from.
    """
    number = int("".join(filter(str.isdigit, environment.job_id)) or 0)
    number += 101 * int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return address or _first_node(environment), port or 10_000 + number % 20_000


def _first_node(environment: "JobEnvironment") -> str:
    if environment.num_nodes == 1:
        return "127.0.0.1"
    name = str(environment.hostnames[0])
    try:
        socket.getaddrinfo(name, None)
    except OSError:  # srun was called on the first node, so its address is that one's
        return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", name)
    return name


def process_environment(
    environment: "JobEnvironment", address: str = "", port: int = 0
) -> dict[str, str]:
    """Return the variables by which torch.distributed finds the other processes of a job."""
    host, number = meeting_point(environment, address, port)
    return {
        "RANK": str(environment.global_rank),
        "WORLD_SIZE": str(environment.num_tasks),
        "LOCAL_RANK": str(environment.local_rank),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(number),
    }


def launch_command(
    launcher: Launcher,
    environment: "JobEnvironment",
    processes_per_node: int,
    meeting: tuple[str, int],
    arguments: Sequence[str],
) -> list[str]:
    """Return the command line that starts a node's processes, or this task's one process.

    Args:
        launcher: which one.
        environment: of the job.
        processes_per_node: started on each node.
        meeting: host and port.
        arguments: of :mod:`slurm.worker`.
    """
    python, host, port = [sys.executable, "-u"], meeting[0], str(meeting[1])
    nodes, node = str(environment.num_nodes), str(environment.node)
    if launcher == "torchrun":
        command = ["-m", "torch.distributed.run", "--nnodes", nodes, "--node-rank", node]
        command += ["--nproc-per-node", str(processes_per_node)]
        command += ["--master-addr", host, "--master-port", port]
        return [*python, *command, "-m", WORKER, *arguments]
    if launcher == "accelerate":
        total = environment.num_nodes * processes_per_node
        command = ["-m", "accelerate.commands.launch", "--num_machines", nodes]
        command += ["--machine_rank", node, "--num_processes", str(total)]
        command += ["--main_process_ip", host, "--main_process_port", port]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--multi_gpu"] if total > 1 else []
        return [*python, *command, "--module", WORKER, *arguments]
    return [*python, "-m", WORKER, *arguments]
