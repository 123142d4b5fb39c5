"""The page of what recipes cost."""

from dataclasses import replace
from pathlib import Path

import pytest

from stages.recipes import load_recipe
from tools.plans_page import COUNTS, cells, compare, main, without_mosaics
from tools.published import published

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "plans.md"
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


def test_compare__more_devices_take_as_many_hours_in_less_time(recipe):
    many = "stages.stage1.partitions.low.batch_size=4194304"  # so that launches are the least
    one, four = compare([load_recipe(recipe, [many])], [1, 4], 0.35)
    (alone,), (shared,) = one.plans["h100"], four.plans["h100"]
    assert shared.step_seconds == pytest.approx(alone.step_seconds / 4)
    assert shared.device_hours == pytest.approx(alone.device_hours)


def test_cells__memory_and_micro_batch(recipe):
    (one,) = compare([load_recipe(recipe)], [1], 0.35)
    assert cells(one)[:4] == ["tiny", "1", "0", "all"]


def test_compare__prints_a_row_for_each_number_of_devices(recipe, capsys):
    assert main([recipe, "--devices", "1", "4", "--utilisation", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# What the recipes cost"
    assert "· 10%)" in "".join(lines)
    assert [line.split()[1:4] for line in lines[-2:]] == [["tiny", "|", "1"], ["tiny", "|", "4"]]
    assert len({line.count("|") for line in lines[-4:]}) == 1


def test_without_mosaics__shows_one_image_at_a_time(recipe):
    together = load_recipe(recipe)
    alone = without_mosaics(together)
    assert alone.teachers == together.teachers
    (first,), (second,) = (
        next(compare([item], [1], 1)).plans["h100"] for item in (together, alone)
    )
    # 64 x 64 pixels hold 16 images of 16 pixels and 4 of 32
    encode = second.partitions[0].teachers[0].encode_flops
    images = [cost.view.images_per_input for cost in first.partitions[0].teachers]
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
