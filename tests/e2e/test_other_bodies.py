"""A ConvNeXt as the student: trained, resumed, evaluated, exported, planned; what is refused."""

import shutil

import pytest
import timm
import torch
import yaml

import radio_distill
from e2e import RECIPE, assert_equal, one_line, rows, run, run_folder, tensors
from stages import stage1
from stages.cli import main as cli

CONVNEXT = {
    "body": "timm",
    "architecture": "convnext_atto",
    "options": {"depths": [1, 1, 1, 1]},
    "patch_size": 32,
    "final_norm": True,
    "head_hidden": 16,
}


@pytest.fixture
def with_student(recipe_file):
    """Write the tiny recipe with another student."""

    def write(**fields):
        recipe = yaml.safe_load(recipe_file.read_text())
        recipe["student"] = CONVNEXT | fields
        recipe["stages"] = {"stage1": RECIPE["stages"]["stage1"] | {"steps": 3}}
        recipe["log"] |= {"save_every": 1}
        recipe_file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return recipe_file

    return write


def test_convnext__trains_resumes_is_evaluated_and_exported(with_student, tmp_path, capsys):
    recipe = with_student()
    assert run(stage1, recipe) == 0
    folder = run_folder(recipe) / "stage1"
    whole, log = tensors(folder, 3), rows(folder)
    assert all(row["gradient_norm"] > 0 for row in log)
    first = tensors(folder, 1)
    assert not torch.equal(whole["student.body.stem.0.weight"], first["student.body.stem.0.weight"])
    for step in (2, 3):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    assert run(stage1, recipe, "--resume") == 0
    assert_equal(whole, tensors(folder, 3))

    assert cli(["eval", str(run_folder(recipe))]) == 0
    scores = list(run_folder(recipe).rglob("scores.jsonl"))
    assert scores, "fidelity was scored"
    exported = tmp_path / "exported"
    options = ["--format", "timm", "--output", str(exported)]
    assert cli(["export", str(run_folder(recipe)), *options]) == 0
    pixels = torch.rand(1, 3, 64, 96)
    student, again = radio_distill.load(run_folder(recipe)), radio_distill.load(exported)
    for one, other in zip(
        student(pixels, ("vit",)).heads["vit"], again(pixels, ("vit",)).heads["vit"], strict=True
    ):
        torch.testing.assert_close(one, other)
    model = timm.create_model(f"local-dir:{exported}", pretrained=True)
    assert type(model).__name__ == "ConvNeXt"
    capsys.readouterr()
    assert cli(["plan", str(recipe), "--devices", "1"]) == 0
    assert "convnext_atto" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"registers": 2}, "student.registers"),
        ({"max_size": 256}, "student.max_size"),
        ({"window_size": 2}, "student.window_size"),
        ({"spectral_reparametrization": True}, "student.spectral_reparametrization"),
        ({"position_dropout": 0.0}, "student.position_dropout"),
        ({"architecture": "test_resnet", "options": {}}, "student.pretrained"),
    ],
)
def test_what_another_body_lacks_is_refused_in_one_line(with_student, capfd, fields, what):
    assert run(stage1, with_student(**fields)) != 0
    assert what in one_line(capfd)
