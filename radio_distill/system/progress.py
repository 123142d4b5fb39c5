"""Output for the terminal: a progress bar with rate and time left, or plain lines in Slurm logs."""

import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.table import Table

PLAIN_INTERVAL = 15.0
"""Seconds between lines where no terminal can redraw a bar."""


_open_bars = 0
"""Bars that are being shown in this process."""


class Progress:
    """Shows how far something is; one that is opened inside another shows nothing.

    Args:
        label: what is going on, at the start of the line.
        total: amount of work, in ``unit``.
        unit: what is counted (``img``, ``steps``); the rate is in units a second.
        start: work that was done before, in a resumed run; it does not count for the rate.
        visible: False on all but one process.
        images: of each unit, whose rate is shown too; 0 where units are no groups of images.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str = "img",
        start: int = 0,
        visible: bool = True,
        images: int = 0,
    ):
        self._label, self._total, self._unit, self._start = label, total, unit, start
        self._images = images
        self._done = start
        self._begin = self._last_line = time.monotonic()
        visible = visible and not _open_bars
        self._visible = visible
        self._terminal = visible and sys.stderr.isatty()
        self._plain = visible and not self._terminal
        self._bar = _rich_bar(unit) if self._terminal else None

    def __enter__(self) -> "Progress":
        global _open_bars
        _open_bars += self._visible
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                self._label, total=self._total, text="", rate="", eta=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _open_bars
        _open_bars -= self._visible
        if self._bar is not None:
            self._bar.stop()
        elif self._plain and kind is None and self.seconds > 1:
            self._print(f"done in {clock(self.seconds)}")

    @property
    def seconds(self) -> float:
        """Seconds since the bar was made."""
        return time.monotonic() - self._begin

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return (self._done - self._start) / max(self.seconds, 1e-9)

    @property
    def speed(self) -> str:
        """The rate for people; of what takes seconds, how many each."""
        rate = self.rate
        slow = 0 < rate < 1
        text = f"{1 / rate:.1f} s/{self._one}" if slow else f"{rate:.1f} {self._unit}/s"
        return f"{text}, {rate * self._images:.1f} img/s" if self._images else text

    @property
    def _one(self) -> str:
        return self._unit.removesuffix("s") if self._unit != "batches" else "batch"

    def update(self, done: int, text: str = "", total: int | None = None) -> None:
        """Move to ``done``, with a few words on how it goes; ``total`` where it changed."""
        self._done = done
        self._total = self._total if total is None else total
        left = (self._total - done) / self.rate if self.rate > 0 else 0.0
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=done,
                total=self._total,
                text=text,
                rate=self.speed,
                eta=clock(left),
            )
        elif self._plain and time.monotonic() - self._last_line >= PLAIN_INTERVAL:
            self._print(f"{text + '  ' if text else ''}ETA {clock(left)}")

    def report(self, done: int, total: int) -> None:
        """Move to ``done`` of ``total``, as what takes a callback calls it."""
        self.update(done, total=total)

    def _print(self, text: str) -> None:
        self._last_line = time.monotonic()
        print(
            f"{self._label}  {self._done}/{self._total} {self._unit}  {self.speed}  {text}",
            file=sys.stderr,
            flush=True,
        )


def clock(seconds: float) -> str:
    """Write seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """Write a time in the unit that people would take: ``32 s``, ``12 min``, ``1.2 h``."""
    if seconds < 0.1:
        return f"{1000 * seconds:.2g} ms"
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= size or unit == "s":
            amount = seconds / size
            break
    decimals = 1 if amount < (100 if unit == "h" else 10) else 0
    return f"{amount:,.{decimals}f} {unit}"


def table_console() -> "Console":
    """Return where tables are printed; in full width where no terminal is, so that grep works."""
    from rich.console import Console

    width = None if Console().is_terminal else 10_000
    return Console(width=width, markup=False, highlight=False)


def titled_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    sums: Sequence[str] = (),
    left: Collection[str] = (),
) -> "Table":
    """Lay texts out under a title and their headings; ``sums`` are a last row in bold.

    The first column, and those named in ``left``, are flush left, the others flush right.
    """
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, title_style="bold")
    for index, column in enumerate(columns):
        is_left = index == 0 or column in left
        table.add_column(column, justify="left" if is_left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    if sums:
        table.add_row(*sums, style="bold")
    return table


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print texts under their headings."""
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    table_console().print(table)


def _rich_bar(unit: str) -> "RichProgress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TextColumn("ETA {task.fields[eta]}"),
        TextColumn("{task.fields[text]}"),
        console=Console(stderr=True),
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' loading report and bars out of the log; a check of ours says more."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
