"""The stages through their own entry points: they train, resume to the same numbers, and say what
is wrong in one line."""

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from e2e import assert_equal, one_line, rows, run, run_folder, tensors
from radio_distill.config import TeacherConfig, dtypes_of, load
from radio_distill.distill.losses import KINDS
from radio_distill.normalize.fit import ImageStream
from radio_distill.stage import resolve_stage
from radio_distill.system.distributed import World, choose_device
from radio_distill.train.checkpoint import find
from stages import fit_upsampler, stage1, stage2, stage3
from stages.cli import main as cli
from stages.recipes import describe_stage
from stages.resume import changes_since
from teachers import build_teacher

EVERYTHING = str(Path(__file__).with_name("everything.yaml"))


def test_stages__three_in_a_row(recipe_file):
    for stage in (stage1, stage2, stage3):
        assert run(stage, recipe_file) == 0
    log = rows(run_folder(recipe_file) / "stage3-bilinear")
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    expected = {"low/vit/summary", "low/cnn/features", "high/vit/features", "high/sam/features"}
    assert expected <= {name.removeprefix("loss/") for name in log[0]}
    assert "loss/high/sam/summary" not in log[0], "SAM has no summary"
    assert all(row["gradient_norm"] > 0 for row in log)
    for row in rows(run_folder(recipe_file) / "stage2"):  # weights 1 and 2
        first = sum(row[f"loss/a/{name}/{kind}"] for name, kind in product(("vit", "cnn"), KINDS))
        total = first / 3 + row["loss/b/sam/features"] * 2 / 3
        assert row["loss/total"] == pytest.approx(total, rel=1e-5)


def test_stage1__logs_the_mean_of_the_steps_since_the_line_before(recipe_file):
    fields = ("--stage.steps", "4", "--engine.micro_batch", "4")
    assert run(stage1, recipe_file, *fields) == 0
    each = [row["loss/total"] for row in rows(run_folder(recipe_file) / "stage1")]
    assert run(stage1, recipe_file, *fields, "--log.every", "2") == 0
    pairs = [row["loss/total"] for row in rows(run_folder(recipe_file) / "stage1")]
    assert pairs == pytest.approx([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2])


def test_stage1__twenty_steps_are_ten_and_ten(recipe_file):
    assert_resumes(recipe_file, 20, 10)


def test_stage1__resumes_with_everything_that_a_step_can_have(recipe_file):
    log = assert_resumes(
        recipe_file, 6, 2, ("--override", EVERYTHING), ("loss",), "stage1-bilinear"
    )
    terms = {name for row in log for name in row if name.startswith("loss/")}
    expected = {"low/vit/summary", "low/sam/features", "wider/cnn/features", "wide/mesa"}
    expected |= {"low/vit/relation", "low/cnn/relation"}
    assert expected <= {name.removeprefix("loss/") for name in terms}


def test_stage2__an_anchor_holds_the_student_at_its_start(recipe_file, two_steps):
    """The student ends nearer to it; a resumed run has the same anchor, not where it resumes."""
    folder = two_steps / "stage2"
    steps = ("--stage.steps", "4", "--stage.freeze_body_steps", "0")
    ends = {}
    for weight in ("1e-6", "30"):
        assert run(stage2, recipe_file, *steps, "--stage.anchor", weight) == 0
        ends[weight] = rows(folder)[-1]["loss/a/anchor"]
    assert ends["30"] < ends["1e-6"]
    anchored, anchor = tensors(folder, 4), tensors(folder, 4, "anchor")
    start = tensors(two_steps / "stage1", 2, "ema")
    body = [name for name in start if name.startswith("student.")]
    assert body
    assert all(torch.equal(anchor[name], start[name]) for name in body)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    assert run(stage2, recipe_file, *steps, "--stage.anchor", "30", "--resume") == 0
    assert_equal(anchored, tensors(folder, 4), "student")


EVERY_HEAD = (
    "--student.heads.vit",
    "{summary: {name: ln_mlp}, inner: {0: 0.5},"
    " features: {name: attention, options: {heads: 2, prefix: true}}}",
    "--student.heads.cnn",
    "{summary: {name: ladder}, features: {name: conv}}",
    "--student.heads.sam",
    "{features: {name: mlp, options: {layers: 1}}}",
    "--student.heads.self",
    "{summary: {name: linear}, features: {name: identity}}",
    "--teachers.self",
    "{preset: tiny_student, input_size: match, dtype: float32}",
    "--stages.stage1.partitions.low.teachers",
    "vit,cnn,sam,self",
)


def test_stage1__resumes_with_every_head(recipe_file, capfd):
    """And a stage behind it keeps them, or begins with others."""
    assert_resumes(recipe_file, 2, 1, EVERY_HEAD)
    arguments = (*EVERY_HEAD, "--stage.steps", "1", "--stage.freeze_body_steps", "0")
    assert run(stage2, recipe_file, *arguments) == 0
    changed = (*arguments, "--student.heads.cnn.features.name", "mlp")
    assert run(stage2, recipe_file, *changed) == 2
    assert "holds another student than the recipe describes" in one_line(capfd)
    assert run(stage2, recipe_file, *changed, "--stage.reset_heads", "true") == 0


def test_statistics__of_summaries_are_those_of_the_images(recipe_file):
    """And the loss is of normalised summaries: that of the first step is not that of plain ones."""
    plain = ("--stage.steps", "1", "--loss.summary", "mse")
    assert run(stage1, recipe_file, *plain) == 0
    folder = run_folder(recipe_file) / "stage1"
    before = rows(folder)[0]
    assert run(stage1, recipe_file, *plain, "--normalizer.summary", "per_channel_standardise") == 0
    checkpoint, after = find(folder), rows(folder)[0]
    stage = resolve_stage(checkpoint.recipe, "stage1", checkpoint.teachers)
    teacher = build_teacher("vit", stage.teachers["vit"], torch.device("cpu"))
    stream = ImageStream(stage, stage.partitions[0], ["vit"], World(), stage.normalizer.images)
    summaries = [
        teacher.encode(views.of_teacher("vit", seen["vit"].size)).summary.double()
        for _, views, seen, _ in stream.batches(torch.device("cpu"))
    ]
    found, expected = tensors(folder, 1, "statistics"), torch.cat(summaries)  # [24, S]
    assert len(expected) == 24
    torch.testing.assert_close(found["vit.summary/mean"], expected.mean(0))
    torch.testing.assert_close(found["vit.summary/scale"], 1 / expected.std(0, correction=0))
    assert "sam.summary/mean" not in found, "SAM has no summary"
    for name, value in before.items():
        if name.startswith("loss/low"):
            assert (after[name] == value) == ("summary" not in name), name


def assert_resumes(recipe_file, steps, save_every, arguments=(), more_parts=(), name="stage1"):
    """An interrupted run ends bit for bit the same: weights, average, moments and log."""
    parts = ["student", "ema", "optimizer", "statistics", *more_parts]
    arguments = [*arguments, "--stage.steps", str(steps), "--log.save_every", str(save_every)]
    assert run(stage1, recipe_file, *arguments) == 0
    folder = run_folder(recipe_file) / name
    whole, log = {part: tensors(folder, steps, part) for part in parts}, rows(folder)
    for step in range(save_every + 1, steps + 1):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    assert run(stage1, recipe_file, *arguments, "--resume") == 0

    for part, values in whole.items():
        assert_equal(values, tensors(folder, steps, part), part)
    for before, after in zip(log, rows(folder), strict=True):
        numbers = {name for name in before if name.startswith(("loss/", "gradient", "learning"))}
        assert {name: before[name] for name in numbers} == {name: after[name] for name in numbers}
    return log


def test_stage1__the_frozen_body_does_not_move(recipe_file):
    folder = run_folder(recipe_file) / "stage1"
    assert run(stage1, recipe_file, "--stage.ema_decay", "0") == 0
    before, after = tensors(folder, 2), tensors(folder, 4)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("student.") for name in moved)
    assert run(stage1, recipe_file, "--stage.ema_decay", "0", "--stage.learning_rate", "0.01") == 0
    faster = tensors(folder, 2)
    for name, value in before.items():
        assert torch.equal(value, faster[name]) == name.startswith("student."), name


def test_defaults__the_shortest_recipe_trains_body_and_heads(images, tmp_path):
    """Shards, a teacher, a partition; the student is small, and nothing else is said."""
    partition = {"name": "low", "size": 64, "teachers": ["vit"], "batch_size": 4}
    recipe = {
        "data": {"shards": [str(images / "shards")]},
        "student": {"architecture": "test_vit"},
        "teachers": {"vit": {"preset": "tiny_vit", "input_size": "match"}},
        "stages": {"stage1": {"steps": 6, "partitions": [partition]}},
    }
    path = tmp_path / "shortest.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert run(stage1, path, "--output", str(tmp_path), "--log.save_every", "1") == 0
    folder = tmp_path / "shortest" / "stage1"
    assert len(rows(folder)) == 6, "a short run has a curve"
    first, last = (tensors(folder, step) for step in (4, 6))  # the newest three are kept
    moved = {name.partition(".")[0] for name in first if not torch.equal(first[name], last[name])}
    assert {"student", "adaptors"} <= moved
    resolved = load(folder / "recipe.yaml")
    assert 0 < resolved.normalizer.images <= 24, "no more than 6 steps of 4 images show"

    assert changes_since(find(folder), describe_stage(load(path), "stage1")) == ([], [])


def test_micro_batches__same_step_in_pieces(recipe_file, two_steps):
    """Two partitions of unequal batch and weight, whole and in micro-batches of two."""
    arguments = ["--stage.steps", "1", "--stage.optimizer", "adamw"]
    arguments += ["--stage.freeze_body_steps", "0"]
    assert run(stage2, recipe_file, *arguments) == 0
    whole = tensors(two_steps / "stage2", 1, "optimizer")
    assert run(stage2, recipe_file, *arguments, "--engine.micro_batch", "2") == 0
    pieces = tensors(two_steps / "stage2", 1, "optimizer")
    for name, value in whole.items():
        if name.startswith("exp_avg/"):  # a tenth of the first gradient
            assert torch.allclose(
                value, pieces[name], rtol=1e-4, atol=1e-6 * float(value.abs().max())
            ), name


def test_auto_precision__is_resolved_for_the_device_and_statistics_know_it(recipe_file, own_dtype):
    """Statistics that a teacher gave in one number type are not taken for those of another."""
    tower = build_teacher("vit", TeacherConfig(preset="tiny_vit")).tower
    file = recipe_file.parent / "vit.safetensors"
    save_file({name: value.clone() for name, value in tower.model.state_dict().items()}, file)
    runs, native = recipe_file.parent / "runs" / "tiny", own_dtype(choose_device("auto", World()))
    other = "float32" if native == "bfloat16" else "bfloat16"
    arguments = ["--stage.steps", "1", "--stage.freeze_body_steps", "0"]
    arguments += ["--teachers.vit.weights", str(file)]
    arguments += ["--engine.precision", "auto", "--teachers.vit.dtype"]
    assert run(stage1, recipe_file, *arguments, "auto") == 0
    written = load(runs / "stage1" / "recipe.yaml")
    assert dtypes_of(written) == dtypes_of(find(runs / "stage1").recipe)
    assert dtypes_of(written) == {
        "engine.precision": native,
        "teachers.vit.dtype": native,
        "teachers.cnn.dtype": "float32",
        "teachers.sam.dtype": "float32",
    }
    for dtype, files in ((native, 1), (other, 2)):
        assert run(stage1, recipe_file, *arguments, dtype) == 0
        assert len(list((runs / "statistics").glob("vit-*"))) == files, dtype


def test_weights_of_teachers__are_those_of_the_checkpoint(recipe_file, capfd):
    """A run goes on with the teachers it was trained with, and with no others unless told so."""
    file = recipe_file.parent / "vit.safetensors"
    state = build_teacher("vit", TeacherConfig(preset="tiny_vit")).tower.model.state_dict()
    save_file({name: value.clone() for name, value in state.items()}, file)
    arguments = ["--stage.steps", "2", "--teachers.vit.weights", str(file)]
    assert run(stage1, recipe_file, *arguments, "--log.save_every", "1") == 0
    folder = run_folder(recipe_file) / "stage1"
    assert len(find(folder).teachers["vit"].weights_hash) == 64

    def resume(*more: str) -> int:
        shutil.rmtree(folder / "checkpoints" / "step-00000002")
        return run(stage1, recipe_file, *arguments, "--resume", *more)

    assert resume() == 0
    save_file({name: value + 1 for name, value in state.items()}, file)
    assert resume() == 2
    assert "teachers.vit: its weights" in one_line(capfd)
    assert run(stage1, recipe_file, *arguments, "--resume", "--allow-changed-recipe") == 0
    assert "teachers.vit" in "".join(find(folder).origin.changed)


def test_weights__for_a_teacher_that_had_none_are_a_change(recipe_file, capfd):
    """Random weights leave no fingerprint to compare, so their place is compared."""
    steps = ("--stage.steps", "2", "--log.save_every", "1")
    assert run(stage1, recipe_file, *steps) == 0
    folder = run_folder(recipe_file) / "stage1"
    assert find(folder).teachers["vit"].weights_hash == ""
    shutil.rmtree(folder / "checkpoints" / "step-00000002")
    file = recipe_file.parent / "vit.safetensors"
    state = build_teacher("vit", TeacherConfig(preset="tiny_vit")).tower.model.state_dict()
    save_file({name: value + 1 for name, value in state.items()}, file)
    assert run(stage1, recipe_file, *steps, "--resume", "--teachers.vit.weights", str(file)) != 0
    assert "teachers.vit.weights" in one_line(capfd)


def test_fresh_run__moves_the_earlier_one_aside(recipe_file):
    assert run(stage1, recipe_file, "--stage.steps", "1") == 0
    first = tensors(run_folder(recipe_file) / "stage1", 1)
    assert run(stage1, recipe_file, "--stage.steps", "1", "--seed", "4") == 0
    aside = recipe_file.parent / "runs" / "tiny" / "stage1.1" / "checkpoints" / "step-00000001"
    kept = load_file(aside / "student.safetensors")
    assert all(torch.equal(first[name], kept[name]) for name in first)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--teachers.vit.preset", "tiny_vitt"], "'tiny_vit"),
        (["--teacher-upsampler", "bilinaer"], "'bilinear'"),
        (["--teacher-upsampler", "tile"], "stage1"),
        (["--teachers.vit.input_size", "50"], "nearest 48"),
        pytest.param(
            ["--engine.device", "cuda"],
            "GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
        (["--teachers.sam.summary_weight", "1"], "no summary"),
        (
            ["--stage.partitions.low.mosaic", "[sam]", "--stage.partitions.low.size", "128"],
            "128x128",
        ),
        (["--normalizer.name", "phi-s"], "'phi-s' (did you mean 'phi_s'?)"),
        (["--student.architecture", "resnet18"], "student.architecture"),
        (["--stages.stage9.steps", "3"], "stages.stage9"),
    ],
)
def test_stage1__bad_input_is_one_line(recipe_file, capfd, arguments, expected):
    assert run(stage1, recipe_file, *arguments) == 2
    assert expected in one_line(capfd)


FITTED = [
    *("--teacher-upsampler", "featup", "--stages.stage3.start_from", ""),
    *("--stages.stage3.steps", "1", "--stages.stage3.freeze_body_steps", "0"),
]
FIT = ["--fit.steps", "1", "--fit.batch_size", "2", "--fit.downsampler_kernel", "4"]


def test_stage3__takes_the_upsampler_that_the_recipe_fitted(recipe_file, capfd):
    assert run(stage3, recipe_file, *FITTED) == 2
    assert "featup 2x is fitted to teacher 'vit'" in one_line(capfd)

    arguments = ["--teacher", "vit", "--upsampler", "featup", *FIT]
    assert run(fit_upsampler, recipe_file, *arguments) == 0
    assert run(stage3, recipe_file, *FITTED) == 2
    assert "48x48 px" in one_line(capfd)

    assert run(fit_upsampler, recipe_file, *arguments, "--fit.size", "64") == 0
    assert run(stage3, recipe_file, *FITTED) == 0
    log = rows(run_folder(recipe_file) / "stage3-featup")
    assert log[0]["loss/high/vit/features"] > 0


def test_cli__eval_scores_what_was_trained(two_steps):
    assert cli(["eval", str(two_steps / "stage1"), "--untrained"]) == 0
    rows = [json.loads(line) for line in (two_steps / "scores.jsonl").read_text().splitlines()]
    assert {row["subject"] for row in rows} == {"stage1", "untrained student"}
    assert {row["metric"] for row in rows} >= {"fidelity/vit", "cosine/sam", "summary_cosine/cnn"}
