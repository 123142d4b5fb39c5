"""``radio-distill export``: which checkpoint is taken, where it goes, and what is refused."""

import shutil

import pytest
import torch

from radio_distill.config import Recipe, build
from radio_distill.models.heads import build_student
from radio_distill.train import checkpoint as checkpoints
from radio_distill.train.checkpoint import Checkpoint
from radio_distill.train.checkpointer import save
from radio_distill.types import TeacherSpec
from stages.cli import main

HALF = (0.5, 0.5, 0.5)
SPEC = TeacherSpec("t", 8, 4, 16, (224, 224), None, HALF, HALF, licence="mit")


def write_stage(run, stage, **student):
    partition = {"name": "a", "size": 32, "teachers": ["t"], "batch_size": 2}
    fields = {"architecture": "test_vit", "max_size": 64, "head_hidden": 8, **student}
    recipe = build(
        Recipe,
        {
            "name": run.name,
            "data": {"shards": ["x"]},
            "student": fields,
            "teachers": {"t": {"preset": "p"}},
            "normalizer": {"name": "none"},
            "stages": {
                name: {"steps": 3, "partitions": [partition]} for name in ("stage1", "stage3")
            },
        },
    )
    folder = run / stage / "checkpoints" / "step-00000003"
    checkpoint = Checkpoint(folder, 3, stage.partition("-")[0], recipe, {"t": SPEC})
    student = build_student(recipe.student, {"t": SPEC})
    return save(checkpoint, {"student": student.state_dict(), "statistics": {}}, 3)


@pytest.fixture
def run(tmp_path):
    """A run folder of two stages."""
    write_stage(tmp_path / "mine", "stage1")
    write_stage(tmp_path / "mine", "stage3-tile")
    return tmp_path / "mine"


def refusal(capsys, *argv):
    capsys.readouterr()
    assert main(["export", *map(str, argv)]) == 2
    lines = capsys.readouterr().err.splitlines()
    refusals = [line for line in lines if line.startswith("radio-distill: ")]
    assert lines[-1:] == refusals
    return refusals[0]


def test_export__a_run_gives_its_last_stage(run, capsys):
    transformers = pytest.importorskip("transformers")
    assert main(["export", str(run), "--format", "transformers"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "export" / "transformers")
    assert '"stage": "stage3"' in (run / "export/transformers/radio_distill.json").read_text()
    model = transformers.AutoModel.from_pretrained(run / "export" / "transformers")
    assert model(torch.rand(1, 3, 32, 48)).features.shape == (1, 6, 64)


def test_export__a_stage_a_checkpoint_and_a_folder_of_choice(run, tmp_path):
    pytest.importorskip("transformers")
    stage = run / "stage1"
    assert main(["export", str(stage), "--format", "transformers"]) == 0
    assert (stage / "export" / "transformers" / "model.safetensors").is_file()
    checkpoint = checkpoints.find(stage).folder
    out = tmp_path / "out"
    arguments = ["export", str(checkpoint), "--format", "transformers", "--output", str(out)]
    assert main(arguments) == 0
    assert '"stage": "stage1"' in (out / "radio_distill.json").read_text()
    assert main(["export", str(run), "--stage", "stage1", "--format", "transformers"]) == 0
    assert '"stage": "stage1"' in (run / "export/transformers/radio_distill.json").read_text()


def test_export__nothing_is_written_over(run, capsys):
    pytest.importorskip("transformers")
    first = run / "export" / "transformers"
    assert main(["export", str(run), "--format", "transformers"]) == 0
    (first / "mark").write_text("kept")
    assert main(["export", str(run), "--format", "transformers"]) == 0
    assert (first.with_name("transformers.1") / "mark").read_text() == "kept"
    assert not (first / "mark").exists()
    message = refusal(capsys, run, "--format", "transformers", "--output", first)
    assert "exists" in message


def test_export__a_format_that_cannot_hold_the_student(tmp_path, capsys):
    write_stage(tmp_path / "windows", "stage1", window_size=2, global_blocks=2)
    kept = tmp_path / "windows" / "export" / "radio"
    kept.mkdir(parents=True)
    for name in ("transformers", "radio"):
        message = refusal(capsys, tmp_path / "windows", "--format", name)
        assert f"{name} cannot hold student.window_size 2" in message
        assert "export it as onnx" in message
    assert kept.is_dir()


def test_export__bad_arguments(run, tmp_path, capsys):
    message = refusal(capsys, run, "--format", "transfomers")
    assert "'transfomers' (did you mean 'transformers'?)" in message
    message = refusal(capsys, tmp_path / "none", "--format", "radio")
    assert "checkpoint folder" in message
    (tmp_path / "empty").mkdir()
    message = refusal(capsys, tmp_path / "empty", "--format", "radio")
    assert "checkpoint" in message
    message = refusal(capsys, run, "--stage", "stage2", "--format", "radio")
    assert "--stage stage2:" in message
    assert "has no such stage" in message
    message = refusal(capsys, run / "stage1", "--stage", "stage1", "--format", "radio")
    assert "is not the folder of a run" in message
    message = refusal(capsys, run, "--format", "radio", "--size", "224")
    assert "--size is for --format timm" in message
    message = refusal(capsys, run, "--format", "timm", "--heads", "dino")
    assert "--heads is for --format onnx" in message
    message = refusal(capsys, run, "--format", "timm", "--size", "1", "2", "3")
    assert "--size" in message
    message = refusal(capsys, run, "--format", "timm", "--size", "64px")
    assert "'64px'" in message


@pytest.mark.parametrize("size", [["64", "32"], ["64x32"]])
def test_export__a_plain_vit_of_one_size(run, size):
    timm = pytest.importorskip("timm")
    assert main(["export", str(run), "--format", "timm", "--size", *size]) == 0
    model = timm.create_model(f"local-dir:{run / 'export' / 'timm'}", pretrained=True)
    assert model.patch_embed.grid_size == (4, 2)


def test_export__several_last_stages(run, capsys):
    shutil.copytree(run / "stage3-tile", run / "stage3-s2")
    shutil.copytree(run / "stage3-tile", run / "stage3-tile.1")
    message = refusal(capsys, run, "--format", "transformers")
    assert message.endswith("name one: stage3-s2, stage3-tile")
    pytest.importorskip("transformers")
    assert main(["export", str(run), "--stage", "stage3-s2", "--format", "transformers"]) == 0
