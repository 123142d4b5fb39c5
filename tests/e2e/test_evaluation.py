"""An evaluation inside a run: it moves no number of training, and the best checkpoint is kept."""

import json
import math
import shutil

import failing_stage1
import pytest

import layouts
from e2e import assert_equal, rows, run, run_folder, tensors
from radio_distill.train.checkpoint import find
from stages import cli, stage1

TIMES = ("time", "images_per_second", "data_wait_share", "checkpoint_wait_share")
EVERY = ["--evaluation.every", "2", "--evaluation.during", "fidelity,agreement"]
METRIC = "fidelity/fidelity/vit"


def trained(row: dict) -> dict:
    """The numbers of a log line that training alone decides."""
    return {
        name: value
        for name, value in row.items()
        if name not in TIMES and not name.startswith("eval/")
    }


def scores(folder) -> dict[int, dict[str, float]]:
    """The scores of each step that was evaluated."""
    named = {
        row["step"]: {name: row[name] for name in row if name.startswith("eval/")}
        for row in rows(folder)
    }
    return {step: values for step, values in named.items() if values}


def test_evaluation__moves_no_number_of_training(recipe_file, caplog):
    caplog.set_level("INFO")
    folder = run_folder(recipe_file) / "stage1"
    assert run(stage1, recipe_file) == 0
    expected = [trained(row) for row in rows(folder)]
    parts = {part: tensors(folder, 6, part) for part in ("student", "ema", "optimizer")}
    found = []
    for weights in ("student", "ema"):
        assert run(stage1, recipe_file, *EVERY, "--evaluation.of", weights) == 0
        assert [trained(row) for row in rows(folder)] == expected
        for part, values in parts.items():
            assert_equal(values, tensors(folder, 6, part), part)
        found.append(scores(folder))
    assert found[0] != found[1]
    for of_run in found:
        assert list(of_run) == [2, 4, 6]
        for values in of_run.values():
            assert f"eval/{METRIC}" in values
            assert any(name.startswith("eval/agreement/") for name in values)
            assert all(map(math.isfinite, values.values()))
    assert all(f"step {step}: {METRIC}" in caplog.text for step in (2, 4, 6))


def test_evaluation__is_the_same_in_a_resumed_run_which_knows_the_best(recipe_file):
    fields = [*EVERY, "--evaluation.best", METRIC, "--log.keep_last", "1"]
    folder = run_folder(recipe_file) / "stage1"
    assert run(stage1, recipe_file, *fields) == 0
    expected = scores(folder)
    best = max(expected, key=lambda step: expected[step][f"eval/{METRIC}"])
    assert find(folder / "checkpoints" / "best").step == best
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert kept == sorted({f"step-{best:08d}", "step-00000006"})
    assert find(folder).best.score == expected[best][f"eval/{METRIC}"]

    assert run(stage1, recipe_file, *fields, "--log.keep_last", "9") == 0
    for step in ("step-00000004", "step-00000006"):
        shutil.rmtree(folder / "checkpoints" / step)
    (folder / "checkpoints" / "best").unlink()
    assert run(stage1, recipe_file, *fields, "--resume") == 0
    assert scores(folder) == expected
    assert find(folder / "checkpoints" / "best").step == best


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (["--evaluation.images", "nowhere"], ("nowhere",)),
        (["--evaluation.during", "knn"], ("evaluation.labels",)),
        (["--evaluation.during", "konn"], ("konn", "knn")),
        (["--evaluation.best", "knn/top1"], ("evaluation.best", "fidelity")),
        (["--evaluation.every", "0", "--evaluation.best", METRIC], ("evaluation.every",)),
    ],
)
def test_evaluation__what_cannot_be_scored_is_one_line_before_the_run(
    recipe_file, capfd, fields, words
):
    every = ["--evaluation.every", "2", "--evaluation.during", "fidelity"]
    assert run(stage1, recipe_file, *every, *fields) == 2
    error = capfd.readouterr().err
    assert all(word in error for word in words), error
    assert "Traceback" not in error
    assert not (run_folder(recipe_file) / "stage1").exists()


FAILING = ["--evaluation.every", "2", "--evaluation.during", "failing,fidelity"]


def test_evaluation__a_failing_benchmark_costs_its_own_scores_alone(recipe_file, caplog):
    assert run(stage1, recipe_file, *EVERY) == 0
    folder = run_folder(recipe_file) / "stage1"
    expected = [trained(row) for row in rows(folder)], scores(folder)

    best = ["--evaluation.best", "failing/share"]
    assert run(failing_stage1, recipe_file, *FAILING, *best) == 0
    assert [trained(row) for row in rows(folder)] == expected[0]
    found = scores(folder)
    assert [step for step in found if "eval/failing/share" in found[step]] == [4]
    for step, values in found.items():
        assert values[f"eval/{METRIC}"] == expected[1][step][f"eval/{METRIC}"]
    assert find(folder / "checkpoints" / "best").step == 4
    lines = [line for line in caplog.messages if "'failing'" in line]
    assert [line.partition(" has ")[0] for line in lines] == ["step 2", "step 6"]
    for line in lines:
        assert "IndexError: of two lines;" in line
        assert f"radio-distill eval {folder} --evaluation.benchmarks failing`" in line


def test_evaluation__a_benchmark_without_memory_is_told_as_such(recipe_file, caplog):
    memory = ["--evaluation.options", "{failing: {for_memory: true}}"]
    assert run(failing_stage1, recipe_file, *FAILING, *memory) == 0
    assert list(scores(run_folder(recipe_file) / "stage1")) == [4]
    assert "step 2 is not evaluated: out of memory in the evaluation at step 2" in caplog.text


def test_evaluation__a_failing_benchmark_leaves_no_process_waiting(recipe_file, crew):
    crew("failing_stage1", recipe_file, *FAILING, "--engine.device", "cpu")
    found = scores(run_folder(recipe_file) / "stage1")
    assert [f"eval/{METRIC}" in values for values in found.values()] == [True] * 3
    assert [step for step in found if "eval/failing/share" in found[step]] == [4]


@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_evaluation__moves_no_number_of_two_processes(recipe_file, crew, zero_stage):
    """ZeRO 3 has cut up the student that rank 0 scores."""
    fields = ["--stage.steps", "3", "--stage.ema_decay", "0", "--engine.zero_stage"]
    fields += [str(zero_stage), "--engine.device", "cpu", "--stage.freeze_body_steps", "0"]
    folder = run_folder(recipe_file) / "stage1"
    found = []
    for more in ([], ["--evaluation.every", "1"]):
        crew("stage1", recipe_file, *fields, *more)
        found.append(([trained(row) for row in rows(folder)], tensors(folder, 3)))
    assert json.dumps(found[0][0]) == json.dumps(found[1][0])
    assert_equal(found[0][1], found[1][1])
    assert list(scores(folder)) == [1, 2, 3]


PROBE = ["--evaluation.options", "{voc: {steps: 6, images_per_step: 3, crop: [64, 64]}}"]


def values(folder) -> dict[str, float]:
    """The scores that `eval` wrote into a folder."""
    lines = (json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines())
    return {f"{line['benchmark']}/{line['metric']}": line["value"] for line in lines}


def test_evaluation__of_two_processes_has_the_scores_of_one(recipe_file, tmp_path, crew):
    """Of three images of a step one process has two; what is no probe each of them scores."""
    data = json.dumps({"voc": str(layouts.voc(tmp_path / "voc"))})
    asked = ["--recipe", str(recipe_file), "--models", "vit", "--evaluation.data", data, *PROBE]
    asked += ["--evaluation.benchmarks", "[voc, agreement]"]
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        output = ["--output", str(tmp_path / name / "scores.jsonl")]
        command = ["eval", *asked, *output]
        if name == "one":
            assert cli.main(command) == 0
        else:
            crew("cli", *command)
        found.append(values(tmp_path / name))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert "voc/miou" in found[0]


def test_evaluation__trains_a_probe_on_rank_0_while_the_others_wait(recipe_file, tmp_path, crew):
    data = json.dumps({"voc": str(layouts.voc(tmp_path / "voc"))})
    fields = ["--evaluation.every", "3", "--evaluation.during", "voc", "--evaluation.data", data]
    crew("stage1", recipe_file, *fields, *PROBE)
    found = scores(run_folder(recipe_file) / "stage1")
    assert list(found) == [3, 6]
    assert all(math.isfinite(values["eval/voc/miou"]) for values in found.values())
