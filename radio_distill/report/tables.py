"""One table, written for people (terminal, Markdown, HTML, LaTeX) and for programs (CSV, JSON).

Rows are tuples of cells; a column knows its number format and which direction is better, so every
writer draws the same arrows and marks the same best values. A table that is too wide for a terminal
or a page is turned on its side where it fits then. CSV carries the numbers unrounded and no notes.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TextIO

from ..errors import ConfigError
from ..evals.gain import Estimate

if TYPE_CHECKING:
    import jinja2
    import rich.console

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"  # stands for a value that is not there
GAP = 2  # letters between columns in the terminal
MOST_COLUMNS = 9
"""Of a table on a page, unless it has more rows than columns."""
MOST_LETTERS = 100
"""Across a table on a page, unless it is no narrower on its side."""
ARROWS = {"higher": "↑", "lower": "↓"}

_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "Δ": r"$\Delta$", "δ": r"$\delta$", "±": r"$\pm$",
    "·": r"$\cdot$", "°": r"$^\circ$", MINUS: "$-$", DASH: "--", "\n": " ",
}  # fmt: skip

Cell = str | int | float | Estimate | None


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its heading, how its numbers are written, and which of them is best."""

    name: str
    format: str = ""
    """Format specification of the numbers, for instance ``.2f``; a leading ``+`` marks a change."""
    better: Literal["higher", "lower"] | None = None
    """Draws an arrow in the heading and marks the best value; None for neither."""

    @property
    def heading(self) -> str:
        """The name, and the arrow."""
        return f"{self.name} {ARROWS[self.better]}" if self.better else self.name


class Shown(NamedTuple):
    """A cell as it is printed."""

    text: str
    number: float | None = None
    """None for text, and where there is no value."""
    deviation: float | None = None
    is_text: bool = False
    best: bool = False
    change: Literal["", "gain", "loss"] = ""


class Grid(NamedTuple):
    """A table as it is printed: headings, and rows of cells."""

    headings: list[str]
    rows: list[list[Shown]]

    @property
    def flush_right(self) -> list[bool]:
        """Which columns hold numbers."""
        cells = [[row[i] for row in self.rows] for i in range(len(self.headings))]
        return [
            any(cell.number is not None for cell in column)
            and not any(cell.is_text for cell in column)
            for column in cells
        ]

    @property
    def widths(self) -> list[int]:
        """Narrowest width of each column, in letters, that breaks no cell and no heading's word."""
        return [
            max(map(len, [*heading.split(), *(row[i].text for row in self.rows)]), default=1)
            for i, heading in enumerate(self.headings)
        ]

    def turned(self) -> "Grid":
        """Turn columns to rows and rows to columns."""
        first, *others = self.headings
        rows = [
            [Shown(heading, is_text=True), *(row[i] for row in self.rows)]
            for i, heading in enumerate(others, 1)
        ]
        return Grid([first, *(row[0].text for row in self.rows)], rows)

    def fitted(self, width: int) -> list["Grid"]:
        """Return it as it is, or turned, or cut; each part begins with the first column."""

        def fits(grid: Grid) -> bool:
            return sum(grid.widths) + GAP * (len(grid.widths) - 1) <= width

        if fits(self):
            return [self]
        if fits(self.turned()):
            return [self.turned()]
        widths, blocks = self.widths, list[list[int]]([[]])
        for index in range(1, len(widths)):
            taken = sum(widths[i] + GAP for i in [0, *blocks[-1]])
            if blocks[-1] and taken + widths[index] > width:
                blocks.append([])
            blocks[-1].append(index)
        return [
            Grid(
                [self.headings[i] for i in [0, *block]],
                [[row[i] for i in [0, *block]] for row in self.rows],
            )
            for block in blocks
        ]


@dataclass(frozen=True, slots=True)
class Table:
    """Titled rows of cells, with notes underneath.

    Raises:
        ConfigError: two columns have the same name.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{self.title}: two columns are called {name!r}; rename one")
        for row in self.rows:
            assert len(row) == len(names), (
                f"{self.title}: {len(row)} cells for {len(names)} columns"
            )

    def _indices(self) -> range:
        return range(len(self.columns))

    def grid(self) -> Grid:
        """Return headings and cells as they are printed."""
        columns = [_shown([row[i] for row in self.rows], self.columns[i]) for i in self._indices()]
        rows = [[column[i] for column in columns] for i in range(len(self.rows))]
        return Grid([column.heading for column in self.columns], rows)

    def page_grid(self) -> Grid:
        """Return the grid as a page shows it: on its side where it is wide and low."""
        grid = self.grid()
        turned = grid.turned()
        wide = len(self.columns) > max(MOST_COLUMNS, len(self.rows) + 1)
        wide |= sum(grid.widths) > max(MOST_LETTERS, sum(turned.widths))
        return turned if wide else grid

    def to_markdown(self) -> str:
        """Write a GitHub-flavoured table, padded so that its source reads well too."""
        grid = self.grid()
        heads, right = [_markdown(heading) for heading in grid.headings], grid.flush_right
        body = [
            [f"**{c.text}**" if c.best else _markdown(c.text) if c.is_text else c.text for c in row]
            for row in grid.rows
        ]
        widths = [max(3, *map(len, column)) for column in zip(heads, *body, strict=True)]
        rule = ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)]
        lines = [
            " | ".join(
                cell.rjust(width) if flush else cell.ljust(width)
                for cell, width, flush in zip(row, widths, right, strict=True)
            )
            for row in [heads, rule, *body]
        ]
        notes = "".join(f"\n{_markdown(note)}\n" for note in self.notes)
        table = "".join(f"| {line} |\n" for line in lines)
        return f"**{_markdown(self.title)}**\n\n{table}{notes}"

    def to_csv(self) -> str:
        """Write comma-separated values; a column with deviations is followed by ``NAME s.d.``."""
        rows, buffer = self.grid().rows, io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        several = [any(row[i].deviation is not None for row in rows) for i in self._indices()]
        heads: list[list[Any]] = [[c.name, f"{c.name} s.d."] for c in self.columns]
        body = [[[c.text if c.is_text else c.number, c.deviation] for c in row] for row in rows]
        for line in (heads, *body):
            pairs = zip(line, several, strict=True)
            writer.writerow([value for pair, both in pairs for value in pair[: 1 + both]])
        return buffer.getvalue()

    def to_json(self) -> str:
        """Write an object with title, columns, rows (by column name) and notes."""
        names = [column.name for column in self.columns]
        value = {
            "title": self.title,
            "columns": [{"name": column.name, "better": column.better} for column in self.columns],
            "rows": [dict(zip(names, map(_json, row), strict=True)) for row in self.grid().rows],
            "notes": list(self.notes),
        }
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_latex(self) -> str:
        """Write a ``table`` float for the booktabs package."""
        grid = self.grid()
        align = "".join("r" if right else "l" for right in grid.flush_right)
        lines = [
            r"\begin{table}[t]",
            r"\centering",
            rf"\caption{{{_latex(self.title)}}}",
            rf"\begin{{tabular}}{{{align}}}",
            r"\toprule",
            " & ".join(map(_latex, grid.headings)) + r" \\",
            r"\midrule",
            *(" & ".join(map(_latex_cell, row)) + r" \\" for row in grid.rows),
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par\smallskip{{\footnotesize {_latex(note)}}}" for note in self.notes),
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def to_html(self) -> str:
        """Write a ``<figure>`` with the table and its notes; style is left to the page."""
        return render_template("table.html.j2", table=self)

    def to_terminal(self, width: int = 120) -> "rich.console.Group":
        """Make what a ``rich.console.Console`` prints: title, table, notes.

        Columns are as narrow as they can be without breaking a cell or a word of a heading.
        """
        from rich.console import Group
        from rich.text import Text

        parts: list[Any] = []
        for number, grid in enumerate(self.grid().fitted(width)):
            title = f"{self.title}, continued" if number else self.title
            parts += [Text()] if number else []
            parts += [Text(title, style="bold"), _terminal(grid)]
        return Group(*parts, *(Text(note, style="dim") for note in self.notes))


def render_template(name: str, **values: Any) -> str:
    """Fill in a file of ``templates``; every text that is not markup of its own is escaped."""
    return _templates().get_template(name).render(**values)


@cache
def _templates() -> "jinja2.Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("radio_distill.report")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined)


FORMATS: dict[str, Callable[[Table], str]] = {
    "markdown": Table.to_markdown,
    "csv": Table.to_csv,
    "latex": Table.to_latex,
    "json": Table.to_json,
    "html": Table.to_html,
}


def render(tables: Sequence[Table], format: str) -> str:
    """Write several tables in one of ``FORMATS``, or as ``terminal`` prints them.

    Several tables are set apart by an empty line; in JSON they are a list.
    """
    if format == "terminal":
        buffer = io.StringIO()
        print_tables(tables, buffer)
        return buffer.getvalue()
    parts = [FORMATS[format](table) for table in tables]
    if format == "json" and len(parts) > 1:
        return "[\n" + ",\n".join(part.rstrip() for part in parts) + "\n]\n"
    return "\n".join(parts)


def print_tables(tables: Sequence[Table], file: TextIO | None = None) -> None:
    """Print tables to the terminal, or to ``file``, an empty line after each."""
    from rich.console import Console

    file = file or sys.stdout
    console = Console(file=file, width=None if file.isatty() else 120)
    for table in tables:
        console.print(table.to_terminal(console.width))
        console.print()


def _shown(cells: Sequence[Cell], column: Column) -> list[Shown]:
    """Write a column's cells; best is every one that is best *as printed*, none where all are."""
    plain = [_plain(cell, column) for cell in cells]
    numbers = [cell.number for cell in plain if cell.number is not None]
    if column.better is None or len(numbers) < 2:
        return plain
    best = _written(max(numbers) if column.better == "higher" else min(numbers), column.format)
    marked = [
        cell._replace(best=cell.number is not None and _written(cell.number, column.format) == best)
        for cell in plain
    ]
    return marked if sum(cell.best for cell in marked) < len(numbers) else plain


def _plain(cell: Cell, column: Column) -> Shown:
    """Write a cell without marking it."""
    if cell is None or isinstance(cell, str):
        return Shown(DASH if cell is None else cell, is_text=cell is not None)
    number, deviation = cell if isinstance(cell, Estimate) else (cell, None)
    text = _written(number, column.format)
    if deviation is not None:
        text = f"{text} ± {format(deviation, column.format.lstrip('+'))}"
    change: Literal["", "gain", "loss"] = ""
    if column.format.startswith("+") and text[0] in "+-":
        change = "gain" if (number > 0) == (column.better != "lower") else "loss"
    return Shown(text, number, deviation, change=change)


def _written(number: float, spec: str) -> str:
    """Write a number; one that rounds to zero has no sign worth printing."""
    text = format(number, spec)
    return text if re.search("[1-9]", text) else text.lstrip("+-")


def _json(cell: Shown) -> Any:
    if cell.deviation is not None:
        return {"mean": cell.number, "deviation": cell.deviation}
    return cell.text if cell.is_text else cell.number


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<\[\]])", r"\\\1", " ".join(text.split()))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _latex_cell(cell: Shown) -> str:
    if cell.number is None:
        return _latex(cell.text)
    number = cell.text.replace("±", r"\pm").replace("%", r"\%")
    return rf"$\mathbf{{{number}}}$" if cell.best else f"${number}$"


def _terminal(grid: Grid) -> Any:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0)
    )
    columns = zip(grid.headings, grid.flush_right, grid.widths, strict=True)
    for heading, right, width in columns:
        justify: Literal["left", "right"] = "right" if right else "left"
        drawn.add_column(Text(heading), justify=justify, width=width)
    for row in grid.rows:
        drawn.add_row(*[Text(c.text, style="bold green" if c.best else "") for c in row])
    return drawn
