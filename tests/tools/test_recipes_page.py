"""The recipes against what the papers print, and the page on both."""

from dataclasses import replace
from pathlib import Path

import pytest

from radio_distill.config import Recipe
from radio_distill.config.flat import flat_fields, matches
from radio_distill.config.recipes import recipe_names
from stages.recipes import load_recipe
from tools import recipes_page
from tools.published import Published, Row, merge_equal, published, rows_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "recipes.md"


@pytest.fixture(scope="module")
def demo() -> Recipe:
    return load_recipe("demo")


def test_published__is_behind_every_recipe_but_the_demo():
    assert set(published()) == set(recipe_names()) - {"demo"}


@pytest.mark.parametrize("name", published())
def test_published__a_recipe_differs_only_where_a_note_says_why(name):
    for row in rows_of(load_recipe(name), published()[name]):
        if row.paper is not None:
            assert (row.value != row.paper.value) == bool(row.paper.note), row


@pytest.mark.parametrize("name", published())
def test_published__every_figure_is_of_a_field(name):
    paths = [row.path for row in rows_of(load_recipe(name), published()[name])]
    for pattern in published()[name]:
        assert any(matches(pattern.split("."), path) for path in paths), pattern


@pytest.mark.parametrize("name", published())
def test_published__names_the_papers(name):
    known = ("AMR", "PHIS", "V2.5", "FS", "V4", "HF", "repo", "TAO", "UN", "TH", "SL", "EU", "DU",
             "all papers")  # fmt: skip
    for field, entry in published()[name].items():
        assert any(source in entry.source for source in known), field


def test_flat_fields__names_partitions_and_adds_up_images(demo):
    fields = flat_fields(demo)
    assert fields["stages", "stage3", "partitions", "high", "teacher_sizes", "dino"] == 112
    assert fields["stages", "stage3", "images_per_step"] == 4 + 4
    assert fields["stages", "stage3", "partitions", "high", "mosaic"] == []


def test_rows_of__takes_the_most_exact_figure_and_leaves_out_what_has_no_effect(demo):
    figures = {
        "teachers.*.summary_weight": Published(value=1.0, source="A", note="n"),
        "teachers.dino.summary_weight": Published(value=2.0, source="B"),
    }
    rows = {row.path: row for row in rows_of(demo, figures)}
    assert rows["teachers", "dino", "summary_weight"].paper.source == "B"
    assert rows["teachers", "efficientnet", "summary_weight"].paper.source == "A"
    assert rows["loss", "feature"].paper is None
    assert ("log", "every") not in rows
    assert ("teachers", "dino", "weights") not in rows
    assert ("stages", "stage1", "partitions", "low", "name") not in rows
    assert ("stages", "stage1", "partitions", "low", "mosaic") not in rows  # empty


def merged(*rows: tuple[str, object]) -> list[tuple[str, object]]:
    result = merge_equal([Row(tuple(path.split(".")), value, None) for path, value in rows])
    return [(".".join(row.path), row.value) for row in result]


def test_merge_equal__all_names_or_some():
    one, two, three = (f"stages.s1.partitions.{name}.size" for name in "abc")
    assert merged((one, 8), (two, 8), (three, 8)) == [("stages.*.partitions.*.size", 8)]
    assert merged((one, 8), (two, 9), (three, 8)) == [
        ("stages.*.partitions.{a,c}.size", 8),
        ("stages.*.partitions.b.size", 9),
    ]


def test_merge_equal__keeps_apart_what_differs():
    rows = [("teachers.a.preset", "x"), ("teachers.b.preset", "y"), ("loss.mesa", 0)]
    assert merged(*rows) == rows
    paths = ("stages.s1.steps", "stages.s2.steps")
    row = Row(("stages", "s1", "steps"), 3, None)
    cited = replace(row, path=("stages", "s2", "steps"), paper=Published(value=3, source="A"))
    assert [".".join(item.path) for item in merge_equal([row, cited])] == list(paths)


def test_recipes_page__is_what_the_tool_prints_and_marks_what_is_ours(capsys):
    assert recipes_page.main() == 0
    printed = capsys.readouterr().out
    assert PAGE.read_text(encoding="utf-8") == printed
    section = printed.partition("\n## c_radio_v4_h\n")[2].partition("\n## ")[0]
    rows = {line.split(" | ")[0]: line for line in section.splitlines()}
    assert rows["| loss.mesa"].endswith("| *ours* |")
    assert rows["| loss.summary"] == "| loss.summary | angle | angle | V4 |"
    assert "Ours: SAM3's own 1008 px" in rows["| teachers.sam3.input_size"]
