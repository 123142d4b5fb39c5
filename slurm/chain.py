"""The jobs of one submission, remembered in ``RUN/slurm/chain.json``.

One folder holds all that belongs to a chain: this file, submitit's pickles and logs, the outcomes
of processes and the history. It is its user's alone, since what lies in it is run.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from radio_distill.errors import ConfigError
from radio_distill.system.files import make_private, reason_of, replacing

from .cluster import Cluster, load_cluster

CHAIN = "chain.json"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One call of a job's target; a job with several is an array."""

    label: str = ""
    """What tells it from the other tasks of an array, for instance ``tile``."""
    arguments: tuple[str, ...] = ()
    stage_folder: str = ""
    """Where the stage writes its status and checkpoints; empty where the job is no stage."""
    job_id: str = ""
    """``41``, or ``41_2`` in an array; empty while it is still to be submitted."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """A job of a chain, which waits for the one before."""

    name: str
    target: str
    """``module:function``."""
    tasks: tuple[Task, ...]
    is_stage: bool = True
    """A stage, or a fit, runs on all nodes and takes ``--resume``; other jobs are one process."""
    most_processes: int = 0
    """That have something to do, of a fit with few images in a step; 0 for any number."""

    def cluster(self, settings: Cluster) -> Cluster:
        """Return the resources of this job."""
        if self.is_stage:
            a_node = settings.processes_per_node
            if not 0 < self.most_processes < settings.nodes * a_node:
                return settings
            gpus = min(settings.gpus_per_node, self.most_processes)
            nodes = max(1, self.most_processes // a_node)
            return replace(settings, nodes=nodes, gpus_per_node=gpus)
        gpus = min(1, settings.gpus_per_node)
        return replace(settings, nodes=1, gpus_per_node=gpus, launcher="srun")

    @property
    def job_ids(self) -> list[str]:
        """Ids of the jobs that its tasks were submitted as: one, or more after a resume."""
        return list(dict.fromkeys(task.job_id.partition("_")[0] for task in self.tasks))


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Jobs in their order, and the settings that all of them share."""

    links: tuple[Link, ...]
    cluster: Cluster = field(default_factory=Cluster)

    def task(self, name: str, job_id: str) -> Task:
        """Return a task by its job's name and its id, which may not be noted yet."""
        tasks = next(link.tasks for link in self.links if link.name == name)
        if job_id in (task.job_id for task in tasks):
            return next(task for task in tasks if task.job_id == job_id)
        return [task for task in tasks if not task.job_id][int(job_id.partition("_")[2] or 0)]

    def with_link(self, changed: Link) -> "Chain":
        """Return the chain with the job of that name replaced."""
        links = tuple(changed if link.name == changed.name else link for link in self.links)
        return replace(self, links=links)


def private_folder(folder: Path) -> Path:
    """Make the folder of a chain; raises ConfigError where others can look into it."""
    folder = folder.absolute()
    try:
        make_private(folder)
    except OSError as error:
        raise ConfigError(
            f"cannot make {folder}: {reason_of(error)}; choose another --folder"
        ) from error
    if folder.stat().st_mode & 0o077:
        raise ConfigError(
            f"{folder} is open to other users, and what lies in it is run; chmod 700 it, or choose "
            "another --folder"
        )
    return folder


def write_chain(folder: Path, chain: Chain) -> None:
    """Replace the file of a chain."""
    with replacing(folder / CHAIN) as temporary:
        temporary.write_text(json.dumps(asdict(chain), indent=1) + "\n", encoding="utf-8")


def read_chain(folder: Path) -> Chain | None:
    """Return the chain of a folder, or None where there is none.

    Raises:
        ConfigError: where the file cannot be understood.
    """
    try:
        data = json.loads((folder / CHAIN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {folder / CHAIN}: {reason_of(error)}") from error
    try:
        links = tuple(map(_link, data["links"]))
        return Chain(links=links, cluster=load_cluster(before=data["cluster"]))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder / CHAIN} is damaged; remove it, and submit again") from error


def _link(data: dict[str, Any]) -> Link:
    tasks = tuple(Task(**{**task, "arguments": tuple(task["arguments"])}) for task in data["tasks"])
    return Link(**{**data, "tasks": tasks})


def was_submitted(run: Path) -> bool:
    """Tell whether jobs of a run were handed to Slurm."""
    return any((folder / CHAIN).exists() for folder in (run, run / "slurm"))


def ran_here_in(run: Path) -> Path | None:
    """Return the folder of a run's jobs that ``--executor local`` or ``debug`` ran, or None."""
    folder = run / "slurm"
    return folder if folder.is_dir() and not was_submitted(run) else None


def find_chain(run: Path) -> tuple[Path, Chain]:
    """Return the folder and the chain of a run, given the run's folder or the chain's own.

    Raises:
        ConfigError: where nothing was submitted from there.
    """
    for folder in (run, run / "slurm"):
        chain = read_chain(folder)
        if chain is not None:
            return folder.absolute(), chain
    raise ConfigError(
        f"{run} has no {CHAIN}: name the folder of a run that was submitted with "
        "`radio-distill slurm RECIPE`"
    )
