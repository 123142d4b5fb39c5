"""One table, written for people (terminal, Markdown, HTML, LaTeX) and for programs (CSV, JSON).

Rows are tuples of cells; a column knows its number format and which direction is better, so every
writer draws the same arrows and marks the same best values. There are no data frames here: the
tables of an evaluation have tens of cells. CSV carries the numbers unrounded and no notes.
"""

import csv
import html
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TextIO

from ..errors import ConfigError

if TYPE_CHECKING:
    import rich.console

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"  # stands for a value that is not there
GAP = 2  # letters between columns in the terminal
ARROWS = {"higher": "↑", "lower": "↓"}

_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "Δ": r"$\Delta$", "δ": r"$\delta$", "±": r"$\pm$",
    "·": r"$\cdot$", "°": r"$^\circ$", MINUS: "$-$", DASH: "--", "\n": " ",
}  # fmt: skip


class Estimate(NamedTuple):
    """A mean, and its standard deviation over repeated results where there are several."""

    mean: float
    deviation: float | None = None


Cell = str | int | float | Estimate | None


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its heading, how its numbers are written, and which of them is best."""

    name: str
    format: str = ""
    """Format specification of the numbers, for instance ``.2f``; a leading ``+`` marks a change."""
    better: Literal["higher", "lower"] | None = None
    """StepRandomness an arrow in the heading and marks the best value; None for neither."""

    @property
    def heading(self) -> str:
        return f"{self.name} {ARROWS[self.better]}" if self.better else self.name


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

    def to_markdown(self) -> str:
        """Write a GitHub-flavoured table, padded so that its source reads well too."""
        heads = [_markdown(column.heading) for column in self.columns]
        body = [
            [f"**{text}**" if best else text for text, best in zip(row, marks, strict=True)]
            for row, marks in zip(self._texts(_markdown), self._best(), strict=True)
        ]
        right = self._numeric()
        widths = [max(3, *map(len, column)) for column in zip(heads, *body, strict=True)]
        rule = ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)]
        lines = [_markdown_line(row, widths, right) for row in [heads, rule, *body]]
        notes = "".join(f"\n{_markdown(note)}\n" for note in self.notes)
        return f"**{_markdown(self.title)}**\n\n" + "\n".join(lines) + "\n" + notes

    def to_csv(self) -> str:
        """Write comma-separated values; a column with deviations is followed by ``NAME s.d.``."""
        spread = [any(_deviation(row[i]) is not None for row in self.rows) for i in self._indices()]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        heads = [
            [c.name, f"{c.name} s.d."][: 1 + s] for c, s in zip(self.columns, spread, strict=True)
        ]
        writer.writerow([name for pair in heads for name in pair])
        for row in self.rows:
            pairs = [[_plain(c), _deviation(c)][: 1 + s] for c, s in zip(row, spread, strict=True)]
            writer.writerow([value for pair in pairs for value in pair])
        return buffer.getvalue()

    def to_json(self) -> str:
        """Write an object with title, columns, rows (by column name) and notes."""
        names = [column.name for column in self.columns]
        value = {
            "title": self.title,
            "columns": [{"name": column.name, "better": column.better} for column in self.columns],
            "rows": [dict(zip(names, map(_json, row), strict=True)) for row in self.rows],
            "notes": list(self.notes),
        }
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_latex(self) -> str:
        """Write a ``table`` float for the booktabs package."""
        align = "".join("r" if right else "l" for right in self._numeric())
        lines = [
            r"\begin{table}[t]",
            r"\centering",
            rf"\caption{{{_latex(self.title)}}}",
            rf"\begin{{tabular}}{{{align}}}",
            r"\toprule",
            " & ".join(_latex(column.heading) for column in self.columns) + r" \\",
            r"\midrule",
        ]
        for row, texts, marks in zip(self.rows, self._texts(), self._best(), strict=True):
            cells = [_latex_cell(*cell) for cell in zip(row, texts, marks, strict=True)]
            lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\par\smallskip{{\footnotesize {_latex(note)}}}" for note in self.notes]
        return "\n".join([*lines, r"\end{table}"]) + "\n"

    def to_html(self) -> str:
        """Write a ``<figure>`` with the table and its notes; style is left to the page."""
        right = self._numeric()
        # An arrow never stands on a line of its own.
        heads = [
            f'<th scope="col"{_class("number" if r else "")}>'
            f"{re.sub(' (?=[↑↓]$)', '&nbsp;', html.escape(column.heading))}</th>"
            for column, r in zip(self.columns, right, strict=True)
        ]
        body = []
        for row, texts, marks in zip(self.rows, self._texts(), self._best(), strict=True):
            cells = zip(self.columns, row, texts, marks, strict=True)
            body.append("<tr>" + "".join(_html_cell(i, *c) for i, c in enumerate(cells)) + "</tr>")
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return (
            f'<figure class="table">\n<div class="scroll"><table>\n'
            f"<caption>{html.escape(self.title)}</caption>\n"
            f"<thead><tr>{''.join(heads)}</tr></thead>\n"
            f"<tbody>\n{chr(10).join(body)}\n</tbody>\n</table></div>\n"
            + (f"<figcaption>{notes}</figcaption>\n" if notes else "")
            + "</figure>\n"
        )

    def to_terminal(self) -> "rich.console.Group":
        """Make what a ``rich.console.Console`` prints: title, table, notes.

        Columns are as narrow as they can be without breaking a cell or a word of a heading.
        """
        from rich import box
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        grid = RichTable(
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0)
        )
        for column, right, width in zip(self.columns, self._numeric(), self._widths(), strict=True):
            justify: Literal["left", "right"] = "right" if right else "left"
            grid.add_column(Text(column.heading), justify=justify, width=width)
        for texts, marks in zip(self._texts(), self._best(), strict=True):
            styled = zip(texts, marks, strict=True)
            grid.add_row(*[Text(text, style="bold green" if b else "") for text, b in styled])
        notes = [Text(note, style="dim") for note in self.notes]
        return Group(Text(self.title, style="bold"), grid, *notes)

    def split(self, width: int) -> list["Table"]:
        """Cut into tables of at most ``width`` letters; each begins with the first column."""
        widths = self._widths()
        blocks: list[list[int]] = [[]]
        for index in self._indices()[1:]:
            taken = sum(widths[i] + GAP for i in [0, *blocks[-1]])
            if blocks[-1] and taken + widths[index] > width:
                blocks.append([])
            blocks[-1].append(index)
        if len(blocks) == 1:
            return [self]
        last = len(blocks) - 1
        return [
            Table(
                self.title if number == 0 else f"{self.title}, continued",
                tuple(self.columns[i] for i in [0, *block]),
                tuple(tuple(row[i] for i in [0, *block]) for row in self.rows),
                self.notes if number == last else (),
            )
            for number, block in enumerate(blocks)
        ]

    def _widths(self) -> list[int]:
        """Narrowest width of each column that breaks no word of a heading and no cell."""
        texts = self._texts()
        return [
            max(map(len, [*column.heading.split(), *(row[i] for row in texts)]), default=1)
            for i, column in enumerate(self.columns)
        ]

    def _indices(self) -> range:
        return range(len(self.columns))

    def _numeric(self) -> list[bool]:
        """Which columns hold numbers, and are set flush right."""
        return [
            any(_number(row[i]) is not None for row in self.rows)
            and not any(isinstance(row[i], str) for row in self.rows)
            for i in self._indices()
        ]

    def _texts(self, escape: Callable[[str], str] = str) -> list[list[str]]:
        """Every cell as text; ``escape`` is applied to the cells that are not numbers."""
        return [
            [
                escape(cell) if isinstance(cell, str) else _text(cell, column.format)
                for cell, column in zip(row, self.columns, strict=True)
            ]
            for row in self.rows
        ]

    def _best(self) -> list[list[bool]]:
        columns = [self._best_of(i) for i in self._indices()]
        return [[best[i] for best in columns] for i in range(len(self.rows))]

    def _best_of(self, index: int) -> list[bool]:
        """Mark every row that is best *as printed*; none where all are alike."""
        column = self.columns[index]
        numbers = [_number(row[index]) for row in self.rows]
        present = [number for number in numbers if number is not None]
        if column.better is None or len(present) < 2:
            return [False] * len(numbers)
        best = _text(max(present) if column.better == "higher" else min(present), column.format)
        marks = [n is not None and _text(n, column.format) == best for n in numbers]
        return marks if sum(marks) < len(present) else [False] * len(numbers)


FORMATS = {
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
    """Print tables to the terminal, or to ``file``; columns that do not fit go below the others."""
    from rich.console import Console

    file = file or sys.stdout
    console = Console(file=file, width=None if file.isatty() else 120)
    for table in tables:
        for part in table.split(console.width):
            console.print(part.to_terminal())
            console.print()


def _number(cell: Cell) -> float | None:
    if isinstance(cell, Estimate):
        return cell.mean
    return None if cell is None or isinstance(cell, str) else cell


def _deviation(cell: Cell) -> float | None:
    return cell.deviation if isinstance(cell, Estimate) else None


def _plain(cell: Cell) -> str | float | None:
    return cell if isinstance(cell, str) else _number(cell)


def _json(cell: Cell) -> Any:
    if isinstance(cell, Estimate) and cell.deviation is not None:
        return {"mean": cell.mean, "deviation": cell.deviation}
    return _plain(cell)


def _text(cell: int | float | Estimate | None, spec: str) -> str:
    if cell is None:
        return DASH
    deviation = _deviation(cell)
    if deviation is not None:
        return f"{_text(_number(cell), spec)} ± {format(deviation, spec.lstrip('+'))}"
    text = format(_number(cell), spec)
    # A value that rounds to zero has no sign worth printing.
    return text if re.search("[1-9]", text) else text.lstrip("+-")


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<\[\]])", r"\\\1", " ".join(text.split()))


def _markdown_line(cells: list[str], widths: list[int], right: list[bool]) -> str:
    padded = [
        cell.rjust(width) if flush else cell.ljust(width)
        for cell, width, flush in zip(cells, widths, right, strict=True)
    ]
    return "| " + " | ".join(padded) + " |"


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _latex_cell(cell: Cell, text: str, best: bool) -> str:
    if cell is None or isinstance(cell, str):
        return _latex(text)
    number = text.replace("±", r"\pm").replace("%", r"\%")
    return rf"$\mathbf{{{number}}}$" if best else f"${number}$"


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def _html_cell(index: int, column: Column, cell: Cell, text: str, best: bool) -> str:
    number = _number(cell)
    names = [] if isinstance(cell, str) else ["number"]
    if number is not None:
        text = text.replace("-", MINUS)
        if column.format.startswith("+") and text[0] in "+" + MINUS:
            names.append("gain" if (number > 0) == (column.better != "lower") else "loss")
    inner = f"<strong>{html.escape(text)}</strong>" if best else html.escape(text)
    if index == 0:
        return f'<th scope="row"{_class(" ".join(names))}>{inner}</th>'
    return f"<td{_class(' '.join(names))}>{inner}</td>"
