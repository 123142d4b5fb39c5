"""FeatSharp's Table 2, recomputed from its Tables 3 to 6.

Two deviations are known, and shown rather than hidden: a misprinted cell, and rmse values that are
printed with too few digits for the gains computed of them (NYUDv2, and Δm through it).
"""

import dataclasses
import itertools
from pathlib import Path

import pytest

from radio_distill.evals.gain import multi_task_gain, relative_gain
from tools.featsharp_gain import Paper, comparison, load_paper, main

MODELS = ["RADIOv2.5-L", "Baseline", "Tile", "S2", "FeatUp", "FeatSharp"]
EXACT = ["Classification", "Dense", "Probe3D", "Retrieval", "Pascal Context", "VILA"]


@pytest.fixture(scope="module")
def paper() -> Paper:
    return load_paper()


def test_featsharp__is_complete(paper: Paper) -> None:
    assert list(paper.results) == list(paper.gains) == MODELS
    assert all(set(run) == set(paper.metrics) for run in paper.results.values())
    groups = [metric.group for metric in paper.metrics.values()]
    assert [groups.count(group) for group in dict.fromkeys(groups)] == [2, 3, 4, 4, 4, 3, 11]
    lower = [name for name, metric in paper.metrics.items() if not metric.higher_is_better]
    assert lower == [
        "Pascal Context surface normals", "NYUDv2 depth rmse", "NYUDv2 surface normals",
    ]  # fmt: skip


@pytest.mark.parametrize(("model", "group"), [*itertools.product(MODELS, EXACT)])
def test_featsharp__groups_are_met_to_the_printed_digit(
    paper: Paper, model: str, group: str
) -> None:
    gain = paper.recompute(corrected=True).groups[model][group].mean
    assert round(gain, 2) == paper.gains[model][group]


@pytest.mark.parametrize("model", MODELS)
def test_featsharp__nyudv2_is_met_within_the_rounding_of_its_rmse(paper: Paper, model: str) -> None:
    gain = paper.recompute(corrected=True).groups[model]["NYUDv2"].mean
    assert gain == pytest.approx(paper.gains[model]["NYUDv2"], abs=0.06)
    # Half a unit of the last digit, in both rmse values, moves a third of this:
    rmse, base = (paper.results[name]["NYUDv2 depth rmse"] for name in (model, "Baseline"))
    farthest = relative_gain(rmse - 5e-4, base + 5e-4, False) - relative_gain(rmse, base, False)
    assert 0.06 < farthest / 3 < 0.08


@pytest.mark.parametrize("model", MODELS)
def test_featsharp__total(paper: Paper, model: str) -> None:
    table = paper.recompute(corrected=True)
    printed = paper.gains[model]["Δm"]
    assert table.totals[model].mean == pytest.approx(printed, abs=0.01)
    if model != "FeatSharp":
        assert round(table.totals[model].mean, 2) == printed
    # With the printed NYUDv2 in its place, every total is met to the digit, FeatSharp's too.
    groups = [table.groups[model][group].mean for group in EXACT]
    assert round(sum([*groups, paper.gains[model]["NYUDv2"]]) / 7, 2) == printed


def test_featsharp__the_misprint_both_ways(paper: Paper) -> None:
    (correction,) = paper.corrections
    assert (correction.model, correction.metric) == ("FeatUp", "SAM COCO")
    assert paper.results["FeatUp"]["SAM COCO"] == correction.printed == 74.54
    assert correction.corrected == 75.54
    as_printed = paper.recompute(corrected=False)
    assert round(as_printed.groups["FeatUp"]["Dense"].mean, 2) == -0.30
    assert round(as_printed.totals["FeatUp"].mean, 2) == -0.20
    assert paper.gains["FeatUp"]["Dense"] == 0.14
    assert paper.gains["FeatUp"]["Δm"] == -0.13


def test_featsharp__mean_over_all_metrics_is_not_what_the_paper_prints(paper: Paper) -> None:
    one_group = {
        name: dataclasses.replace(metric, group="all") for name, metric in paper.metrics.items()
    }
    micro = multi_task_gain(paper.results, paper.baseline, one_group).totals
    assert round(micro["RADIOv2.5-L"].mean, 2) == 0.42
    assert paper.gains["RADIOv2.5-L"]["Δm"] == -0.21


def test_comparison__shows_both_readings_and_every_deviation(paper: Paper) -> None:
    recomputed, distances = comparison(paper)
    assert [row[0] for row in distances.rows] == [
        "RADIOv2.5-L", "Baseline", "Tile", "S2", "FeatUp (75.54)", "FeatUp (74.54)", "FeatSharp",
    ]  # fmt: skip
    assert "74.54" in distances.notes[0]
    large = {
        (row[0], column.name)
        for row in distances.rows
        for column, cell in zip(distances.columns, row, strict=True)
        if isinstance(cell, float) and abs(cell) > 0.015
    }
    nyud = {(row[0], "NYUDv2") for row in distances.rows} - {
        ("Baseline", "NYUDv2"),
        ("S2", "NYUDv2"),
    }
    assert large == nyud | {("FeatUp (74.54)", "Dense"), ("FeatUp (74.54)", "Δm")}
    assert any("arXiv 2502.16025" in note for note in recomputed.notes)


def test_main__the_page_has_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["markdown"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    page = (Path(__file__).parents[2] / "docs" / "multi_task_gain.md").read_text(encoding="utf-8")
    assert len(rows) == 18
    assert [row for row in rows if row not in page.splitlines()] == []
