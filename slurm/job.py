"""What submitit pickles and runs as every task of a job: ``module:function`` with its arguments.

The target is a string, so that a pickle holds no code and submitting imports no stage. A job that
Slurm starts again goes on with ``--resume``: everything else it needs is in the run folder.

On Slurm a task watches over the processes that it starts: it outlives them, and notes those that
die without a word. Whether the job queues again is decided after all tasks, by
:mod:`slurm.aftermath`; submitit's own requeue is used where there is no Slurm.
"""

import os
import signal
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from radio_distill.errors import RadioDistillError
from radio_distill.system.signals import listening
from radio_distill.train.run_dir import FRESH

from . import history, outcomes
from .cluster import Launcher
from .decision import INTERRUPTED
from .launchers import AGENT_SIGNALS, launch_command, meeting_point, process_environment
from .worker import call

if TYPE_CHECKING:
    from submitit import JobEnvironment
    from submitit.helpers import DelayedSubmission

RESUME = "--resume"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A call of ``target`` (``module:function``) with a list of arguments."""

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
        else:
            self._run(environment)

    def _run(self, environment: "JobEnvironment") -> None:
        os.environ.update(process_environment(environment, port=self.master_port))
        with listening():
            status = call(self.target, self.arguments)
        if status == INTERRUPTED and environment.global_rank == 0:
            # Submitit's handler is in place again; it starts the job anew with `checkpoint()`.
            os.kill(os.getpid(), signal.SIGUSR2)
        if status:
            raise RadioDistillError(f"{self.target} ended with status {status}; see its log")

    def _supervise(self, environment: "JobEnvironment") -> None:
        place = outcomes.Place.of(os.environ)
        job = self
        if place.restart:
            job = self.resumed()
            if environment.global_rank == 0:
                note_lost_start(Path(self.folder), self.name, place)
        for number in (signal.SIGUSR2, signal.SIGTERM):
            # Ignored here and in a launcher; the processes that train listen for them anew.
            signal.signal(number, signal.SIG_IGN)
        meeting = meeting_point(environment, self.master_address, self.master_port)
        command = launch_command(
            self.launcher,
            environment,
            self.processes_per_node,
            meeting,
            [self.folder, job.target, *job.arguments],
        )
        variables = AGENT_SIGNALS
        if self.launcher == "srun":
            variables = process_environment(environment, *meeting)
        if place.restart and self.resumes and RESUME not in self.arguments:
            # It may have been ended before it had claimed the folder, in which an older run lies.
            variables = {**variables, FRESH: "1"}
        status = subprocess.call(command, env={**os.environ, **variables})
        if status:
            self._note_silent(place, environment, status)
            raise SystemExit(status if status > 0 else 128 - status)

    def _note_silent(
        self, place: outcomes.Place, environment: "JobEnvironment", status: int
    ) -> None:
        """Note the end of this task's processes that could not do so themselves."""
        folder, ranks = Path(self.folder), {environment.global_rank}
        if self.launcher != "srun":
            first = environment.node * self.processes_per_node
            ranks = set(range(first, first + self.processes_per_node))
            status = -signal.SIGKILL  # all that the launcher tells is that something failed
        for outcome in outcomes.read(folder, place):
            if outcome.rank in ranks and outcome.status is None:
                outcomes.end(folder, place, outcome, status)

    def checkpoint(self) -> "DelayedSubmission":
        """Return what submitit is to start again outside Slurm."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self.resumed())

    def resumed(self) -> "Job":
        """Return this job with ``--resume`` among its arguments, once, where it takes that."""
        if not self.resumes or RESUME in self.arguments:
            return self
        return replace(self, arguments=(*self.arguments, RESUME))


def note_lost_start(folder: Path, name: str, place: outcomes.Place) -> None:
    """Note a start of a job whose batch script could not: its node was lost or it was killed."""
    before = place.restart - 1
    known = {(stop.job, stop.restart) for stop in history.read(folder)}
    if (place.job, before) not in known:
        reason = "Slurm had it queue again: its node was lost, or it was killed at once"
        stop = history.Stop(name=name, job=place.job, restart=before, kind="left", reason=reason)
        history.append(folder, stop)
