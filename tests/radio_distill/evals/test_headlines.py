"""The frozen table is FeatSharp's: same groups, directions, order; its Δm needs no more."""

import csv
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import layouts
from radio_distill.config import EvaluationConfig
from radio_distill.evals.datasets import DATASETS
from radio_distill.evals.encoder import Encoder
from radio_distill.evals.gain import Metric, multi_task_gain
from radio_distill.evals.headlines import HEADLINES, coverage, in_order
from radio_distill.evals.run import BENCHMARKS, evaluate
from radio_distill.evals.scores import read_scores
from radio_distill.evals.suites import PUBLISHED, with_suite
from radio_distill.types import Features
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


class Lengths:
    """A text tower that knows how long a text is."""

    def embed(self, texts):
        return torch.tensor([[len(text), 1.0, 2.0] for text in texts])


def colours(pixels):
    spatial = F.avg_pool2d(pixels, 16)
    return Features(spatial.mean(dim=(2, 3)), spatial)


ENCODER = Encoder(
    "colours", colours, 16, inner=lambda pixels, n: [colours(pixels)] * n, text=Lengths()
)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "sam_coco"])
def test_benchmarks__headlines_are_those_of_the_table(name, tmp_path):
    """On a generated set of the same layout, in the quick suite; SAM needs a decoder."""
    wanted = {source.removeprefix("data.") for source in BENCHMARKS.get(name).sources.values()}
    data = {it: str(getattr(layouts, it)(tmp_path / it)) for it in wanted & set(DATASETS.names())}
    own = {"k": 2, "steps": 2, "size": 64, "crop": [64, 64], "fit": [64, 64]}
    known = BENCHMARKS.get(name).__dataclass_fields__.keys() - BENCHMARKS.get(name).sources.keys()
    options = {name: {field: value for field, value in own.items() if field in known}}
    config, _ = with_suite(EvaluationConfig(data=data, size=64, options=options), "quick")
    scores = evaluate(ENCODER, replace(config, benchmarks=(name,)))
    found = {
        score.name: Metric(
            group=score.group, higher_is_better=score.higher_is_better, unit=score.unit
        )
        for score in scores
        if score.headline and not score.trained_for
    }
    assert found == {key: it for key, it in HEADLINES.items() if key.startswith(f"{name}/")}
    assert scores
    assert all("-quick@" in score.protocol for score in scores)
