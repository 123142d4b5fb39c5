"""The frozen table is FeatSharp's: same groups, directions, order; its Δm needs no more."""

import csv

import pytest

from radio_distill.evals.gain import multi_task_gain
from radio_distill.evals.headlines import HEADLINES, coverage, in_order
from radio_distill.evals.scores import read_scores
from tools.featsharp_gain import load_paper


def test_headlines__are_those_of_the_paper_in_its_order():
    paper = load_paper()
    assert len(HEADLINES) == 31
    for (ours, metric), (theirs, printed) in zip(
        HEADLINES.items(), paper.metrics.items(), strict=True
    ):
        assert (metric.group, metric.higher_is_better) == (
            printed.group, printed.higher_is_better
        ), (ours, theirs)  # fmt: skip
        assert metric.counts


def test_read_scores__the_papers_table_2_without_a_definitions_file(tmp_path):
    paper = load_paper()
    names = dict(zip(paper.metrics, HEADLINES, strict=True))
    path = tmp_path / "paper.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        order = [*reversed(paper.metrics)]
        table.writerow(["model", *(names[name] for name in order)])
        for model, run in paper.results.items():
            table.writerow([model, *(run[name] for name in order)])
    scores = read_scores([path])
    gain = multi_task_gain(scores.results, paper.baseline, in_order(scores.definitions))
    assert list(gain.num_metrics) == [group for group in paper.gains["Baseline"] if group != "Δm"]
    for model, expected in paper.recompute(corrected=False).totals.items():
        assert gain.totals[model].mean == pytest.approx(expected.mean)
    assert scores.remarks() == (coverage(HEADLINES),)


def test_coverage__says_which_groups_are_incomplete():
    names = [name for name in HEADLINES if HEADLINES[name].group not in ("VILA", "NYUDv2")]
    said = coverage(name for name in [*names, "knn/top1"])
    assert all(part in said for part in ("17 of the 31", "1 others", "NYUDv2, VILA"))
    assert "lacking" not in coverage(HEADLINES)
    assert coverage(["knn/top1"]) == ""
