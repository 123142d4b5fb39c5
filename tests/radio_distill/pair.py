"""Two processes of one group, which run what tests ask: a start costs more than a tiny step."""

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


class Pair:
    """Calls ``function(rank, *arguments)`` in both processes, and gives what each returns.

    They start when they are first asked, and anew where one has failed. Functions are those of
    modules, which the processes import.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[multiprocessing.Process] = []
        self._pipes: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return the answers of rank 0 and of rank 1."""
        if not self._pipes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        answers: dict[Any, Any] = {}
        while waiting := [pipe for pipe in self._pipes if pipe not in answers]:
            ready = wait(waiting, timeout=120)
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
        context = multiprocessing.get_context("spawn")
        store = self._folder / f"store-{os.urandom(4).hex()}"
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(store), theirs), daemon=True)
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


def _serve(rank: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{store}")
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
            answer = True, function(rank, *arguments)
        except EOFError:
            return
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
