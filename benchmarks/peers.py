"""Other programs that distil, side by side: images a second of CPU time, and memory.

One teacher (DINOv2's ViT-S/14) and one student (ViT-Ti/16) at 224 px, the same JPEGs, equal batches
and number type, decoding in the process that trains; no colour is changed. Contestants take turns,
round by round, so that what else the machine does hits all of them; the first round of each is not
counted, and medians are shown. They do not compute the same: ``benchmarks/peer_workers.py`` says
what each of them does.

    python -m benchmarks.peers
    python -m benchmarks.peers --lightly-python /elsewhere/.venv/bin/python

lightly-train wants packages of its own: make an environment for it, ``pip install lightly-train``
there, and name its Python. Without one it is left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import noise_shards
from benchmarks.peer_workers import CONTESTANTS, MARK
from radio_distill.errors import DataError
from radio_distill.report.tables import Column, Table, print_tables
from stages.arguments import run_script

CHECKOUT = Path(__file__).resolve().parents[1]
LIGHTLY = "lightly-train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--lightly-python", metavar="FILE", help="of its environment")
    parser.add_argument("--batch", type=int, default=16, metavar="IMAGES")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="of a round (default: 2)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="counted (default: 7)")
    parser.add_argument("--images", type=int, default=128, metavar="N")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))


def run(arguments: argparse.Namespace) -> int:
    names = [item for item in arguments.contestants if item != LIGHTLY or arguments.lightly_python]
    with tempfile.TemporaryDirectory() as name:
        noise_shards(Path(name), arguments.images, (427, 640), "images/all")
        workers = {item: Worker(item, arguments, Path(name)) for item in names}
        try:
            for worker in workers.values():
                worker.round()
            for _ in range(arguments.rounds):
                for item, worker in workers.items():
                    worker.round()
                    print(f"{item}: {worker.rounds[-1]}", file=sys.stderr, flush=True)
        finally:
            for worker in workers.values():
                worker.end()
    images = arguments.steps * arguments.batch
    rows = []
    for item, worker in workers.items():
        seconds = [one["seconds"] / images for one in worker.rounds[1:]]
        spread = (max(seconds) - min(seconds)) / statistics.median(seconds)
        memory = worker.rounds[-1]["memory"] / 2**30
        middle = statistics.median(seconds)
        rows.append((item, 1e3 * middle, 1 / middle, spread, memory))
    columns = (
        Column("Contestant"),
        Column("ms of CPU an image", ".1f", "lower"),
        Column("Images/s of CPU", ".2f", "higher"),
        Column("Spread", ".0%"),
        Column("Peak memory, GiB", ".2f", "lower"),
    )
    note = (
        f"{arguments.rounds} rounds of {arguments.steps} steps of {arguments.batch} images, "
        f"{arguments.dtype}; spread: largest less smallest round, over the median"
    )
    print_tables([Table("Distillation, side by side", columns, tuple(rows), (note,))])
    return 0


class Worker:
    """A contestant's process, and what it said of its rounds."""

    def __init__(self, name: str, arguments: argparse.Namespace, folder: Path):
        self._name, self.rounds = name, list[dict[str, Any]]()
        python = arguments.lightly_python if name == LIGHTLY else sys.executable
        command = [
            python, "-m", "benchmarks.peer_workers", name, "--folder", str(folder),
            "--batch", str(arguments.batch), "--steps", str(arguments.steps),
            "--device", "cpu", "--dtype", arguments.dtype,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONWARNINGS": "ignore"}
        self._log = (folder / f"{name}.log").open("w+")
        self._process = subprocess.Popen(
            command, cwd=CHECKOUT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self._waits = False

    def round(self) -> None:
        """Let it train one round; raises DataError, with its last words, where it ends instead."""
        assert self._process.stdin is not None, "a pipe was asked for"
        assert self._process.stdout is not None, "a pipe was asked for"
        if self._waits:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(MARK):
                self.rounds.append(json.loads(line.removeprefix(MARK)))
                self._waits = True
                return
        self._log.seek(0)
        raise DataError(f"{self._name} ended: {self._log.read()[-600:]}")

    def end(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._log):
            if file is not None:
                file.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run as a script; returns the exit status."""
    return run_script(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main())
