"""Two processes of one run, which do what tests ask: a start costs more than a tiny step."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = ["torch", "deepspeed", "timm", "open_clip"]
"""What takes seconds to import: both processes are copies of one that has done so."""


class Pair:
    """Calls ``function(rank, *arguments)`` in both processes, and gives what each returns.

    They start when they are first asked, and anew where one has failed. Functions are those of
    modules, which the processes import.

    Args:
        begin: called first in each process, with its rank and a free port of this machine.
    """

    def __init__(self, begin: Callable[[int, int], None]) -> None:
        self._begin = begin
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return the answers of rank 0 and of rank 1."""
        if not self._pipes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        answers: dict[Any, Any] = {}
        while waiting := [pipe for pipe in self._pipes if pipe not in answers]:
            ready = wait(waiting, timeout=240)
            for pipe in ready:
                try:
                    went_well, answers[pipe] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    went_well, answers[pipe] = False, "a process has ended"
                if not went_well:
                    self.leave()
                    raise AssertionError(answers[pipe])
            if not ready:
                self.leave()
                raise AssertionError("a process gave no answer")
        return [answers[pipe] for pipe in self._pipes]

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        # With GPUs, the imports may open them, which no copy of a process survives.
        context.set_forkserver_preload([] if torch.cuda.is_available() else PRELOAD)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        for rank in range(2):
            ours, theirs = context.Pipe()
            arguments = rank, port, self._begin, theirs
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def leave(self) -> None:
        """End both processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes, self._processes = [], []


def join(rank: int, port: int) -> None:
    """Begin as a process of one group."""
    os.environ["LOCAL_RANK"] = str(rank)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=address)


def _serve(rank: int, port: int, begin: Callable[[int, int], None], pipe: Connection) -> None:
    torch.set_num_threads(1)
    begin(rank, port)
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
            answer = True, function(rank, *arguments)
        except EOFError:
            return
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
