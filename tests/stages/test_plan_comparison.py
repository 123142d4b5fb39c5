"""``radio-distill plan --compare``, and the page that it prints."""

from dataclasses import replace
from pathlib import Path

import pytest

from stages.cli import main
from stages.commands.plan_comparison import COUNTS, KINDS, cells, compare, without_mosaics
from stages.commands.published import published
from stages.common import load_recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "plans.md"
RECIPE = """
name: tiny
data: {shards: [nowhere/*.tar]}
student: {architecture: test_vit, max_size: 128}
teachers: {sam: {preset: tiny_samvit, summary_weight: 0}}
stages:
  stage1:
    steps: 3600
    partitions:
      - {name: low, sizes: [16, 32], teachers: [sam], mosaic: [sam], batch_size: 64}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    return "tiny.yaml"


def test_compare__has_a_row_for_each_number_of_devices(recipe, capsys):
    assert main(["plan", recipe, "--compare", "1", "4", "--utilisation", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(kind in lines[0] for kind in KINDS)
    assert [line.split()[:2] for line in lines[1:3]] == [["tiny", "1"], ["tiny", "4"]]
    assert lines[-1] == "At an assumed 10% of the peak."


def test_compare__more_devices_take_as_many_hours_in_less_time(recipe):
    one, four = compare([load_recipe(recipe)], [1, 4], 0.35)
    (alone,), (shared,) = one.plans["h100"], four.plans["h100"]
    assert shared.step_seconds == pytest.approx(alone.step_seconds / 4)
    assert shared.device_hours == pytest.approx(alone.device_hours)
    assert cells(one)[:4] == ["tiny", "1", "0", "all"]


def test_compare__as_markdown(recipe, capsys):
    assert main(["plan", recipe, "--compare", "2", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# What the recipes cost"
    assert lines[-1].startswith("| tiny | 2 | ")
    assert lines[-3].count("|") == lines[-1].count("|")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "--device", "h100"], "--compare: names its own devices"),
        (["--compare", "--devices", "8"], "--compare: names its own devices"),
        (["--compare", "0"], "--compare: 0 is not a number of devices"),
        (["--markdown"], "--markdown: only --compare prints Markdown"),
        (["--compare", "--utilisation", "0"], "--utilisation: 0.0 is not between 0 and 1"),
    ],
)
def test_compare__answers_bad_arguments_in_one_line(recipe, capsys, arguments, message):
    assert main(["plan", recipe, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_without_mosaics__shows_one_image_at_a_time(recipe):
    together = load_recipe(recipe)
    alone = without_mosaics(together)
    assert alone.teachers == together.teachers
    (first,), (second,) = (
        next(compare([item], [1], 1)).plans["h100"] for item in (together, alone)
    )
    # 64 x 64 pixels hold 16 images of 16 pixels and 4 of 32
    encode = second.partitions[0].teachers[0].encode_flops
    images = [cost.sight.images for cost in first.partitions[0].teachers]
    assert images == [16, 4]
    assert {cost.encode_flops for cost in first.partitions[0].teachers} == {encode}


def rows() -> dict[tuple[str, str], list[str]]:
    """Return the rows of the page by recipe and number of devices."""
    cells = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines()]
    names = published()
    return {(row[0], row[1]): row for row in cells if row[0] in names}


def test_page__has_every_recipe_on_every_number_of_devices():
    expected = {(name, str(count)) for name in published() for count in COUNTS}
    assert rows().keys() == expected


@pytest.mark.slow
def test_page__first_stage_is_what_the_command_prints():
    recipe = load_recipe("am_radio")
    recipe = replace(recipe, stages={"stage1": recipe.stages["stage1"]})
    (plan,) = compare([recipe], [8], 0.35)
    printed = [cell.split(" / ")[0] for cell in rows()["am_radio", "8"]]
    fresh = cells(plan)
    steps = range(4, len(fresh), 2)
    assert printed[:3] == fresh[:3]
    assert [printed[column] for column in steps] == [fresh[column] for column in steps]
