"""A real Slurm for the tests: munged, slurmctld, and a slurmd for each of two virtual nodes.

It lives in one folder, listens on the loopback address alone, on ports that were free when it was
started, and keeps no accounts. The daemons stay in the foreground, as children of the tests, so
that exactly those which were started are stopped.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("n1", "n2")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# cred_expire is also how long a requeued job must wait before it may start again.
# A node that is silent for SlurmdTimeout is down, and its jobs queue again; the two shorter
# time-outs before it make that a matter of seconds.
# Nodes may claim more cores than the machine has (config_overrides); no cgroups, systemd or binding
# to cores is asked of it.
_CONFIGURATION = """\
ClusterName=faults
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
TCPTimeout=1
MessageTimeout=5
SlurmdTimeout=5
ReturnToService=2
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""
_NODE = """\
NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=8000 Gres=gpu:2
"""
# Two devices that every machine has stand for the GPUs of a node.
_GPUS = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"


def missing_programs() -> list[str]:
    """Return what would have to be installed."""
    return [program for program in PROGRAMS if not shutil.which(program, path=_PATH)]


class SlurmCluster:
    """Daemons in ``folder``; ``SLURM_CONF`` must name ``configuration`` for Slurm's commands."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Write the configuration, start every daemon, and wait until the nodes take jobs."""
        (self.folder / "state").mkdir(mode=0o700)
        host, ports = socket.gethostname().partition(".")[0], _free_ports(1 + len(NODES))
        text = _CONFIGURATION.format(host=host, folder=self.folder, port=ports.pop())
        text += "".join(_NODE.format(name=name, host=host, port=ports.pop()) for name in NODES)
        self.configuration.write_text(text)
        (self.folder / "gres.conf").write_text(_GPUS)
        self._start_munged()
        self._start("slurmctld", "slurmctld", "-D", "-f", str(self.configuration))
        for name in NODES:
            self.start_node(name)
        self.wait_for(lambda: self.node_states() == ["idle"] * len(NODES), 30, "idle nodes")

    def stop(self) -> None:
        """End every job and every daemon, and what a killed node left running."""
        if "slurmctld" in self._daemons:
            self.cancel_jobs()
        for name in reversed(list(self._daemons)):
            self._end(name, signal.SIGTERM)
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def cancel_jobs(self) -> None:
        """Kill every job, without time to save, and wait until none is left."""
        self.command("scancel", "--state=PENDING", "--user=root", check=False)
        self.command("scancel", "--signal=KILL", "--full", "--user=root", check=False)
        deadline = time.monotonic() + 15
        while self.command("squeue", "-h", check=False) and time.monotonic() < deadline:
            time.sleep(0.2)

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node, as after a reboot."""
        self._start(f"slurmd-{name}", "slurmd", "-D", "-N", name, "-f", str(self.configuration))

    def kill_node(self, name: str) -> None:
        """Kill the slurmd of a node with SIGKILL. What the node runs goes on: nobody ends it."""
        self._end(f"slurmd-{name}", signal.SIGKILL)

    def node_states(self) -> list[str]:
        """Return the state of each node: idle, mixed, allocated, down ..."""
        return self.command("sinfo", "-h", "-N", "-p", "low", "-o", "%T", check=False).split()

    def command(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands against this cluster; returns what it printed."""
        environment = os.environ | {"SLURM_CONF": str(self.configuration)}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def processes(self, node: str = "") -> list[int]:
        """Return the processes of the daemons and jobs; or of the jobs on one node."""
        marks = {f"SLURM_CONF={self.configuration}".encode()}
        marks |= {f"SLURMD_NODENAME={node}".encode()} if node else set()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                ours = marks <= set(path.read_bytes().split(b"\0"))
            except OSError:
                continue  # it has ended
            if ours and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        return found

    def wait_for(self, condition: Callable[[], object], seconds: float, what: str) -> float:
        """Wait until ``condition()`` holds; returns how long that took.

        Raises:
            TimeoutError: with what Slurm and its daemons say, after ``seconds``.
        """
        start = time.monotonic()
        while not condition():
            if time.monotonic() - start > seconds:
                raise TimeoutError(f"waited {seconds:.0f} s in vain for {what}\n{self._log()}")
            time.sleep(0.2)
        return time.monotonic() - start

    def _log(self) -> str:
        logs = [path.read_text()[-1500:] for path in sorted(self.folder.glob("*.log"))]
        return "\n".join([self.command("squeue", "-a", check=False), *logs])

    def _start_munged(self) -> None:
        key, munge_socket = self.folder / "munge.key", self.folder / "munge.sock"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        paths = {"key-file": key, "socket": munge_socket}
        paths |= {f"{name}-file": self.folder / f"munged.{name}" for name in ("pid", "log", "seed")}
        options = [f"--{name}={path}" for name, path in paths.items()]
        # --force: temporary folders are closed to other users, or lie in one that is open to them.
        self._start("munged", "munged", "--foreground", "--force", "--num-threads=2", *options)
        self.wait_for(munge_socket.is_socket, 10, "munged")

    def _start(self, name: str, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=_PATH)
        assert path, f"{program} is not installed"
        self._daemons[name] = subprocess.Popen(
            [path, *arguments],
            env=os.environ | {"SLURM_CONF": str(self.configuration)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _end(self, name: str, number: signal.Signals) -> None:
        daemon = self._daemons.pop(name)
        daemon.send_signal(number)
        try:
            daemon.wait(timeout=15)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
