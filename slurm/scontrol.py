"""Slurm's own commands, each with a time limit and a one-line error."""

import re
import subprocess
from collections.abc import Sequence

from radio_distill.errors import RadioDistillError

_SECONDS = 30.0
_UNUSABLE = ("down", "drain", "fail", "error", "unknown", "inval", "reboot", "maint", "blocked")


class SlurmError(RadioDistillError):
    """A command of Slurm's that is missing, failed, or did not answer."""

    exit_status = 1  # the controller may answer the next time


def run(*command: str) -> str:
    """Run one of Slurm's commands and return what it printed.

    Raises:
        SlurmError: one line with the command and Slurm's words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except FileNotFoundError as error:
        raise SlurmError(
            f"{command[0]} is not on the path: run this on a node of the cluster"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"`{' '.join(command)}` did not answer within {_SECONDS:.0f} s") from error
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())
        raise SlurmError(f"`{' '.join(command)}` failed: {words}")
    return done.stdout


def show_job(job_id: str) -> list[dict[str, str]]:
    """Return the fields of a job, one mapping for each task of an array that Slurm lists.

    An empty list for a job that Slurm has forgotten, as it does some minutes after the end.
    """
    try:
        text = run("scontrol", "--oneliner", "show", "job", job_id)
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    return [_fields(line) for line in text.splitlines() if line.startswith("JobId=")]


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^| )([A-Za-z:/]+)=(.*?)(?= [A-Za-z:/]+=|$)", line.rstrip()))


def accounted_state(job_id: str) -> str:
    """Return the state that the accounting has of a job; empty where there is none."""
    try:
        text = run("sacct", "-X", "-n", "-P", "-o", "State", "-j", job_id)
    except SlurmError:
        return ""  # many sites keep no accounts
    return (text.split() or [""])[0]


def requeue(job_id: str) -> None:
    """Let a job queue again; its processes that still run are ended."""
    run("scontrol", "requeue", job_id)


def exclude(job_id: str, nodes: Sequence[str]) -> None:
    """Keep a job that waits off some nodes; replaces what was excluded before."""
    run("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}")


def cancel(job_ids: Sequence[str]) -> None:
    """End jobs, whether they wait or run."""
    run("scancel", *job_ids)


def hostnames(nodes: str) -> list[str]:
    """Return the nodes of a list in Slurm's writing, such as ``gpu[01-03,07]``."""
    if nodes in ("", "(null)"):
        return []
    return run("scontrol", "show", "hostnames", nodes).split()


def nodes_of(partition: str) -> tuple[set[str], set[str]]:
    """Return a partition's nodes that can run jobs, and those that cannot (down, drained, mute)."""
    text = run("sinfo", "-h", "-N", "-p", partition, "-o", "%N %T")
    states = [line.split() for line in text.splitlines()]
    bad = {node for node, state in states if state.startswith(_UNUSABLE) or state.endswith("*")}
    return {node for node, _ in states} - bad, bad
