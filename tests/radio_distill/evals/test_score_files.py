import json
from pathlib import Path

import pytest

from radio_distill.errors import ConfigError, DataError
from radio_distill.evals.harness import write_scores
from radio_distill.evals.mtl_gain import Metric
from radio_distill.evals.score_files import read_definitions, read_scores
from radio_distill.types import Score

LINE = {
    "subject": "s2", "benchmark": "knn", "metric": "top1", "value": 61.5, "unit": "%",
    "higher_is_better": True, "group": "Classification", "num_samples": 12,
}  # fmt: skip


def write_lines(path: Path, *lines: dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_read_scores__what_the_harness_writes(tmp_path: Path) -> None:
    path = tmp_path / "run" / "scores.jsonl"
    path.parent.mkdir()
    write_scores(path, "s2", [Score("knn", "top1", 61.5, "%", True, "Classification", 12)])
    write_scores(path, "tile", [Score("depth", "rmse", 0.25, "m", False, "Dense", 3)])
    scores = read_scores([tmp_path])
    assert scores.results == {"s2": [{"knn/top1": 61.5}], "tile": [{"depth/rmse": 0.25}]}
    assert scores.definitions == {
        "knn/top1": Metric(group="Classification", higher_is_better=True, unit="%"),
        "depth/rmse": Metric(group="Dense", higher_is_better=False, unit="m"),
    }


def test_read_scores__same_metric_again_is_another_result(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a" / "scores.jsonl", LINE, {**LINE, "metric": "top5"})
    other = {**LINE, "benchmark": "stereo", "metric": "recall"}
    write_lines(tmp_path / "b" / "scores.jsonl", {**LINE, "value": 62.5}, {**LINE, "value": 60.0})
    write_lines(tmp_path / "c" / "scores.jsonl", other)
    runs = read_scores([tmp_path]).results["s2"]
    assert [run["knn/top1"] for run in runs] == [61.5, 62.5, 60.0]
    assert runs[0].keys() == {"knn/top1", "knn/top5", "stereo/recall"}
    assert read_scores([first]).results == {"s2": [{"knn/top1": 61.5, "knn/top5": 61.5}]}


def test_read_scores__yaml_json_and_csv_agree(tmp_path: Path) -> None:
    expected = {"base": [{"top1": 50.0, "rmse": 0.4}], "new": [{"top1": 51.0}, {"top1": 53.0}]}
    yaml_file, json_file, csv_file = (tmp_path / f"scores.{end}" for end in ("yaml", "json", "csv"))
    yaml_file.write_text("base: {top1: 50, rmse: 4e-1}\nnew: [{top1: 51}, {top1: 53.0}]\n")
    json_file.write_text(json.dumps(expected))
    csv_file.write_text("\ufeffmodel,top1,rmse\nbase,50,0.4\nnew,51,\nnew,53,\n", encoding="utf-8")
    for path in (yaml_file, json_file, csv_file):
        assert read_scores([path]).results == expected


def test_read_scores__incomplete_results_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text("model,a,b\nm,1,\nm,2,3\n")
    assert read_scores([path]).results == {"m": [{"a": 1.0}, {"a": 2.0, "b": 3.0}]}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.jsonl", "{\n", "line 1: not JSON"),
        ("s.jsonl", "[1]\n", "line 1: a score is an object"),
        ("s.jsonl", json.dumps({**LINE, "value": "good"}), "line 1: 'good' is not a finite number"),
        ("s.jsonl", json.dumps({**LINE, "value": True}), "line 1: True is not a finite number"),
        ("s.jsonl", json.dumps({**LINE, "value": float("nan")}), "nan is not a finite number"),
        ("s.jsonl", json.dumps({"subject": "s2"}), "line 1: a score needs the field 'benchmark'"),
        ("s.yaml", "a: {top1: 1}\na: {top1: 2}\n", "'a' stands twice"),
        ("s.yaml", "a: {top1: 1, top1: 2}\n", "'top1' stands twice"),
        ("s.yaml", "a: 3\n", "a should map metrics to values"),
        ("s.yaml", "- a\n", "expected a mapping"),
        ("s.yaml", "a: {b: [\n", "not valid YAML"),
        ("s.yaml", "a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("s.yaml", "a: {top1: null}\n", "None is not a finite number"),
        ("s.csv", "", "the first line should be"),
        ("s.csv", "model,a,a\nm,1,2\n", "the first line should be"),
        ("s.csv", "model,a,b\nm,1\n", "line 2: 2 cells under 3 headings"),
        ("s.csv", "model,a\nm,n/a\n", "line 2: 'n/a' is not a finite number"),
        ("s.txt", "", "scores are read from"),
    ],
)
def test_read_scores__bad_input(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_scores([path])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_scores__missing_file_folder_and_encoding(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv: cannot be read \(No such file"):
        read_scores([tmp_path / "gone.csv"])
    with pytest.raises(DataError, match=r"no scores\.jsonl in this folder"):
        read_scores([tmp_path])
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"bytes\.yaml: cannot be read"):
        read_scores([tmp_path / "bytes.yaml"])


def test_read_scores__contradicting_definitions(tmp_path: Path) -> None:
    write_lines(tmp_path / "a" / "scores.jsonl", LINE)
    write_lines(tmp_path / "b" / "scores.jsonl", {**LINE, "higher_is_better": False})
    with pytest.raises(DataError, match=r"'knn/top1' is .*False.*settle it with --definitions"):
        read_scores([tmp_path])
    assert len(read_scores([tmp_path], settled=["knn/top1"]).results["s2"]) == 2


def test_read_definitions__order_and_fields(tmp_path: Path) -> None:
    path = tmp_path / "metrics.yaml"
    path.write_text(
        "b: {group: G, higher_is_better: false, unit: m}\na: {group: H, higher_is_better: true}\n"
    )
    definitions = read_definitions(path)
    assert list(definitions) == ["b", "a"]
    assert definitions["b"] == Metric(group="G", higher_is_better=False, unit="m")
    path.write_text("a: {group: G, higher_is_beter: true}\n")
    with pytest.raises(ConfigError, match="higher_is_better"):
        read_definitions(path)
    path.write_text("a: {group: G, higher_is_better: maybe}\n")
    with pytest.raises(ConfigError, match="'maybe' is not true or false"):
        read_definitions(path)
