"""Results files of lmms-eval, in the layout of its version 0.6 (written by it, shortened)."""

import copy
import json

import pytest

from radio_distill.errors import DataError
from radio_distill.evals.score_tables import read_lmms
from radio_distill.evals.scores import read_scores

FILE = {
    "results": {
        "gqa": {
            "alias": "gqa",
            "exact_match,none": 0.6008904436317379,
            "exact_match_stderr,none": 0.004366718353518981,
            "exact_match_stderr_clustered,none": "N/A",
        },
        "mme": {
            "alias": "mme",
            "mme_cognition_score,none": 608.9285714285714,
            "mme_perception_score,none": 1547.2210884353742,
            "mme_perception_score_stderr,none": "N/A",
        },
        "ocrbench": {"alias": "ocrbench", "ocrbench_accuracy,none": 0.441},
        "ai2d_no_mask": {"alias": "ai2d_no_mask", "exact_match,flexible-extract": 0.7804},
        "realworldqa": {"alias": "realworldqa", "exact_match,flexible-extract": 0.5},
    },
    "configs": {
        "gqa": {
            "task": "gqa",
            "dataset_path": "lmms-lab-encoder/GQA",
            "doc_to_text": "<function gqa_doc_to_text at 0xfffee5bbb6a0>",
            "num_fewshot": 0,
            "generation_kwargs": {"max_new_tokens": 16, "temperature": 0.0},
        }
    },
    "n-samples": {"gqa": {"original": 12578, "effective": 12578}},
    "model_name": "/home/someone/models/llava-mine",
}


def write(path, file, **changes):
    path.write_text(json.dumps({**copy.deepcopy(file), **changes}))
    return path


def test_read_scores__results_of_lmms_eval_in_the_units_of_the_paper(tmp_path):
    scores = read_scores([write(tmp_path / "results.json", FILE)])
    ((values,),) = scores.results.values()
    assert list(scores.results) == ["llava-mine"]
    assert values == pytest.approx({
        "gqa/exact_match": 60.08904436317379,
        "mme/mme_perception_score": 1547.2210884353742,
        "ocrbench/ocrbench_accuracy": 441,
        "ai2d_no_mask/exact_match": 78.04,
    })  # fmt: skip
    assert {metric.group for metric in scores.definitions.values()} == {"VILA"}
    assert scores.measured["llava-mine"]["gqa/exact_match"].num_samples == 12578
    assert any("realworldqa" in note for note in scores.notes)


def test_read_scores__a_file_called_by_name_completes_a_model(tmp_path):
    line = {"subject": "tile", "benchmark": "knn", "metric": "top1", "value": 50, "unit": "%",
            "higher_is_better": True, "group": "Classification", "num_samples": 9}  # fmt: skip
    (tmp_path / "scores.jsonl").write_text(json.dumps(line) + "\n")
    file = write(tmp_path / "results.json", FILE)
    scores = read_scores([tmp_path / "scores.jsonl", f"tile={file}"])
    ((run,),) = scores.results.values()
    assert run.keys() > {"knn/top1", "gqa/exact_match"}
    (tmp_path / "table.json").write_text('{"old": {"gqa/exact_match": 60}}')
    with pytest.raises(DataError, match="NAME=FILE"):
        read_scores([f"tile={tmp_path / 'table.json'}"])


def test_read_lmms__a_task_set_up_otherwise_is_another_protocol(tmp_path):
    other = copy.deepcopy(FILE)
    other["configs"]["gqa"]["doc_to_text"] = "<function gqa_doc_to_text at 0x7fee>"
    one, same = (read_lmms(f, "f").measured["gqa/exact_match"] for f in (FILE, other))
    assert one == same  # the same function, elsewhere in memory
    other["configs"]["gqa"]["num_fewshot"] = 4
    files = [
        write(tmp_path / "one.json", FILE),
        write(tmp_path / "two.json", other, model_name="b"),
    ]
    with pytest.raises(DataError, match="protocol gqa@"):
        read_scores(files).check_alike()


@pytest.mark.parametrize(
    ("results", "match"),
    [
        ({"realworldqa": {"exact_match,none": 0.5}}, "none of the tasks"),
        ({"pope": {"pope_accuracy,none": 0.8}}, "pope_f1_score"),
        ({"gqa": {"exact_match,none": "N/A"}}, "not a finite number"),
    ],
)
def test_read_lmms__what_is_no_score_is_one_line(results, match):
    with pytest.raises(DataError, match=match):
        read_lmms({**FILE, "results": results}, "file")
