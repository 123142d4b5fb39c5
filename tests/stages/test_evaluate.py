"""Results of several runs and steps keep apart, on their way from a checkpoint to a table."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import layouts
from radio_distill.config import EvaluationConfig, Recipe, TeacherConfig, build, dump
from radio_distill.evals.checkpoint_subjects import student_subject, teacher_digest, training_digest
from radio_distill.evals.scores import read_scores
from radio_distill.models.heads import build_student
from radio_distill.train import checkpoint as checkpoints
from radio_distill.train.checkpoint import Checkpoint
from radio_distill.train.checkpointer import save
from radio_distill.train.restore import load_student
from stages import cli
from stages.commands.evaluate import evaluation_with, unread_data
from stages.commands.scoring import encoder_of
from teachers import build_teacher
from teachers.text import text_tower

CPU = torch.device("cpu")
RECIPE = {
    "name": "mine",
    "data": {"shards": ["none"]},
    "student": {"architecture": "test_vit", "max_size": 64, "registers": 1, "head_hidden": 16},
    "teachers": {"vit": {"preset": "tiny_vit"}},
    "stages": {
        "stage1": {"partitions": [{"name": "a", "size": 32, "teachers": ["vit"], "batch_size": 2}]},
        "stage2": {
            "start_from": "stage1",
            "partitions": [{"name": "a", "size": 64, "teachers": ["vit"], "batch_size": 2}],
        },
    },
    "engine": {"device": "cpu"},
    "evaluation": {
        "benchmarks": ["correspondence"],
        "size": 32,
        "dense_size": 64,
        "options": {"correspondence": {"target_stride": 8}, "agreement": {"scales": [1.0, 3.0]}},
    },
}


def recipe_of(root: Path, **fields: object) -> Recipe:
    """The recipe above with fields changed, ``student__registers=2``."""
    data = yaml.safe_load(yaml.safe_dump({**RECIPE, "output": str(root)}))
    for path, value in fields.items():
        *parents, last = path.split("__")
        section = data
        for key in parents:
            section = section.setdefault(key, {})
        section[last] = value
    recipe: Recipe = build(Recipe, data)
    return recipe


def write_student(
    root: Path, stage: str = "stage1", step: int = 4, weights: int = 0, **fields: object
) -> Checkpoint:
    recipe = recipe_of(root, **fields)
    specs = {key: build_teacher(key, item, CPU).spec for key, item in recipe.teachers.items()}
    torch.manual_seed(weights)
    parts = {"student": build_student(recipe.student, specs).state_dict()}
    folder = checkpoints.folder_of(recipe.stage_folder(stage) / "checkpoints", step)
    return checkpoints.read(save(Checkpoint(folder, step, stage, recipe, specs), parts, 9))


def evaluate(*arguments: object) -> int:
    return cli.main(["eval", *map(str, arguments)])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def asked(images: Path) -> list[str]:
    return ["--evaluation.images", str(images)]


def test_eval__two_runs_keep_apart_in_one_file_and_in_their_own(tmp_path, asked, capsys):
    for number, name in enumerate(("mine", "other")):
        write_student(tmp_path, name=name, weights=number, stages__stage1__steps=10 + number)
    folders = [tmp_path / "mine", tmp_path / "other" / "stage1"]
    two = tmp_path / "two.jsonl"
    assert evaluate(*folders, *asked, "--output", two) == 0
    printed = capsys.readouterr().out
    found = {(row["subject"], row["run"], row["stage"], row["step"]) for row in lines(two)}
    assert found == {("mine/stage1", "mine", "stage1", 4), ("other/stage1", "other", "stage1", 4)}
    assert "mine/stage1" in printed
    assert "other/stage1" in printed
    together = read_scores([two])
    assert together.results["mine/stage1"] != together.results["other/stage1"]

    assert evaluate(*folders, *asked) == 0
    apart = read_scores([tmp_path / "mine", tmp_path / "other"])
    assert apart.results == together.results
    assert set(read_scores([tmp_path / "mine"]).results) == {"stage1"}


def test_eval__an_export_is_told_how_it_is_scored(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert f"--models student:{tmp_path}" in capsys.readouterr().err


def test_eval__two_checkpoints_of_one_stage_are_two_rows(tmp_path, asked, capsys):
    steps = [write_student(tmp_path, step=step, weights=step).folder for step in (2, 4)]
    assert evaluate(*steps, *asked) == 0
    scores = read_scores([tmp_path / "mine"])
    assert {label: len(runs) for label, runs in scores.results.items()} == {
        "stage1/step-2": 1,
        "stage1/step-4": 1,
    }
    assert cli.main(["score", str(tmp_path / "mine"), "--baseline", "step-2"]) == 0
    assert "stage1/step-4" in capsys.readouterr().out


def test_eval__seeds_are_averaged_and_named(tmp_path, asked, capsys):
    for seed in (1, 2):
        write_student(tmp_path, name=f"seed{seed}", seed=seed, weights=seed)
    assert evaluate(tmp_path / "seed1", tmp_path / "seed2", *asked) == 0
    printed = capsys.readouterr().out
    assert " ± " in printed
    assert "stage1 is seed1 with seed 1, seed2 with seed 2" in printed


def test_eval__names_of_the_users(tmp_path, asked, capsys):
    steps = [write_student(tmp_path, step=step, weights=step).folder for step in (2, 4)]
    assert evaluate(*steps, *asked, "--labels", "early", "late") == 0
    assert set(read_scores([tmp_path / "mine"]).results) == {"early", "late"}
    assert evaluate(*steps, *asked, "--labels", "early") == 2
    assert "--labels: 1 for 2 runs" in capsys.readouterr().err
    assert evaluate(*steps, *asked, "--labels", "one", "one") == 2
    assert "called alike (one, one)" in capsys.readouterr().err


def test_eval__a_run_folder_is_its_last_stage_and_rivals_are_named(tmp_path, asked, capsys):
    for number, stage in enumerate(("stage1", "stage2")):
        write_student(tmp_path, stage, weights=number)
    assert evaluate(tmp_path / "mine", *asked) == 0
    assert set(read_scores([tmp_path / "mine"]).results) == {"stage2"}
    (tmp_path / "mine" / "stage2").rename(tmp_path / "mine" / "stage3-tile")
    (tmp_path / "mine" / "stage1").rename(tmp_path / "mine" / "stage3-s2")
    capsys.readouterr()
    assert evaluate(tmp_path / "mine", *asked) == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith("name one: stage3-s2, stage3-tile")
    assert len(error.splitlines()) == 1


def test_eval__is_not_asked_unlike_things_of_two_runs(tmp_path, asked, capsys):
    write_student(tmp_path)
    write_student(tmp_path, name="large", weights=1, evaluation__dense_size=96)
    write_student(tmp_path, name="unlike", weights=2, teachers__vit__preset="tiny_cnn")
    folders = [tmp_path / "mine", tmp_path / "large"]
    assert evaluate(*folders, *asked) == 2
    error = capsys.readouterr().err
    assert "evaluation.dense_size is 64 in the recipe of mine/stage1" in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*/scores.jsonl"))
    assert evaluate(*folders, *asked, "--evaluation.dense_size", "64") == 0

    folders[1] = tmp_path / "unlike"
    fidelity = ["--evaluation.benchmarks", "[fidelity, agreement]"]
    assert evaluate(*folders, *asked, *fidelity) == 2
    error = capsys.readouterr().err
    assert "teacher 'vit' of mine/stage1 and of unlike/stage1" in error
    assert "--evaluation.benchmarks '[agreement]'" in error


def test_eval__each_run_has_its_own_teachers_and_untrained_student(tmp_path, asked):
    write_student(tmp_path)
    write_student(tmp_path, name="same", weights=1, seed=5)
    write_student(tmp_path, name="unlike", weights=2, teachers__vit__preset="tiny_cnn")
    runs = [tmp_path / name for name in ("mine", "same", "unlike")]
    assert evaluate(*runs, *asked, "--teachers", "--untrained") == 0
    assert set(read_scores(runs[:2]).results) == {
        "stage1", "teacher vit", "mine/untrained student", "same/untrained student",
    }  # fmt: skip
    scores = read_scores(runs)
    assert {"mine/teacher vit", "unlike/teacher vit"} == scores.teachers
    assert scores.results["mine/teacher vit"] != scores.results["unlike/teacher vit"]


def test_eval__scores_at_the_size_asked_for_above_max_size(tmp_path, asked):
    """What is scored is what ``load`` gives: the student's table of positions spans 64 px."""
    write_student(tmp_path)
    values = {}
    both = ["--evaluation.benchmarks", "[agreement, correspondence]"]
    for side in (96, 128):
        assert evaluate(tmp_path / "mine", *asked, *both, "--evaluation.dense_size", side) == 0
        rows = {row["metric"]: row for row in lines(tmp_path / "mine" / "scores.jsonl")}
        assert rows["recall@10px"]["pixels"] == f"{side}x{side}"
        assert rows["cosine"]["pixels"] == "32x32, 96x96"
        values[side] = [row["value"] for row in rows.values() if "recall" in row["metric"]]
    assert values[96] != values[128]


def test_eval__a_head_gives_the_summary_and_its_teacher_the_texts(
    tmp_path, asked, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    student = write_student(tmp_path, teachers__clip__preset="tiny_open_clip")
    own, clip = encoder_of(student), encoder_of(student, head="clip")
    pixels = torch.rand(2, 3, 32, 32)
    heads = load_student(student, CPU)(pixels, ("clip",)).features
    assert torch.equal(clip(pixels).summary, heads["clip"].summary)
    assert torch.equal(clip(pixels).spatial, own(pixels).spatial)
    assert own.text is None
    texts = ["a cat", "a dog"]
    tower = text_tower("clip", TeacherConfig(preset="tiny_open_clip"))
    assert torch.equal(clip.text.embed(texts), tower.embed(texts))
    assert evaluate(tmp_path / "mine", *asked) == 0
    assert evaluate(tmp_path / "mine", *asked, "--head", "clip", "--models", "tiny_vit") == 0
    assert set(read_scores([tmp_path / "mine"]).results) == {"stage1", "stage1 (clip)"}
    assert evaluate(tmp_path / "mine", *asked, "--head", "clop") == 2
    assert "'clip'" in capsys.readouterr().err


def test_training_digest__is_of_what_decides_the_training_but_for_the_seed(tmp_path):
    first = write_student(tmp_path)
    same = {
        "seed": 7, "name": "other", "engine__micro_batch": 1, "log__every": 3,
        "stages__stage2__steps": 9, "evaluation__size": 64, "data__workers": 0,
        "normalizer__cache": "x", "fit__steps": 5, "watch__max_skipped": 3,
        "data__index": ["elsewhere"],
    }  # fmt: skip
    unlike = {
        "stages__stage1__steps": 9, "student__drop_path": 0.1, "teachers__vit__preset": "tiny_cnn",
        "loss__feature": "am_radio", "data__flip": 0.0, "engine__precision": "float32",
        "teachers__vit__feature_weight": 2.0,
    }  # fmt: skip
    for field, value in (same | unlike).items():
        other = replace(first, recipe=recipe_of(tmp_path / "elsewhere", **{field: value}))
        assert (training_digest(other) == training_digest(first)) == (field in same), field
    assert training_digest(replace(first, stage="stage2")) != training_digest(first)
    assert training_digest(replace(first, shards="others")) != training_digest(first)
    learned = replace(first.teachers["vit"], weights_hash="other weights")
    assert teacher_digest(replace(first, teachers={"vit": learned}), "vit") != teacher_digest(
        first, "vit"
    )


def test_training_digest__a_field_that_a_later_version_adds_changes_nothing(tmp_path):
    """Seeds that were scored by two versions are seeds of one model."""

    def later(section: object, value: str) -> object:
        """The section in a version whose sections of this kind have one more field."""
        new = [("taste", str, dataclasses.field(default="sweet"))]
        kind = dataclasses.make_dataclass("Later", new, bases=(type(section),), frozen=True)
        own = {item.name: getattr(section, item.name) for item in dataclasses.fields(section)}
        return kind(**own, taste=value)

    first = write_student(tmp_path, loss__feature="am_radio")

    def all_later(value: str) -> Checkpoint:
        changed = replace(first.recipe, loss=later(first.recipe.loss, value))
        stages = {key: later(stage, value) for key, stage in changed.stages.items()}
        recipe = later(replace(changed, stages=stages), value)
        specs = {key: later(spec, value) for key, spec in first.teachers.items()}
        return replace(first, recipe=recipe, teachers=specs)

    same, other = all_later("sweet"), all_later("sour")
    assert training_digest(same) == training_digest(first) != training_digest(other)
    assert teacher_digest(same, "vit") == teacher_digest(first, "vit")
    assert teacher_digest(other, "vit") != teacher_digest(first, "vit")


def test_training_digest__fitted_upsamplers_are_known_by_their_checksum(tmp_path):
    first = write_student(tmp_path)

    def digest(path: str, sha256: str) -> str:
        upsampler = {"name": "featup", "weights": {"vit": path}}
        upsampler |= {"sha256": {"vit": sha256}} if sha256 else {}
        recipe = recipe_of(tmp_path, stages__stage1__upsampler=upsampler)
        return training_digest(replace(first, recipe=recipe))

    assert digest("a/x", "1" * 64) == digest("b/x", "1" * 64)
    assert digest("a/x", "1" * 64) != digest("a/x", "2" * 64)
    assert digest("a/x", "") != digest("b/x", "")


def test_student_subject__of_a_checkpoint_that_was_copied_out_of_its_run(tmp_path):
    inside = write_student(tmp_path)
    copy = tmp_path / "kept" / "step-00000004"
    copy.parent.mkdir()
    inside.folder.rename(copy)
    subject = student_subject(checkpoints.read(copy))
    assert (subject.run, subject.stage, subject.step) == ("kept", "stage1", 4)
    assert subject.weights == inside.weights_sha256


def test_evaluation_with__fields_of_the_command_line(tmp_path):
    recipe = recipe_of(tmp_path)
    changed = evaluation_with(recipe, ["evaluation.limit=7"])
    assert (changed.limit, changed.size) == (7, 32)
    assert "limit: 7" not in dump(recipe)


def test_unread_data__is_what_no_benchmark_asked_reads():
    fields = ["evaluation.labels=flowers", "evaluation.limit=7", "evaluation.data={voc: v}"]
    evaluation = EvaluationConfig(benchmarks=("agreement",), labels="flowers", data={"voc": "v"})
    labels, data = unread_data(evaluation, fields)
    assert labels.startswith("evaluation.labels is read by none of agreement; ")
    assert labels.endswith("cam, knn")
    assert data.startswith("evaluation.data is read by none of agreement; ")
    assert data.endswith("voc")
    assert unread_data(replace(evaluation, benchmarks=("knn", "voc")), fields) == []
    assert unread_data(evaluation, ["evaluation.images=here", "evaluation.data_limit=3"]) == []


def test_eval__a_suite_asks_what_data_is_named_for(tmp_path, asked, images):
    for split in ("train", "val"):  # two classes of one image each
        for number in range(2):
            (folder := tmp_path / "sets" / split / str(number)).mkdir(parents=True)
            (folder / "0.png").symlink_to(images / f"{number}.png")
    file = tmp_path / "scores.jsonl"
    model = ["--models", "tiny_vit", "--suite", "quick", "--output", file]
    more = {"labels": tmp_path / "sets", "options.knn": "{k: 1}", "size": 32, "dense_size": 64}
    fields = [word for name, value in more.items() for word in (f"--evaluation.{name}", value)]
    assert evaluate(*model, *asked, *fields) == 0
    written = lines(file)
    assert {"knn", "correspondence", "agreement"} <= {line["benchmark"] for line in written}
    assert all(line["protocol"].partition("@")[0].endswith("-quick") for line in written)
    some = ["--evaluation.benchmarks", "[knn]", "--again"]
    (folder := tmp_path / "some").mkdir()
    assert evaluate(*model[:-1], folder / "scores.jsonl", *asked, *fields, *some) == 0
    assert {line["benchmark"] for line in lines(folder / "scores.jsonl")} == {"knn"}


def test_eval__runs_are_asked_of_a_data_set_by_name(tmp_path):
    for name in ("mine", "other"):
        write_student(tmp_path, name=name)
    data = f"{{coco_retrieval: {layouts.coco_retrieval(tmp_path / 'coco')}}}"
    benchmarks = ["--evaluation.benchmarks", "[coco_retrieval]", "--evaluation.data", data]
    runs = [tmp_path / name for name in ("mine", "other")]
    models = ["--models", "tiny_open_clip", "--output", tmp_path / "all.jsonl"]
    assert evaluate(*runs, *benchmarks, *models) == 0
    assert {row["subject"] for row in lines(tmp_path / "all.jsonl")} == {"tiny_open_clip"}
