"""What numbers were taken of stands under their table, on the way through a file."""

from dataclasses import replace
from pathlib import Path

from radio_distill.evals.scores import read_scores, write_scores
from radio_distill.evals.subjects import Subject
from radio_distill.report.gain_tables import score_tables
from radio_distill.types import Score
from stages.commands.evaluate import show

TOP1 = Score("knn", "top1", 61.5, "%", True, "Classification", 12, details={"classes": 7})
MIOU = Score("segmentation", "miou", 40.0, "%", True, "Dense", 5, details={"ignored": "0, 255"})


def student(name: str) -> Subject:
    return Subject(folder=f"/runs/{name}", stage="stage1", weights=name, name=name)


def test_score_tables__each_says_what_its_numbers_were_taken_of(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    other = replace(TOP1, num_samples=11, details={"classes": 6})
    macro = replace(TOP1, metric="macro_accuracy", headline=False)
    for name, scores in (("a", [TOP1, macro, MIOU]), ("b", [other]), ("c", [TOP1])):
        write_scores(path, student(name), scores)
    found = read_scores([path])
    tables = score_tables(found.results, found.definitions, found.measured)
    assert {table.title.partition(":")[0]: table.notes for table in tables} == {
        "Classification": ("knn: images 12, classes 7", "knn: images 11, classes 6"),
        "Dense": ("segmentation: images 5, ignored 0, 255",),
    }


def test_show__details_survive_the_file(tmp_path, capsys):
    write_scores(tmp_path / "scores.jsonl", student("a"), [TOP1, MIOU])
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
    assert read_scores([path]).results == {"a": [{"knn/top1": 61.5}]}
