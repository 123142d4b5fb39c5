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

from radio_distill.config import TeacherConfig, dtypes_of, load
from radio_distill.distill.losses import KINDS
from radio_distill.system.distributed import World, choose_device
from radio_distill.train.checkpoint import find
from stages import fit_upsampler, stage1, stage2, stage3
from stages.cli import main as cli
from stages.common import changes_that_matter
from teachers import build_teacher

EVERYTHING = str(Path(__file__).with_name("everything.yaml"))


def run(stage, recipe_file: Path, *arguments: str) -> int:
    return stage.main([str(recipe_file), *arguments])


def weights(recipe_file: Path, stage: str, step: int, part: str = "student"):
    folder = recipe_file.parent / "runs" / "tiny" / stage / "checkpoints" / f"step-{step:08d}"
    return load_file(folder / f"{part}.safetensors")


def log(recipe_file: Path, stage: str) -> list[dict]:
    path = recipe_file.parent / "runs" / "tiny" / stage / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def one_line(capfd) -> str:
    """Return the last line of stderr, and check that there was no stack trace."""
    error = capfd.readouterr().err
    assert "Traceback" not in error, error
    return error.strip().splitlines()[-1]


def test_stages__three_in_a_row(recipe_file):
    for stage in (stage1, stage2, stage3):
        assert run(stage, recipe_file) == 0
    rows = log(recipe_file, "stage3-bilinear")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    expected = {"low/vit/summary", "low/cnn/features", "high/vit/features", "high/sam/features"}
    assert expected <= {name.removeprefix("loss/") for name in rows[0]}
    assert "loss/high/sam/summary" not in rows[0], "SAM has no summary"
    assert all(row["gradient_norm"] > 0 for row in rows)
    for row in log(recipe_file, "stage2"):  # weights 1 and 2
        first = sum(row[f"loss/a/{name}/{kind}"] for name, kind in product(("vit", "cnn"), KINDS))
        total = first / 3 + row["loss/b/sam/features"] * 2 / 3
        assert row["loss/total"] == pytest.approx(total, rel=1e-5)


def test_stage1__logs_the_mean_of_the_steps_since_the_line_before(recipe_file):
    fields = ("--stage.steps", "4", "--engine.micro_batch", "4")
    assert run(stage1, recipe_file, *fields) == 0
    each = [row["loss/total"] for row in log(recipe_file, "stage1")]
    assert run(stage1, recipe_file, *fields, "--log.every", "2") == 0
    pairs = [row["loss/total"] for row in log(recipe_file, "stage1")]
    assert pairs == pytest.approx([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2])


def test_stage1__twenty_steps_are_ten_and_ten(recipe_file):
    assert_resumes(recipe_file, 20, 10)


def test_stage1__resumes_with_everything_that_a_step_can_have(recipe_file):
    rows = assert_resumes(
        recipe_file, 6, 2, ("--override", EVERYTHING), ("loss",), "stage1-bilinear"
    )
    terms = {name for row in rows for name in row if name.startswith("loss/")}
    expected = {"low/vit/summary", "low/sam/features", "wider/cnn/features", "wide/mesa"}
    assert expected <= {name.removeprefix("loss/") for name in terms}


def assert_resumes(recipe_file, steps, save_every, arguments=(), more_parts=(), name="stage1"):
    """An interrupted run ends bit for bit the same: weights, average, moments and log."""
    parts = ["student", "ema", "optimizer", "statistics", *more_parts]
    arguments = [*arguments, "--stage.steps", str(steps), "--log.save_every", str(save_every)]
    assert run(stage1, recipe_file, *arguments) == 0
    whole = {part: weights(recipe_file, name, steps, part) for part in parts}
    rows = log(recipe_file, name)

    folder = recipe_file.parent / "runs" / "tiny" / name / "checkpoints"
    for step in range(save_every + 1, steps + 1):
        shutil.rmtree(folder / f"step-{step:08d}", ignore_errors=True)
    assert run(stage1, recipe_file, *arguments, "--resume") == 0

    for part, tensors in whole.items():
        resumed = weights(recipe_file, name, steps, part)
        assert tensors.keys() == resumed.keys()
        for key, value in tensors.items():
            assert torch.equal(value, resumed[key]), f"{part}/{key}"
    for before, after in zip(rows, log(recipe_file, name), strict=True):
        numbers = {name for name in before if name.startswith(("loss/", "gradient", "learning"))}
        assert {name: before[name] for name in numbers} == {name: after[name] for name in numbers}
    return rows


def test_stage1__the_frozen_body_does_not_move(recipe_file):
    assert run(stage1, recipe_file, "--stage.ema_decay", "0") == 0
    before, after = weights(recipe_file, "stage1", 2), weights(recipe_file, "stage1", 4)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("student.") for name in moved)
    frozen = weights(recipe_file, "stage1", 2)
    assert run(stage1, recipe_file, "--stage.ema_decay", "0", "--stage.learning_rate", "0.01") == 0
    faster = weights(recipe_file, "stage1", 2)
    for name, value in frozen.items():
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
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 6, "a short run has a curve"
    first, last = (
        load_file(folder / "checkpoints" / f"step-{step:08d}" / "student.safetensors")
        for step in (4, 6)  # the newest three are kept
    )
    moved = {name.partition(".")[0] for name in first if not torch.equal(first[name], last[name])}
    assert {"student", "adaptors"} <= moved
    resolved = load(folder / "recipe.yaml")
    assert 0 < resolved.normalizer.images <= 24, "no more than 6 steps of 4 images show"

    assert changes_that_matter(find(folder).recipe, load(path), "stage1") == ([], [])


def test_micro_batches__same_step_in_pieces(recipe_file):
    """Two partitions of unequal batch and weight, whole and in micro-batches of two."""
    assert run(stage1, recipe_file, "--stage.steps", "1") == 0
    arguments = [
        "--stage.steps",
        "1",
        "--stage.optimizer",
        "adamw",
        "--stage.freeze_body_steps",
        "0",
    ]
    assert run(stage2, recipe_file, *arguments) == 0
    whole = weights(recipe_file, "stage2", 1, "optimizer")
    assert run(stage2, recipe_file, *arguments, "--engine.micro_batch", "2") == 0
    pieces = weights(recipe_file, "stage2", 1, "optimizer")
    for name, value in whole.items():
        if name.startswith("exp_avg/"):  # a tenth of the first gradient
            assert torch.allclose(
                value, pieces[name], rtol=1e-4, atol=1e-6 * float(value.abs().max())
            ), name


def test_stage2__says_what_to_run_first(recipe_file, capfd):
    assert run(stage2, recipe_file) == 2
    line = one_line(capfd)
    assert "stage2 starts from stage1" in line
    assert f"radio-distill train {recipe_file} --stages stage1" in line


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


def test_fresh_run__moves_the_earlier_one_aside(recipe_file):
    assert run(stage1, recipe_file, "--stage.steps", "1") == 0
    first = weights(recipe_file, "stage1", 1)
    assert run(stage1, recipe_file, "--stage.steps", "1", "--seed", "4") == 0
    aside = recipe_file.parent / "runs" / "tiny" / "stage1.1" / "checkpoints" / "step-00000001"
    kept = load_file(aside / "student.safetensors")
    assert all(torch.equal(first[name], kept[name]) for name in first)


def test_resume__a_changed_recipe_is_refused(recipe_file, capfd):
    assert run(stage1, recipe_file, "--stage.steps", "2") == 0
    assert (
        run(stage1, recipe_file, "--resume", "--stage.steps", "2", "--stage.weight_decay", "0.5")
        == 2
    )
    assert "stages.stage1.weight_decay: 0.02 -> 0.5" in one_line(capfd)
    assert run(stage1, recipe_file, "--resume", "--stage.steps", "2", "--log.every", "7") == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data.shards", "[nowhere]"], "no shards found for 'nowhere'"),
        (
            ["--student.regsters", "3"],
            "unknown field 'student.regsters' (did you mean 'registers'?)",
        ),
        (["--stage.partitions.low.size", "60"], "60 is not a multiple of patch 16 (nearest 64)"),
        (["--teachers.vit.weights", "absent.safetensors"], "absent.safetensors"),
        (["--teachers.vit.preset", "tiny_vitt"], "did you mean 'tiny_vit"),
        (["--teacher-upsampler", "bilinaer"], "did you mean 'bilinear'?"),
        (["--teacher-upsampler", "tile"], "no partition of stage1 upsamples a teacher"),
        (["--teachers.vit.input_size", "50"], "50 is not a multiple of its patch 8 (nearest 48)"),
        pytest.param(
            ["--engine.device", "cuda"],
            "torch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
        (["--teachers.sam.summary_weight", "1"], "this teacher has no summary; set it to 0"),
        (
            ["--stage.partitions.low.mosaic", "[sam]", "--stage.partitions.low.size", "128"],
            "128x128",
        ),
        (["--stage.partitions.low.teachers", "[]"], "a partition needs at least one teacher"),
        (["--stage.partitions.low.batch_size", "0"], "batch_size: 0 is below 1"),
        (["--student.pretrained", "absent"], "absent"),
        (["--override", "absent.yaml"], "cannot read absent.yaml"),
        (["--normalizer.name", "phi-s"], "unknown normalizer 'phi-s' (did you mean 'phi_s'?)"),
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
    assert "no featup 2x is fitted to teacher 'vit'" in one_line(capfd)

    arguments = ["--teacher", "vit", "--upsampler", "featup", *FIT]
    assert run(fit_upsampler, recipe_file, *arguments) == 0
    assert run(stage3, recipe_file, *FITTED) == 2
    assert "fitted at 48x48 px, the partition shows it 64x64" in one_line(capfd)

    assert run(fit_upsampler, recipe_file, *arguments, "--fit.size", "64") == 0
    assert run(stage3, recipe_file, *FITTED) == 0
    rows = log(recipe_file, "stage3-featup")
    assert rows[0]["loss/high/vit/features"] > 0


def test_stage1__no_write_permission(recipe_file, capfd, tmp_path):
    """A file where the folder should be: what root meets too."""
    (tmp_path / "occupied").write_text("")
    assert run(stage1, recipe_file, "--output", str(tmp_path / "occupied")) == 2
    assert "cannot write to" in one_line(capfd)


def test_stage1__corrupt_shard(recipe_file, capfd, tmp_path, images):
    source = next((images / "shards").glob("*.tar")).read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "cut.tar").write_bytes(source[: len(source) // 2])
    assert run(stage1, recipe_file, "--data.shards", f"[{tmp_path}/cut]") == 2
    assert "cut.tar" in one_line(capfd)


def test_stage1__every_image_broken(recipe_file, capfd, tmp_path):
    import io
    import tarfile

    with tarfile.open(tmp_path / "broken.tar", "w") as archive:
        for index in range(60):
            member = tarfile.TarInfo(f"{index:03}.jpg")
            member.size = 100
            archive.addfile(member, io.BytesIO(b"\xff\xd8\xff" + b"x" * 97))
    assert run(stage1, recipe_file, "--data.shards", f"[{tmp_path}/broken.tar]") == 2
    assert "bad" in one_line(capfd)


def test_cli__eval_scores_what_was_trained(recipe_file, capfd):
    assert run(stage1, recipe_file, "--stage.steps", "2") == 0
    folder = recipe_file.parent / "runs" / "tiny"
    assert cli(["eval", str(folder / "stage1"), "--untrained"]) == 0
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert {row["subject"] for row in rows} == {"stage1", "untrained student"}
    assert {row["metric"] for row in rows} >= {"fidelity/vit", "cosine/sam", "summary_cosine/cnn"}
