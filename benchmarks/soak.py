"""A stage whose disk fails now and then: does memory stay flat, and is every fault accounted for?

A share of the reads of images, drawn from a seed, goes wrong where the program meets the system,
in ``os.pread``:

    unreadable   an error of the disk, or fewer bytes than asked for, on every try
    once         an error of the disk, but not when the read is tried again: costs no image
    checksum     one bit of a byte is another one
    stalled      no answer within data.read_timeout

At each quarter of the steps memory, descriptors and threads are noted; at the end, what was made to
fail stands beside what the run has counted.

    python -m benchmarks.soak [demo] [--stage stage1] [--steps 2000] [--share 0.01]

The run folder is OUTPUT/soak; every field of the recipe can be set, as in ``radio-distill train``.
Images are read by the training process itself, or the faults of workers could not be counted.
The status is 1 where what was counted is not what was made to fail. Left out are faults of writing,
which end a run (see ``tests/e2e/faults``).
"""

import argparse
import errno
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from radio_distill.data.loader import ShardBatches
from radio_distill.report.tables import Column, Table, print_tables
from radio_distill.types import ImageBatch
from stages.arguments import run_script
from stages.build import train_stage
from stages.recipes import load_recipe
from tools.demo_images import write_demo_images

TAKES_FIELDS = True
FAULTS = {"unreadable": 4, "once": 2, "checksum": 4, "stalled": 0.5}
"""How often each is drawn, relative to the others."""
READ_TIMEOUT = 2.0
"""Seconds; a stall takes half as long again."""


class FaultyReads:
    """Lets a share of the reads of ``os.pread`` fail.

    Args:
        share: of the reads.
        seed: of which reads, and how.

    Attributes:
        faults: for each read, in order, the kind of its fault, or None; a read that is tried again
            is one.
    """

    def __init__(self, share: float, seed: int = 0):
        self.faults: list[str | None] = []
        self._share, self._draw, self._pread = share, Random(seed), os.pread
        self._again: tuple[int, int] | None = None
        self._lock = threading.Lock()  # a stalled read goes on beside those after it

    def __call__(self, descriptor: int, size: int, offset: int) -> bytes:
        """Read as ``os.pread`` does, or fail."""
        with self._lock:
            fault = self._fault((size, offset))
            keep = self._draw.randrange(max(size, 1))
        if fault == "stalled":
            time.sleep(1.5 * READ_TIMEOUT)
        if fault in ("unreadable", "once") and keep % 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        data = self._pread(descriptor, size, offset)
        if fault in ("unreadable", "once"):
            return data[:keep]
        if fault == "checksum":
            return data[:keep] + bytes([data[keep] ^ 1]) + data[keep + 1 :]
        return data

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take the place of ``os.pread`` inside the block."""
        with mock.patch("os.pread", self):
            yield

    def _fault(self, place: tuple[int, int]) -> str | None:
        again, self._again = self._again == place, None
        if again:
            return self.faults[-1] if self.faults[-1] == "unreadable" else None
        fault = None
        if self._draw.random() < self._share:
            fault = self._draw.choices(list(FAULTS), list(FAULTS.values()))[0]
        if fault in ("unreadable", "once"):
            self._again = place
        self.faults.append(fault)
        return fault


@dataclass(frozen=True)
class Use:
    """What this process has taken of the machine at one moment."""

    step: int
    megabytes: float
    """Resident memory."""
    descriptors: int
    threads: int
    seconds: float
    """Since the first step."""


@dataclass
class Watched:
    """What a source of images gave, and what the process used meanwhile."""

    source: ShardBatches
    keys: list[str] = field(default_factory=list)
    """Of all images, in their order."""
    uses: list[Use] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)

    def note(self, step: int) -> None:
        """Note what the process uses after ``step`` steps."""
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        seconds = time.monotonic() - self.begin
        self.uses.append(Use(step, resident / 1e6, descriptors, threads, seconds))


@contextmanager
def watching(every: int) -> Iterator[list[Watched]]:
    """Watch all sources of images that are read inside the block, every so many steps.

    The block gets one ``Watched`` a source, in the order in which they were begun: those of a
    stage's statistics come before that of its training.
    """
    found: list[Watched] = []
    original = ShardBatches.batches

    def batches(self: ShardBatches, start_step: int) -> Iterator[list[ImageBatch]]:
        watched = Watched(self)
        found.append(watched)
        for step, made in enumerate(original(self, start_step), start_step):
            if step and step % every == 0:  # the loop is done with the steps before this one
                watched.note(step)
            watched.keys += [key for batch in made for key in batch.keys]
            yield made

    with mock.patch.object(ShardBatches, "batches", batches):
        yield found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", default="demo", help="name or file (default: demo)")
    parser.add_argument("--stage", default="stage1", metavar="NAME")
    parser.add_argument("--steps", type=int, default=2000, metavar="N")
    parser.add_argument("--share", type=float, default=0.01, help="of the reads (default: 0.01)")
    parser.add_argument("--output", default="runs", metavar="DIR", help="folder for the run folder")


def run(arguments: argparse.Namespace) -> int:
    stage, steps = arguments.stage, arguments.steps
    fields = [
        "name=soak",
        f"output={arguments.output}",
        "data.workers=0",
        f"data.max_bad_share={2 * arguments.share}",
        f"data.read_timeout={READ_TIMEOUT}",
        # One more: the last quarter is noted when the step after it begins.
        f"stages.{stage}.steps={steps + 1}",
        *arguments.fields,
    ]
    recipe = load_recipe(arguments.recipe, fields)
    if recipe.data.shards == load_recipe("demo").data.shards:
        write_demo_images()
    reads = FaultyReads(arguments.share, recipe.seed)
    with reads.installed(), watching(max(1, steps // 4)) as found:
        train_stage(stage, recipe)
    made = Counter(fault for fault in reads.faults if fault and fault != "once")
    counted: Counter[str] = sum((Counter(item.source.bad) for item in found), Counter())
    print_tables([_uses(found[-1].uses), _faults(reads, made, counted)])
    return int(made != counted)


def _uses(uses: Sequence[Use]) -> Table:
    columns = (
        Column("Steps", "d"),
        Column("Memory, MB", ".0f"),
        Column("Descriptors", "d"),
        Column("Threads", "d"),
        Column("s / step", ".3f"),
    )
    rows = tuple(
        (use.step, use.megabytes, use.descriptors, use.threads, use.seconds / use.step)
        for use in uses
    )
    return Table("What the process used", columns, rows)


def _faults(reads: FaultyReads, made: Counter[str], counted: Counter[str]) -> Table:
    columns: tuple[Any, ...] = (Column("Fault"), Column("Made", "d"), Column("Counted", "d"))
    rows = tuple((kind, made[kind], counted[kind]) for kind in sorted(made | counted))
    once = reads.faults.count("once")
    note = f"{len(reads.faults)} reads; {once} more failed once, and were right when tried again"
    return Table("What went wrong", columns, rows, (note,))


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main())
