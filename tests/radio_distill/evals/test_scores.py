import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from radio_distill.errors import ConfigError, DataError, UnknownNameError
from radio_distill.evals.gain import Measured, Metric
from radio_distill.evals.score_tables import read_definitions
from radio_distill.evals.scores import read_scores, write_scores
from radio_distill.evals.subjects import Subject
from radio_distill.types import Score

LINE = {
    "subject": "s2", "benchmark": "knn", "metric": "top1", "value": 61.5, "unit": "%",
    "higher_is_better": True, "group": "Classification", "num_samples": 12,
}  # fmt: skip


def write_lines(path: Path, *lines: dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def subject(run: str = "runs/mine", stage: str = "stage1", **fields: object) -> Subject:
    """A student; its weights are its own unless they are given."""
    values = {"step": 40, "seed": 0, "recipe": "r", **fields}
    values.setdefault("weights", f"{run} {stage} {values['step']} {values['seed']}")
    return Subject(folder=f"/home/{run}", stage=stage, **values)  # type: ignore[arg-type]


def teacher(run: str, weights: str = "w", name: str = "dino") -> Subject:
    return Subject(folder=f"/home/{run}", weights=weights, reference=f"teacher {name}")


def score(value: float, metric: str = "top1", **fields: object) -> Score:
    return Score("knn", metric, value, "%", True, "Classification", 12, **fields)  # type: ignore[arg-type]


def write(path: Path, *subjects: Subject, first: float = 1.0) -> Path:
    """Write one score of each, ``first``, ``first + 1``, …"""
    for number, item in enumerate(subjects):
        write_scores(path, item, [score(first + number)])
    return path


def values(path: Path, *more: Path) -> dict[str, list[float]]:
    results = read_scores([path, *more]).results
    return {label: [run["knn/top1"] for run in runs] for label, runs in results.items()}


def test_read_scores__what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run" / "scores.jsonl"
    write_scores(path, subject(stage="stage3-s2"), [score(61.5, pixels="64x64")])
    depth = Score("depth", "rmse", 0.25, "m", False, "Dense", 3, trained_for=True)
    write_scores(path, subject(stage="stage3-tile"), [depth])
    scores = read_scores([tmp_path])
    assert scores.results == {
        "stage3-s2": [{"knn/top1": 61.5}],
        "stage3-tile": [{"depth/rmse": 0.25}],
    }
    assert scores.definitions == {
        "knn/top1": Metric(group="Classification", higher_is_better=True, unit="%"),
        "depth/rmse": Metric(group="Dense", higher_is_better=False, unit="m", trained_for=True),
    }
    assert scores.measured["stage3-s2"] == {"knn/top1": Measured(12, "64x64")}
    assert scores.subjects["stage3-s2"] == [subject(stage="stage3-s2")]
    assert [item.name for item in path.parent.iterdir()] == ["scores.jsonl"]


def test_write_scores__a_line_says_run_stage_and_step(tmp_path: Path) -> None:
    path = write(tmp_path / "two.jsonl", subject("a/mine", seed=3), subject("b/other", step=7))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    chosen = ("subject", "run", "stage", "step", "seed", "value")
    assert [tuple(line[name] for name in chosen) for line in lines] == [
        ("mine/stage1", "mine", "stage1", 40, 3, 1.0),
        ("other/stage1", "other", "stage1", 7, 0, 2.0),
    ]


def test_write_scores__replaces_the_same_model_and_what_was_trained_anew_in_its_place(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "scores.jsonl", subject(), subject(step=60), teacher("runs/mine"))
    assert values(path) == {"stage1/step-40": [1.0], "stage1/step-60": [2.0], "teacher dino": [3.0]}
    write(path, subject(weights="trained anew"), first=5.0)
    moved = Subject(**{**asdict(subject(step=60)), "folder": "/elsewhere/mine"})
    write(path, moved, teacher("runs/other"), first=6.0)
    assert sorted(values(path).values()) == [[5.0], [6.0], [7.0]]


def test_read_scores__a_run_folder_that_was_moved_is_what_it_is_called_now(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    here = Subject(folder=str(run), stage="stage1", step=4, weights="w", recipe="r")
    write(run / "scores.jsonl", here)
    other = write(tmp_path / "copied.jsonl", subject("other", recipe="another"))
    assert set(values(run / "scores.jsonl", other)) == {"mine/stage1", "other/stage1"}
    (tmp_path / "kept.jsonl").write_bytes((run / "scores.jsonl").read_bytes())
    assert set(values(tmp_path / "kept.jsonl", other)) == {"mine/stage1", "other/stage1"}
    run.rename(tmp_path / "best")
    assert set(values(tmp_path / "best" / "scores.jsonl", other)) == {"best/stage1", "other/stage1"}


@pytest.mark.parametrize("name", ["scores.jsonl", "mine.jsonl"])
def test_write_scores__beside_a_run_whatever_the_file_is_called(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    first, anew = (
        Subject(folder=str(run), stage="stage1", step=40, weights=weights) for weights in "ab"
    )
    path = write(run / name, first)
    assert read_scores([path]).subjects["stage1"] == [first]
    write(path, anew, first=2)
    assert values(path) == {"stage1": [2.0]}


def test_write_scores__failure_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = write(tmp_path / "scores.jsonl", subject())
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_scores(path, subject(), [score(object())])  # type: ignore[arg-type]
    assert path.read_bytes() == before
    path.write_text("no score\n")
    with pytest.raises(DataError, match="line 1"):
        write_scores(path, subject(), [score(1.0)])


def test_write_scores__of_several_at_once_none_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    with ThreadPoolExecutor(4) as pool:
        runs = [subject(f"run{number}", recipe=f"r{number}") for number in range(24)]
        list(pool.map(lambda run: write(path, run), runs))
    assert len(values(path)) == 24


def test_read_scores__two_runs_of_unlike_recipes_are_two_models(tmp_path: Path) -> None:
    mine, other = subject("mine"), subject("other", recipe="another")
    together = write(tmp_path / "both.jsonl", mine, other)
    apart = [write(tmp_path / f"{n}.jsonl", s, first=f) for n, s, f in
             (("a", mine, 1.0), ("b", other, 2.0))]  # fmt: skip
    expected = {"mine/stage1": [1.0], "other/stage1": [2.0]}
    assert values(together) == values(*apart) == expected


def test_read_scores__runs_of_one_name_are_called_by_their_place(tmp_path: Path) -> None:
    path = write(tmp_path / "two.jsonl", subject("x/demo"), subject("y/demo", recipe="another"))
    assert values(path) == {"x/demo/stage1": [1.0], "y/demo/stage1": [2.0]}


def test_read_scores__seeds_are_one_model_only_where_all_else_is_the_same(tmp_path: Path) -> None:
    seeds = [subject(f"seed{n}", seed=n) for n in range(3)]
    path = write(tmp_path / "seeds.jsonl", *seeds)
    scores = read_scores([path])
    assert values(path) == {"stage1": [1.0, 2.0, 3.0]}
    assert scores.notes == [
        "Seeds of one recipe and stage: stage1 is seed0 with seed 0, seed1 with seed 1, seed2 with "
        "seed 2."
    ]
    write(path, subject("other", recipe="another", seed=4), first=9.0)
    assert values(path) == {"seed0+2 more/stage1": [1.0, 2.0, 3.0], "other/stage1": [9.0]}

    unlike = {"step": {"step": 60}, "stage": {"stage": "stage2"}, "recipe": {"recipe": "another"},
              "recipe not known": {"recipe": ""}, "seed twice": {"seed": 0}}  # fmt: skip
    for what, fields in unlike.items():
        other = subject("seed1", **{"seed": 1, "weights": what, **fields})
        path = write(tmp_path / f"{what}.jsonl", subject("seed0"), other)
        assert sorted(values(path).values()) == [[1.0], [2.0]], what
        assert len(set(values(path))) == 2


def test_read_scores__seeds_with_unlike_metrics_are_not_one_result(tmp_path: Path) -> None:
    path = write(tmp_path / "seeds.jsonl", subject("a"))
    write_scores(path, subject("b", seed=1), [score(2.0, "top5")])
    assert read_scores([path]).results == {"stage1": [{"knn/top1": 1.0}, {"knn/top5": 2.0}]}


def test_read_scores__checkpoints_of_one_stage_are_rows_of_their_own(tmp_path: Path) -> None:
    path = write(
        tmp_path / "steps.jsonl", subject(step=20), subject(step=40), subject(stage="stage2")
    )
    assert values(path) == {"stage1/step-20": [1.0], "stage1/step-40": [2.0], "stage2": [3.0]}


def test_read_scores__one_model_in_two_files_is_one_result(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", subject())
    again = write(tmp_path / "b.jsonl", subject())
    assert values(path, again) == {"stage1": [1.0]}
    write_scores(again, subject(), [score(3.0, "top5")])
    assert read_scores([path, again]).results == {"stage1": [{"knn/top1": 1.0, "knn/top5": 3.0}]}
    write(again, subject(), first=2.0)  # asked something else: neither seeds nor one result
    assert sorted(values(path, again).values()) == [[1.0], [2.0]]
    assert all("stage1" in label for label in values(path, again))


def test_read_scores__teachers_are_called_by_their_run_only_where_they_differ(
    tmp_path: Path,
) -> None:
    same = [write(tmp_path / f"{run}.jsonl", teacher(run)) for run in ("a", "b")]
    assert values(*same) == {"teacher dino": [1.0]}
    other = write(tmp_path / "c.jsonl", teacher("c", "other weights"), first=4.0)
    assert values(*same, other) == {"a/teacher dino": [1.0], "c/teacher dino": [4.0]}
    assert read_scores([*same, other]).teachers == {"a/teacher dino", "c/teacher dino"}


def test_read_scores__given_names_are_kept(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.jsonl", subject(name="large crops"), subject("other", recipe="another")
    )
    assert values(path) == {"large crops": [1.0], "other/stage1": [2.0]}
    twice = write(tmp_path / "t.jsonl", subject("other", name="large crops", recipe="another"))
    assert len(values(path, twice)) == 3


def test_named__the_parts_of_a_label_that_only_one_has(tmp_path: Path) -> None:
    stages = [subject("mine", stage) for stage in ("stage2", "stage3-s2", "stage3-tile")]
    path = write(tmp_path / "s.jsonl", *stages, subject("mine", "stage3-tile", step=60),
                 subject("other", "stage3-s2", recipe="another"))  # fmt: skip
    scores = read_scores([path])
    found = {wanted: scores.named(wanted) for wanted in ("stage2", "mine/s2", "step-60", "other")}
    assert found == {
        "stage2": "mine/stage2", "mine/s2": "mine/stage3-s2",
        "step-60": "mine/stage3-tile/step-60", "other": "other/stage3-s2",
    }  # fmt: skip
    with pytest.raises(UnknownNameError, match=r"'s2'.*mine/stage3-s2.*other/stage3-s2"):
        scores.named("s2", "baseline")
    with pytest.raises(UnknownNameError, match="'tlie'"):
        scores.named("tlie")


def test_named__run_and_step_where_the_label_has_none_and_a_seed_by_its_run(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", subject("seed0"), subject("seed1", seed=1), teacher("seed0"))
    scores = read_scores([path])
    for wanted in ("stage1", "seed0", "seed1/stage1", "seed0/stage1/step-40"):
        assert scores.named(wanted) == "stage1"
    assert scores.named("teacher dino") == "teacher dino"


def test_read_scores__files_from_before_are_told_apart_by_their_place(tmp_path: Path) -> None:
    """Lines without run, stage and step: nothing says that these are seeds."""
    one = write_lines(tmp_path / "a" / "scores.jsonl", LINE, {**LINE, "metric": "top5"})
    other = write_lines(tmp_path / "b" / "scores.jsonl", {**LINE, "value": 62.5})
    scores = read_scores([tmp_path])
    assert scores.results == {
        "a/s2": [{"knn/top1": 61.5, "knn/top5": 61.5}],
        "b/s2": [{"knn/top1": 62.5}],
    }
    assert str(one) in scores.notes[0]
    assert str(other) in scores.notes[0]
    assert read_scores([one]).results == {"s2": [{"knn/top1": 61.5, "knn/top5": 61.5}]}
    # a file of anyone's own may repeat a metric for several results
    write_lines(other, LINE, {**LINE, "value": 60.0})
    assert read_scores([other]).results == {"s2": [{"knn/top1": 61.5}, {"knn/top1": 60.0}]}


def test_write_scores__lines_from_before_are_replaced_in_their_run_alone(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    own = write_lines(run / "scores.jsonl", {**LINE, "subject": "stage1"}, LINE)
    write_scores(own, Subject(folder=str(run), stage="stage1", step=4, weights="w"), [score(2.0)])
    assert values(own) == {"s2": [61.5], "stage1": [2.0]}
    shared = write_lines(tmp_path / "two.jsonl", {**LINE, "subject": "stage1"})
    write(shared, subject())
    assert values(shared) == {"two/stage1": [61.5], "mine/stage1": [1.0]}


def test_read_scores__a_table_of_ones_own_adds_to_a_model_and_never_averages(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "scores.jsonl", subject())
    table = tmp_path / "mine.csv"
    table.write_text("model,coco/map\nstage1,30\nother,31\n")
    assert read_scores([path, table]).results["stage1"] == [{"knn/top1": 1.0, "coco/map": 30.0}]
    table.write_text("model,knn/top1\nstage1,30\n")
    with pytest.raises(DataError, match=r"'stage1'.*knn/top1"):
        read_scores([path, table])


def test_check_alike__unlike_numbers_of_images_are_not_compared(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", subject("a"))
    more = Score("knn", "top1", 2.0, "%", True, "Classification", 99)
    write_scores(path, subject("b", recipe="another"), [more])
    with pytest.raises(DataError, match=r"12 for a/stage1.*99 for b/stage1"):
        read_scores([path]).check_alike()
    read_scores([path]).only(["a/stage1"]).check_alike()
    for run, classes in (("a", 3), ("b", 4)):
        write_scores(path, subject(run, recipe=run), [score(1.0, details={"classes": classes})])
    with pytest.raises(DataError, match="classes 3 for a/stage1"):
        read_scores([path]).check_alike()


def test_remarks__unlike_sizes_and_teachers_are_said(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    for run, pixels, against in (("a", "64x64", "dino1"), ("b", "96x96", "dino2")):
        fidelity = Score("fidelity", "fidelity/dino", 1.0, "1", True, "Fidelity", 4,
                         trained_for=True, pixels="64x64", against=against)  # fmt: skip
        write_scores(path, subject(run, recipe=run), [score(1.0, pixels=pixels), fidelity])
    assert read_scores([path]).remarks() == (
        "knn/top1 is at different sizes in pixels: 64x64 (a/stage1); 96x96 (b/stage1).",
        "fidelity/fidelity/dino is to different teachers of that name: a/stage1 and b/stage1.",
    )
    assert read_scores([path]).only(["a/stage1"]).remarks() == ()


def test_read_scores__yaml_json_and_csv_agree(tmp_path: Path) -> None:
    expected = {"base": [{"top1": 50.0, "rmse": 0.4}], "new": [{"top1": 51.0}, {"top1": 53.0}]}
    yaml_file, json_file, csv_file = (tmp_path / f"scores.{end}" for end in ("yaml", "json", "csv"))
    yaml_file.write_text("base: {top1: 50, rmse: 4e-1}\nnew: [{top1: 51}, {top1: 53.0}]\n")
    json_file.write_text(json.dumps(expected))
    csv_file.write_text("\ufeffmodel,top1,rmse\nbase,50,0.4\nnew,51,\nnew,53,\n", encoding="utf-8")
    capitals = (tmp_path / f"OTHER.{end.upper()}" for end in ("yaml", "json", "csv"))
    given = [yaml_file, json_file, csv_file]
    for path in [*given, *map(shutil.copy, given, capitals)]:
        assert read_scores([path]).results == expected


def test_read_scores__incomplete_results_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text("model,a,b\nm,1,\nm,2,3\n")
    assert read_scores([path]).results == {"m": [{"a": 1.0}, {"a": 2.0, "b": 3.0}]}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.jsonl", "{\n", "line 1"),
        ("s.jsonl", "[1]\n", "line 1"),
        ("s.jsonl", json.dumps({**LINE, "value": "good"}), "line 1: 'good'"),
        ("s.jsonl", json.dumps({**LINE, "value": True}), "line 1: True"),
        ("s.jsonl", json.dumps({**LINE, "value": float("nan")}), "nan"),
        ("s.jsonl", json.dumps({"subject": "s2"}), "line 1: .*'benchmark'"),
        ("s.jsonl", json.dumps({**LINE, "weights": "w"}), "line 1: .*run"),
        (
            "s.jsonl",
            json.dumps({**LINE, "weights": "w", "step": "4"}),
            "step '4'",
        ),
        ("s.jsonl", json.dumps({**LINE, "num_samples": "x"}), "line 1: num_samples"),
        ("s.yaml", "a: {top1: 1}\na: {top1: 2}\n", "'a'"),
        ("s.yaml", "a: {top1: 1, top1: 2}\n", "'top1'"),
        ("s.yaml", "a: 3\n", "s.yaml: a "),
        ("s.yaml", "- a\n", "expected a mapping"),
        ("s.yaml", "a: {b: [\n", "not valid YAML"),
        ("s.yaml", "a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("s.yaml", "a: {top1: null}\n", "None"),
        ("s.csv", "", "the first line should be"),
        ("s.csv", "model,a,a\nm,1,2\n", "the first line should be"),
        ("s.csv", "model,a,b\nm,1\n", "line 2: 2 .*3"),
        ("s.csv", "model,a\nm,n/a\n", "line 2: 'n/a'"),
        ("s.txt", "", "scores are read from"),
        ("s.jsonl", "\n", "no scores in"),
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
    with pytest.raises(DataError, match=r"gone\.csv.*No such file"):
        read_scores([tmp_path / "gone.csv"])
    with pytest.raises(DataError, match=r"scores\.jsonl"):
        read_scores([tmp_path])
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"bytes\.yaml"):
        read_scores([tmp_path / "bytes.yaml"])


def test_read_scores__contradicting_definitions(tmp_path: Path) -> None:
    write_lines(tmp_path / "a" / "scores.jsonl", LINE)
    write_lines(tmp_path / "b" / "scores.jsonl", {**LINE, "higher_is_better": False})
    with pytest.raises(DataError, match=r"'knn/top1'.*False.*--definitions"):
        read_scores([tmp_path])
    assert len(read_scores([tmp_path], settled=["knn/top1"]).results) == 2


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
    with pytest.raises(ConfigError, match="'maybe'"):
        read_definitions(path)


def test_check_alike__two_protocols_of_one_metric_never_meet(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    write_scores(path, subject(stage="stage1"), [score(1.0, protocol="knn@00000001")])
    write_scores(path, subject(stage="stage2"), [score(2.0, protocol="knn@00000002")])
    write_scores(path, subject(stage="stage3"), [score(2.0, protocol="knn@00000001")])
    earlier = write_lines(tmp_path / "earlier.jsonl", LINE)
    scores = read_scores([path, earlier])
    with pytest.raises(DataError, match=r"knn/top1 .*knn@00000001 .*knn@00000002"):
        scores.check_alike()
    alike = scores.only(
        [scores.named(name) for name in ("stage1", "stage3", "s2")]
    )  # what does not say it is as it was before
    alike.check_alike()
    assert any("knn@00000001" in text for text in alike.remarks())


def test_check_alike__what_does_not_count_may_differ(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    for stage in ("stage1", "stage2"):
        further = score(1.0, protocol=f"knn@{stage}", headline=False)
        write_scores(path, subject(stage=stage), [further])
    read_scores([path]).check_alike()
