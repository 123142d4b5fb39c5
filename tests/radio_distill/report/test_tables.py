import csv
import io
import json
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from radio_distill.errors import ConfigError
from radio_distill.report.tables import Column, Estimate, Table, print_tables, render

TABLE = Table(
    "Scores",
    (
        Column("Model"),
        Column("top1 (%)", ".2f", "higher"),
        Column("rmse", ".3f", "lower"),
        Column("Δm", "+.2f", "higher"),
    ),
    (
        ("bilinear", 50.0, 0.4, 0.0),
        ("s2", 51.5, 0.45, -0.001),
        ("tile", 51.5, None, Estimate(1.25, 0.5)),
    ),
    ("A note.",),
)
AWKWARD = r"a|b*c_d&e%f$g#h{i}j~k^l\m<n>[o]`p`"


def body(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_to_markdown__arrows_alignment_and_best_values() -> None:
    heads, rule, *rows = body(TABLE.to_markdown())
    assert heads == ["Model", "top1 (%) ↑", "rmse ↓", "Δm ↑"]
    assert rule[0].endswith("-")
    assert all(cell.endswith("-:") for cell in rule[1:])
    assert rows == [
        ["bilinear", "50.00", "**0.400**", "0.00"],
        ["s2", "**51.50**", "0.450", "0.00"],
        ["tile", "**51.50**", "–", "**+1.25 ± 0.50**"],  # noqa: RUF001
    ]
    assert TABLE.to_markdown().startswith("**Scores**\n")
    assert TABLE.to_markdown().endswith("\nA note.\n")


def test_to_markdown__awkward_text_stays_one_cell() -> None:
    table = Table("t", (Column("Model"), Column("x", ".1f")), ((AWKWARD + "\nnext", 1.0),))
    line = table.to_markdown().splitlines()[-1]
    assert line.replace(r"\|", "").count("|") == 3
    assert r"a\|b\*c\_d&e" in line
    assert r"\<n>" in line
    assert r"\`p\` next" in line


def test_best__ties_are_all_marked_and_uniform_columns_are_not() -> None:
    columns = (Column("Model"), Column("x", ".1f", "higher"), Column("y", ".1f", "lower"))
    rows = (("a", 1.04, 2.0), ("b", 1.0, 2.0), ("c", 0.9, 2.0))
    assert body(Table("t", columns, rows).to_markdown())[2:] == [
        ["a", "**1.0**", "2.0"],
        ["b", "**1.0**", "2.0"],
        ["c", "0.9", "2.0"],
    ]
    assert "**1.0" not in Table("t", columns, rows[:1]).to_markdown()


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
            st.floats(allow_nan=False, allow_infinity=False),
        ),
        min_size=1,
    )
)
def test_to_csv__reads_back_unrounded(rows: list[tuple[str, float]]) -> None:
    table = Table("t", (Column("Model, or so"), Column("x", ".1f", "lower")), tuple(rows))
    head, *read = csv.reader(io.StringIO(table.to_csv(), newline=""))
    assert head == ["Model, or so", "x"]
    assert [(name, float(value)) for name, value in read] == rows


def test_to_csv__deviations_have_a_column_of_their_own() -> None:
    head, *rows = csv.reader(io.StringIO(TABLE.to_csv()))
    assert head == ["Model", "top1 (%)", "rmse", "Δm", "Δm s.d."]
    assert rows[0] == ["bilinear", "50.0", "0.4", "0.0", ""]
    assert rows[2] == ["tile", "51.5", "", "1.25", "0.5"]


def test_to_json__holds_everything() -> None:
    value = json.loads(TABLE.to_json())
    assert value["title"] == "Scores"
    assert value["columns"][2] == {"name": "rmse", "better": "lower"}
    assert value["rows"][1] == {"Model": "s2", "top1 (%)": 51.5, "rmse": 0.45, "Δm": -0.001}
    assert value["rows"][2]["rmse"] is None
    assert value["rows"][2]["Δm"] == {"mean": 1.25, "deviation": 0.5}
    assert value["notes"] == ["A note."]


def test_to_latex__booktabs() -> None:
    lines = TABLE.to_latex().splitlines()
    assert r"\begin{tabular}{lrrr}" in lines
    rules = [lines.index(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")]
    assert rules == sorted(rules)
    assert r"Model & top1 (\%) $\uparrow$ & rmse $\downarrow$ & $\Delta$m $\uparrow$ \\" in lines
    assert r"tile & $\mathbf{51.50}$ & -- & $\mathbf{+1.25 \pm 0.50}$ \\" in lines


def test_to_latex__every_special_character_is_escaped() -> None:
    text = Table(AWKWARD, (Column("x"),), ((AWKWARD,),), (AWKWARD,)).to_latex()
    escaped = (
        r"a\textbar{}b*c\_d\&e\%f\$g\#h\{i\}j\textasciitilde{}k\textasciicircum{}l"
        r"\textbackslash{}m\textless{}n\textgreater{}[o]`p`"
    )
    assert text.count(escaped) == 3


class Cells(HTMLParser):
    """Collects tags and text, and checks that every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[tuple[str, str | None, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append((tag, dict(attrs).get("class"), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            tag, kind, text = self.cells[-1]
            self.cells[-1] = (tag, kind, text + data)


def test_to_html__cells_and_classes() -> None:
    parser = Cells()
    parser.feed(TABLE.to_html())
    assert parser.open == []
    assert parser.cells[4] == ("th", None, "bilinear")
    assert parser.cells[7] == ("td", "number", "0.00")
    assert parser.cells[15] == ("td", "number gain", "+1.25 ± 0.50")
    assert "<strong>51.50</strong>" in TABLE.to_html()


def test_to_html__a_loss_is_a_rise_where_lower_is_better() -> None:
    columns = (Column("Model"), Column("change of error", "+.1f", "lower"))
    html = Table("t", columns, (("a", 2.0), ("b", -2.0))).to_html()
    assert '<td class="number loss">+2.0</td>' in html
    assert '<td class="number gain"><strong>\N{MINUS SIGN}2.0</strong></td>' in html


def test_to_html__text_is_escaped() -> None:
    hostile = "<script>alert('x')</script>&\""
    table = Table(hostile, (Column(hostile),), ((hostile,),), (hostile,))
    parser = Cells()
    parser.feed(table.to_html())
    assert "script" not in parser.open
    assert "<script" not in table.to_html()
    assert [text for _, _, text in parser.cells] == [hostile, hostile]


def test_to_terminal__markup_is_text() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(Table("[red]t", (Column("x"),), (("[bold]y[/bold]",),)).to_terminal())
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]t" in printed
    assert "[bold]y[/bold]" in printed


def test_print_tables__a_wide_table_loses_nothing() -> None:
    columns = (Column("Model"), *(Column(f"metric {i}", ".2f", "higher") for i in range(30)))
    names = ["first", *(f"the model of number {k}" for k in range(30))]  # too wide either way
    rows = tuple((name, *(i + k for i in range(30))) for k, name in enumerate(names))
    file = io.StringIO()
    print_tables([Table("Wide", columns, rows, ("The note.",))], file)
    printed = file.getvalue()
    assert max(map(len, printed.splitlines())) <= 120
    numbers = [word for word in printed.split() if word.endswith(".00")]
    assert sorted(map(float, numbers)) == sorted(float(cell) for row in rows for cell in row[1:])
    assert printed.count("first") == printed.count("Wide") > 1
    assert printed.count("The note.") == 1


def test_tables__turn_on_their_side_where_they_fit_only_so() -> None:
    columns = (Column("Model"), *(Column(f"teacher {i}", ".2f", "higher") for i in range(20)))
    table = Table("Wide", columns, tuple((name, *range(20)) for name in ("one", "other")))
    file = io.StringIO()
    print_tables([table], file)
    lines = file.getvalue().splitlines()
    assert "continued" not in file.getvalue()
    assert lines[1].split() == ["Model", "one", "other"]
    assert lines[3].split() == ["teacher", "0", "↑", "0.00", "0.00"]
    parser = Cells()
    parser.feed(table.to_html())
    assert [text for _, _, text in parser.cells[:4]] == ["Model", "one", "other", "teacher 0\xa0↑"]
    assert body(table.to_markdown())[0][0] == "Model", "files are as they were asked for"


def test_render__several_tables() -> None:
    assert [table["title"] for table in json.loads(render([TABLE, TABLE], "json"))] == [
        "Scores"
    ] * 2
    assert json.loads(render([TABLE], "json"))["title"] == "Scores"
    assert render([TABLE, TABLE], "markdown").count("**Scores**") == 2
    assert "bilinear" in render([TABLE], "terminal")


def test_table__two_columns_of_one_name() -> None:
    with pytest.raises(ConfigError, match="'x'"):
        Table("t", (Column("x"), Column("x")), ())


def test_table__without_rows() -> None:
    table = Table("t", (Column("Model"), Column("x", ".1f", "higher")), ())
    assert len(body(table.to_markdown())) == 2
    assert table.to_csv() == "Model,x\n"
    assert json.loads(table.to_json())["rows"] == []
    assert "t" in render([table], "terminal")
