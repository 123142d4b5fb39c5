"""What a job asks of the cluster: a YAML file, and command-line flags over it.

Only what most sites need has a field; everything else that sbatch knows goes into ``sbatch``.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radio_distill.config import build, describe, option, read_yaml
from radio_distill.errors import ConfigError

_LISTS = {"setup": "LINE", "sbatch": "KEY=VALUE"}
_LOWEST = {
    "nodes": 1,
    "gpus_per_node": 0,
    "cpus_per_task": 1,
    "memory_gb": 0,
    "time_minutes": 1,
    "signal_delay_s": 1,
    "max_requeues": 0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Resources of each stage's job."""

    partition: str = option("", "Slurm partition; empty for the site's default")
    account: str = option("", "account that is charged; empty for the user's default")
    qos: str = option("", "quality of service; empty for the default")
    nodes: int = option(1, "nodes of a job", "nodes")
    gpus_per_node: int = option(
        1, "GPUs of a node, each with its own process; 0 for one process on CPUs", "GPUs"
    )
    cpus_per_task: int = option(4, "cores of a process: itself and its data workers", "cores")
    memory_gb: int = option(0, "memory of a node; 0 for the partition's default", "GB")
    time_minutes: int = option(1440, "time limit, after which a job is requeued", "min")
    constraint: str = option("", "features that nodes must have")
    exclude: str = option("", "nodes that must not be used")
    signal_delay_s: int = option(
        300, "how long before the time limit a job is told to save; at least two checkpoints", "s"
    )
    max_requeues: int = option(30, "how often one job may reach its time limit", "times")
    setup: tuple[str, ...] = option(tuple, "shell lines before the processes start, one each")
    sbatch: dict[str, Any] = option(dict, "further sbatch options, for instance reservation: name")

    @property
    def tasks_per_node(self) -> int:
        """Processes on each node."""
        return max(1, self.gpus_per_node)


def load_cluster(path: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> Cluster:
    """Read cluster settings; ``flags`` win over the file.

    Raises:
        ConfigError: naming the field, for a file or a value that cannot be right.
    """
    values = {**(read_yaml(path) if path else {}), **(flags or {})}
    cluster = build(Cluster, values, "cluster")
    for name, lowest in _LOWEST.items():
        if getattr(cluster, name) < lowest:
            raise ConfigError(f"cluster.{name}: {getattr(cluster, name)} is below {lowest}")
    if cluster.signal_delay_s >= 60 * cluster.time_minutes:
        raise ConfigError(
            f"cluster.signal_delay_s: {cluster.signal_delay_s} s is not below the time limit of "
            f"{cluster.time_minutes} min; a job would be told to save as it starts"
        )
    return cluster


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for every field of :class:`Cluster`; what is not given is not set."""
    group = parser.add_argument_group("cluster")
    for name, default, unit, explanation in describe(Cluster):
        kind: dict[str, Any] = {"metavar": "NAME"}
        if default.isdigit():
            kind = {"metavar": "N", "type": int}
        if name in _LISTS:
            kind = {"metavar": _LISTS[name], "action": "append"}
        group.add_argument(
            *(["--time"] if name == "time_minutes" else []),
            f"--{name.replace('_', '-')}",
            dest=f"cluster_{name}",
            default=argparse.SUPPRESS,
            help=explanation + (f" [{unit}]" if unit else "") + f" (default: {default})",
            **kind,
        )


def cluster_from(arguments: argparse.Namespace, path: str | Path | None) -> Cluster:
    """Return the settings of a file, overridden by the flags that were given."""
    flags = {
        name.removeprefix("cluster_"): value
        for name, value in vars(arguments).items()
        if name.startswith("cluster_")
    }
    if "sbatch" in flags:
        flags["sbatch"] = dict(map(_pair, flags["sbatch"]))
    return load_cluster(path, flags)


def _pair(text: str) -> tuple[str, str | bool]:
    key, equals, value = text.partition("=")
    return key, value if equals else True
