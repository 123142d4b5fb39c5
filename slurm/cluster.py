"""What a job asks of the cluster: a YAML file, and command-line flags over it.

Only what most sites need has a field; everything else that sbatch and srun know goes into
``sbatch`` and ``srun``. Examples to start from are in the folder ``clusters`` beside this file.
"""

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from radio_distill.config import build, describe_fields, option, read_yaml
from radio_distill.config.fields import Count, Positive, Range
from radio_distill.errors import ConfigError
from radio_distill.system.redaction import secrets_in

Launcher = Literal["srun", "torchrun", "accelerate"]

_LISTS = {"setup": "LINE", "srun": "ARGUMENT", "container_mounts": "FROM:TO"}
_MAPPINGS = ("environment", "sbatch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Resources of each job, how its processes start, and how often it may come back."""

    partition: str = option("", "Slurm partition; empty for the site's default")
    account: str = option("", "account that is charged; empty for the user's default")
    qos: str = option("", "quality of service; empty for the default")
    nodes: Positive = option(1, "nodes of a job", "nodes")
    gpus_per_node: Count = option(
        1, "GPUs of a node, each with its own process; 0 for one process on CPUs", "GPUs"
    )
    cpus_per_task: Positive = option(4, "cores of a process: itself and its data workers", "cores")
    memory_gb: Count = option(0, "memory of a node; 0 for the partition's default", "GB")
    time_minutes: Positive = option(1440, "time limit, after which a job is requeued", "min")
    constraint: str = option("", "features that nodes must have")
    exclude: str = option("", "nodes that must not be used")
    signal_delay_s: Positive = option(
        300, "how long before the time limit a job is told to save; at least two checkpoints", "s"
    )
    max_requeues: Count = option(
        30, "how often one job may save and queue again: time limits, preemptions", "times"
    )
    max_retries: Count = option(3, "how often one job may crash and be tried again", "times")
    exclude_crashed: bool = option(True, "keep off the node that a crash came from")
    max_running: Positive = option(4, "tasks of a sweep that may run at the same time", "tasks")
    launcher: Launcher = option(
        "srun", "what starts a process for each GPU; the others start them inside one task a node"
    )
    master_address: str = option(
        "", "where the processes of a job meet; empty for its first node", "host"
    )
    master_port: Annotated[int, Range(0, 65_535)] = option(
        0, "port of that; 0 for one made of the job's number"
    )
    environment: dict[str, str] = option(dict, "environment variables of the processes")
    setup: tuple[str, ...] = option(tuple, "shell lines before the processes start, one each")
    container_image: str = option("", "image that the processes run in, through pyxis and enroot")
    container_mounts: tuple[str, ...] = option(tuple, "folders to mount into the container")
    container_workdir: str = option("", "current folder inside the container")
    python: str = option("", "interpreter of the processes; empty for the one that submits")
    srun: tuple[str, ...] = option(tuple, "further arguments of srun, one each")
    sbatch: dict[str, Any] = option(dict, "further sbatch options, for instance reservation: name")

    @property
    def processes_per_node(self) -> int:
        """Processes on each node, one for each GPU."""
        return max(1, self.gpus_per_node)

    @property
    def processes(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.processes_per_node

    @property
    def tasks_per_node(self) -> int:
        """Slurm's tasks on each node: the processes themselves, or one launcher of them."""
        return self.processes_per_node if self.launcher == "srun" else 1

    @property
    def cpus_of_task(self) -> int:
        """Cores of each of Slurm's tasks, which may be the launcher of several processes."""
        return self.cpus_per_task * self.processes_per_node // self.tasks_per_node


def load_cluster(
    path: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    before: Mapping[str, Any] | None = None,
) -> Cluster:
    """Read cluster settings; ``flags`` win over the file, and that over those of ``before``.

    Raises:
        ConfigError: naming the field, for a file or a value that cannot be right.
    """
    values = {**(before or {}), **(read_yaml(path) if path else {}), **(flags or {})}
    cluster: Cluster = build(Cluster, values, "cluster")
    _check(cluster)
    return cluster


def _check(cluster: Cluster) -> None:
    if cluster.signal_delay_s >= 60 * cluster.time_minutes:
        raise ConfigError(
            f"cluster.signal_delay_s: {cluster.signal_delay_s} s is not below the time limit of "
            f"{cluster.time_minutes} min; a job would be told to save as it starts"
        )
    for name in ("container_mounts", "container_workdir"):
        if getattr(cluster, name) and not cluster.container_image:
            raise ConfigError(f"cluster.{name} is set without cluster.container_image; set both")
    for name in secrets_in(cluster):
        raise ConfigError(
            f"cluster.{name} looks like a secret, and scripts are printed and kept; leave it out, "
            "and export it where you submit: jobs get those variables too"
        )
    for name in cluster.environment:
        if not name.isidentifier():
            raise ConfigError(f"cluster.environment: {name!r} is no name of a variable")


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for every field of :class:`Cluster`; what is not given is not set."""
    group = parser.add_argument_group("cluster")
    for name, default, unit, explanation in describe_fields(Cluster):
        kind: dict[str, Any] = {"metavar": "NAME"}
        if name == "time_minutes":
            kind = {"metavar": "TIME", "type": minutes_of}
            explanation += "; minutes, or as sbatch has it: 4:00:00, 1-12"
        elif default.isdigit():
            kind = {"metavar": "N", "type": int}
        elif default in ("True", "False"):
            kind = {"action": argparse.BooleanOptionalAction}
        elif name in _LISTS or name in _MAPPINGS:
            kind = {"metavar": _LISTS.get(name, "KEY=VALUE"), "action": "append"}
        group.add_argument(
            *(["--time"] if name == "time_minutes" else []),
            f"--{name.replace('_', '-')}",
            dest=f"cluster_{name}",
            default=argparse.SUPPRESS,
            help=explanation + (f" [{unit}]" if unit else "") + f" (default: {default})",
            **kind,
        )


def minutes_of(text: str) -> int:
    """Read a time limit as sbatch does, rounded up to minutes.

    ``M``, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M`` or ``D-H:M:S``.

    Raises:
        argparse.ArgumentTypeError: it is none of these.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; say 240, 4:00:00 or 1-12")
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:  # without hours
        numbers.insert(0, 0)
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return (24 * int(days or 0) + hours) * 60 + minutes + math.ceil(seconds / 60)


def cluster_from(
    arguments: argparse.Namespace,
    path: str | Path | None,
    before: Mapping[str, Any] | None = None,
) -> Cluster:
    """Return the settings of a file, overridden by the flags that were given."""
    flags = {
        name.removeprefix("cluster_"): value
        for name, value in vars(arguments).items()
        if name.startswith("cluster_")
    }
    for name in _MAPPINGS:
        if name in flags:
            flags[name] = dict(map(_pair, flags[name]))
    return load_cluster(path, flags, before)


def _pair(text: str) -> tuple[str, str | bool]:
    key, equals, value = text.partition("=")
    return key, value if equals else True
