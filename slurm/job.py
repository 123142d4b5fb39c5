"""What runs on the nodes: :class:`Call` in each task of a job, :func:`main` in each process.

    python -m slurm.job FOLDER module:function [ARGUMENT ...]

The target is a string, so that submitit's pickle holds no code and submitting imports no stage. A
job that Slurm starts again goes on with ``--resume``: all else that it needs is in the run folder.

On Slurm a task starts its processes by a launcher and outlives them, to note those that die without
a word. With ``srun`` a task is one process; with ``torchrun`` and ``accelerate`` there is one task
on each node, whose launcher starts a process for each GPU. Whether the job queues again is decided
after all tasks, by :mod:`slurm.requeue`; submitit's own requeue is used where there is no Slurm.

A process listens for signals before anything heavy is imported. One that saved because of a signal,
or whose folder was taken over, ends with 0: otherwise its launcher would end the others while they
are still writing. How it ended is in its outcome.
"""

import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from radio_distill.errors import RadioDistillError
from radio_distill.system.redaction import redact
from radio_distill.system.signals import listening, requested
from radio_distill.train.run_dir import FRESH
from slurm.chain import RESUME
from slurm.cluster import Launcher
from slurm.requeue import (
    INTERRUPTED,
    TAKEN_OVER,
    Start,
    note_end,
    note_lost_start,
    note_start,
    read_outcomes,
)

if TYPE_CHECKING:
    from submitit import JobEnvironment
    from submitit.helpers import DelayedSubmission

AGENT_SIGNALS = {"PET_SIGNALS_TO_HANDLE": "SIGINT,SIGHUP,SIGQUIT"}
"""Of torchrun's agent, also inside accelerate: on SIGTERM it would end processes that save."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of ``target`` (``module:function``) with a list of arguments, in every task."""

    target: str
    arguments: tuple[str, ...] = ()
    resumes: bool = True
    """Whether the target takes ``--resume``."""
    name: str = ""
    """Of the job in its chain."""
    folder: str = ""
    """For outcomes and history."""
    launcher: Launcher = "srun"
    processes_per_node: int = 1
    master_address: str = ""
    master_port: int = 0

    def __call__(self) -> None:
        """Run the target in this task.

        Raises:
            RadioDistillError: outside Slurm, where it returns a status other than 0.
            SystemExit: on Slurm, with that status.
        """
        from submitit import JobEnvironment

        environment = JobEnvironment()
        if environment.cluster == "slurm":
            self._supervise(environment)
            return
        os.environ.update(process_environment(environment, port=self.master_port))
        with listening():
            status = call(self.target, self.arguments)
        if status == INTERRUPTED and environment.global_rank == 0:
            # Submitit's handler is in place again; it starts the job anew with `checkpoint()`.
            os.kill(os.getpid(), signal.SIGUSR2)
        if status:
            raise RadioDistillError(f"{self.target} ended with status {status}; see its log")

    def _supervise(self, environment: "JobEnvironment") -> None:
        start, again = Start.of(os.environ), self
        if start.restart:
            again = self.resumed()
            if environment.global_rank == 0:
                note_lost_start(Path(self.folder), self.name, start)
        for number in (signal.SIGUSR2, signal.SIGTERM):
            # Ignored here and in a launcher; the processes that train listen for them anew.
            signal.signal(number, signal.SIG_IGN)
        meeting = meeting_point(environment, self.master_address, self.master_port)
        arguments = [self.folder, self.target, *again.arguments]
        command = launch_command(
            self.launcher, environment, self.processes_per_node, meeting, arguments
        )
        variables = AGENT_SIGNALS
        if self.launcher == "srun":
            variables = process_environment(environment, *meeting)
        if start.restart and self.resumes and RESUME not in self.arguments:
            # It may have been ended before it had claimed the folder, in which an older run lies.
            variables = {**variables, FRESH: "1"}
        status = subprocess.call(command, env={**os.environ, **variables})
        if status:
            self._note_silent(start, environment, status)
            raise SystemExit(status if status > 0 else 128 - status)

    def _note_silent(self, start: Start, environment: "JobEnvironment", status: int) -> None:
        """Note the end of this task's processes that could not do so themselves."""
        folder, ranks = Path(self.folder), {environment.global_rank}
        if self.launcher != "srun":
            first = environment.node * self.processes_per_node
            ranks = set(range(first, first + self.processes_per_node))
            status = -signal.SIGKILL  # all that the launcher tells is that something failed
        for outcome in read_outcomes(folder, start):
            if outcome.rank in ranks and outcome.status is None:
                note_end(folder, start, outcome, status)

    def checkpoint(self) -> "DelayedSubmission":
        """Return what submitit is to start again outside Slurm."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self.resumed())

    def resumed(self) -> "Call":
        """Return this call with ``--resume`` among its arguments, once, where it takes that."""
        if not self.resumes or RESUME in self.arguments:
            return self
        return replace(self, arguments=(*self.arguments, RESUME))


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

    They meet at a host and port, and get the ``arguments`` of :func:`main`.
    """
    host, port = meeting[0], str(meeting[1])
    nodes, node = str(environment.num_nodes), str(environment.node)
    command = ["-m"]
    if launcher == "torchrun":
        command = ["-m", "torch.distributed.run", "--nnodes", nodes, "--node-rank", node]
        command += ["--nproc-per-node", str(processes_per_node)]
        command += ["--master-addr", host, "--master-port", port, "-m"]
    elif launcher == "accelerate":
        total = environment.num_nodes * processes_per_node
        command = ["-m", "accelerate.commands.launch", "--num_machines", nodes]
        command += ["--machine_rank", node, "--num_processes", str(total)]
        command += ["--main_process_ip", host, "--main_process_port", port]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--multi_gpu"] if total > 1 else []
        command += ["--module"]
    return [sys.executable, "-u", *command, "slurm.job", *arguments]


def call(target: str, arguments: Sequence[str]) -> int:
    """Run ``module:function`` with a list of arguments; returns its exit status."""
    module, _, function = target.partition(":")
    return getattr(import_module(module), function)(list(arguments)) or 0


def main(argv: Sequence[str]) -> int:
    """Run a target and note how it ended; returns the exit status of the process."""
    folder, target, *arguments = argv
    start = Start.of(os.environ)
    with listening():
        outcome = note_start(Path(folder), start, int(os.environ.get("RANK", "0")))
        status, reason = 1, ""
        try:
            status = call(target, arguments)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException as error:
            reason = redact(traceback.format_exception_only(error)[-1])
            print(redact(traceback.format_exc()), file=sys.stderr)
        finally:
            note_end(Path(folder), start, outcome, status, reason, requested())
    return 0 if status in (INTERRUPTED, TAKEN_OVER) else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
