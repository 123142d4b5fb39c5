"""What submitit pickles and runs in every process of a job: ``module:main`` with its arguments.

The entry point is a string, so that a pickle holds no code and submitting imports no stage. A job
that reaches its time limit, or that Slurm starts again, goes on with ``--resume``: everything else
it needs is in the run folder.
"""

import os
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING

from radio_distill.errors import RadioDistillError

if TYPE_CHECKING:
    from submitit import JobEnvironment
    from submitit.helpers import DelayedSubmission

RESUME = "--resume"


@dataclass(frozen=True)
class Job:
    """A call of ``target`` (``module:function``) with a list of arguments."""

    target: str
    arguments: tuple[str, ...] = ()

    def __call__(self) -> None:
        """Run the target as one process of the job.

        Raises:
            RadioDistillError: where it returns a status other than 0, so that jobs which wait for
                this one do not start.
        """
        from submitit import JobEnvironment

        # After a node failure Slurm restarts a job by itself, without calling `checkpoint`.
        job = self.resumed() if int(os.environ.get("SLURM_RESTART_COUNT", "0")) else self
        os.environ.update(process_environment(JobEnvironment()))
        module, _, function = job.target.partition(":")
        # SystemExit passes: it is how submitit's signal handler leaves a job that is requeued.
        status = getattr(import_module(module), function)(list(job.arguments))
        if status:
            raise RadioDistillError(f"{self.target} ended with status {status}; see its log")

    def checkpoint(self) -> "DelayedSubmission":
        """Return what submitit is to requeue when the time limit is near."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self.resumed())

    def resumed(self) -> "Job":
        """Return this job with ``--resume`` among its arguments, once."""
        if RESUME in self.arguments:
            return self
        return replace(self, arguments=(*self.arguments, RESUME))


def process_environment(environment: "JobEnvironment") -> dict[str, str]:
    """Return the variables by which torch.distributed finds the other processes of a job."""
    single = environment.num_nodes == 1
    number = int("".join(filter(str.isdigit, environment.job_id)) or 0)
    return {
        "RANK": str(environment.global_rank),
        "WORLD_SIZE": str(environment.num_tasks),
        "LOCAL_RANK": str(environment.local_rank),
        "MASTER_ADDR": "127.0.0.1" if single else environment.hostnames[0],
        # Two jobs on one node must differ; below the range that systems draw client ports from.
        "MASTER_PORT": str(10_000 + number % 20_000),
    }
