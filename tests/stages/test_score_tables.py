from dataclasses import replace

from radio_distill.evals.harness import read_scores, write_scores
from radio_distill.types import Score
from stages.evaluate import show, tables_of

TOP1 = Score("knn", "top1", 61.5, "%", True, "Classification", 12, details={"classes": 7})
MIOU = Score("segmentation", "miou", 40.0, "%", True, "Dense", 5, details={"ignored": "0, 255"})


def test_tables_of__each_says_what_its_numbers_were_taken_of():
    other = replace(TOP1, num_samples=11, details={"classes": 6})
    macro = replace(TOP1, metric="macro_accuracy", headline=False)
    tables = {
        table.title: table.notes
        for table in tables_of({"a": [TOP1, macro, MIOU], "b": [other], "c": [TOP1]})
    }
    assert tables == {
        "Classification": ("knn: images 12, classes 7", "knn: images 11, classes 6"),
        "Dense": ("segmentation: images 5, ignored 0, 255",),
    }


def test_show__details_survive_the_file(tmp_path, capsys):
    write_scores(tmp_path / "scores.jsonl", "a", [TOP1, MIOU])
    assert read_scores(tmp_path / "scores.jsonl") == {"a": [TOP1, MIOU]}
    show(tmp_path / "scores.jsonl")
    printed = capsys.readouterr().out
    assert "knn: images 12, classes 7" in printed
    assert "segmentation: images 5, ignored 0, 255" in printed


def test_read_scores__of_before_there_were_details(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text(
        '{"subject": "a", "benchmark": "knn", "metric": "top1", "value": 61.5, "unit": "%", '
        '"higher_is_better": true, "group": "Classification", "num_samples": 12, '
        '"headline": true}\n'
    )
    assert read_scores(path) == {"a": [replace(TOP1, details={})]}
