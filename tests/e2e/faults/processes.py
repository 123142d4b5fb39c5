"""Starts the ranks of a run many times, and pays for the interpreter's imports once.

Run as a script, it imports what a stage needs and forks each rank from there: processes of their
own, which end and are killed like those of torchrun. Tests hold it by :class:`Launcher`. Forking is
safe because nothing has started a thread or a process group before; the server checks that.
"""

import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[3]
SHARED_IMPORTS = ("torch", "timm", "deepspeed", "stages.build", "radio_distill.distill.task")
LAUNCHERS_OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Launcher:
    """The process that ranks are forked from; use it as a context."""

    def __enter__(self) -> "Launcher":
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in LAUNCHERS_OWN and not name.startswith("SLURM_")
        }
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = str(CHECKOUT)
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()  # the server kills what still runs, and ends
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def start(
        self,
        stage: str,
        arguments: Sequence[object],
        *,
        outputs: Path,
        world_size: int = 2,
        largest_file: int = 0,
    ) -> "Ranks":
        """Start the ranks of a stage.

        Args:
            stage: its module in ``stages``.
            arguments: of its command line.
            outputs: folder for what each rank prints; made anew.
            world_size: 0 for one process that no launcher started.
            largest_file: bytes that a file may have (0: no limit), as on a disk that is full.
        """
        outputs.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        places = [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            for rank in range(world_size)
        ]
        paths = [outputs / f"rank{rank}.txt" for rank in range(max(world_size, 1))]
        pids = [
            self.ask(
                "start",
                module=f"stages.{stage}",
                arguments=[str(item) for item in arguments],
                environment=environment,
                output=str(path),
                largest_file=largest_file,
            )
            for environment, path in zip(places or [{}], paths, strict=True)
        ]
        return Ranks(self, pids, paths)

    def ask(self, action: str, **values: Any) -> Any:
        """Let the server do one of its actions; returns its answer."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps([action, values]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, f"the launcher ended with status {self._process.wait(5)}"
        return json.loads(line)


class Ranks:
    """The processes of one start."""

    def __init__(self, launcher: Launcher, pids: Sequence[int], paths: Sequence[Path]):
        self._launcher = launcher
        self._pids = pids
        self._paths = paths
        self._statuses: list[int | None] = [None] * len(pids)

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Wait until all have ended, at most so long; returns exit statuses.

        A status is minus the signal's number where a signal ended it, None where it runs on.
        """
        self._statuses = self._launcher.ask("wait", pids=self._pids, seconds=seconds)
        return self._statuses

    def send(self, number: signal.Signals, ranks: Iterable[int]) -> None:
        """Send a signal to some ranks; one that has ended is passed over."""
        for rank in ranks:
            # What nobody has waited for keeps its number, even if it has ended.
            if self._statuses[rank] is None:
                os.kill(self._pids[rank], number)

    def end(self, seconds: float) -> list[int | None]:
        """Let them end by themselves for so long, then kill those that still run."""
        self.wait(seconds)
        self.send(signal.SIGKILL, range(len(self._pids)))
        return self.wait()

    def output(self, rank: int = 0) -> str:
        """Return what a rank has printed so far."""
        return self._paths[rank].read_text(encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class _Server:
    """The other end of :class:`Launcher`; each public method is an action."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._statuses: dict[int, int | None] = {}

    def serve(self) -> None:
        """Answer until stdin is closed."""
        for name in SHARED_IMPORTS:
            importlib.import_module(name)
        threads = os.listdir("/proc/self/task")
        assert len(threads) == 1, f"{len(threads)} threads run; a fork would lose all but one"
        self._answer("ready")
        while line := sys.stdin.readline():
            action, values = json.loads(line)
            self._answer(getattr(self, action)(**values))
        for pid, status in self._statuses.items():
            if status is None:
                os.kill(pid, signal.SIGKILL)

    def start(
        self,
        module: str,
        arguments: list[str],
        environment: dict[str, str],
        output: str,
        largest_file: int,
    ) -> int:
        """Fork a rank; returns its process number."""
        pid = os.fork()
        if pid:
            self._statuses[pid] = None
            return pid
        self._answers.close()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(environment)
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        # Leaves through the loop of `serve`, as a script leaves: threads are joined, exits are run.
        sys.exit(importlib.import_module(module).main(arguments))

    def wait(self, pids: list[int], seconds: float) -> list[int | None]:
        """Return the statuses of processes, as soon as all have ended or the time is over."""
        deadline = time.monotonic() + seconds
        while True:
            for pid in pids:
                self._reap(pid)
            statuses = [self._statuses[pid] for pid in pids]
            if None not in statuses or time.monotonic() > deadline:
                return statuses
            time.sleep(0.01)

    def _reap(self, pid: int) -> None:
        if self._statuses[pid] is None:
            ended, status = os.waitpid(pid, os.WNOHANG)
            self._statuses[pid] = os.waitstatus_to_exitcode(status) if ended else None

    def _answer(self, value: Any) -> None:
        self._answers.write(json.dumps(value) + "\n")
        self._answers.flush()


if __name__ == "__main__":
    _Server().serve()
