"""A ConvNeXt as the student: the commands of its page, on stand-ins; and what is refused."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml

import radio_distill
from e2e import CHECKOUT, RECIPE, assert_equal, one_line, rows, run, tensors
from stages import stage1
from stages.cli import main as cli

PAGE = (CHECKOUT / "docs" / "convnext.md").read_text()
SMALL = {"architecture": "test_convnext", "options": {"depths": [1, 1, 1, 1]}, "head_hidden": 16}
CONVNEXT = {"body": "timm", "patch_size": 32, **SMALL}


def stand_in(images: Path) -> dict:
    """The page's recipe with a small student, a small random teacher and a quarter of the sizes."""
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    recipe["student"] |= SMALL
    recipe["teachers"] = {"dinov3": {**RECIPE["teachers"]["vit"]}}
    for stage in recipe["stages"].values():
        stage |= {"steps": 2, "optimizer": "adamw"}
        for partition in stage["partitions"]:
            partition["batch_size"] = 3
            for name in {"size", "sizes"} & partition.keys():
                sizes = partition[name]
                partition[name] = [n // 4 for n in sizes] if name == "sizes" else sizes // 4
    recipe["evaluation"] |= {"limit": 4, "size": 64, "dense_size": 64, "benchmarks": ["fidelity"]}
    own = {key: RECIPE[key] for key in ("engine", "log")}
    return {**recipe, **own, "data": {**RECIPE["data"], **recipe["data"]}}


def test_page__its_commands_run(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = stand_in(images)
    Path("convnext.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    lines = [
        line.partition("  #")[0]
        for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(lines) == 7
    for line in lines:
        program, *words = shlex.split(line.replace("~/Images", str(images / "train")))
        assert program == "radio-distill"
        if "onnx" not in words:  # test_timm_body has it
            assert cli(words) == 0, line
    assert "test_convnext" in capsys.readouterr().out  # of plan

    folder = Path("runs/convnext/stage2")
    whole, log = tensors(folder, 2), rows(folder)
    assert all(row["gradient_norm"] > 0 for row in log)
    before = tensors(Path("runs/convnext/stage1"), 2)["student.body.stem.0.weight"]
    assert not torch.equal(whole["student.body.stem.0.weight"], before)
    assert Path("runs/convnext/scores.jsonl").is_file()

    exported = Path("runs/convnext/export/timm")
    assert type(timm.create_model(f"local-dir:{exported}", pretrained=True)).__name__ == "ConvNeXt"
    pixels = torch.rand(1, 3, 64, 96)
    one, other = (
        radio_distill.load(path)(pixels, ("dinov3",)) for path in ("runs/convnext", exported)
    )
    assert one.features.shape == (1, 64, 4, 6)
    torch.testing.assert_close(one.features, other.features)
    torch.testing.assert_close(one.heads["dinov3"].spatial, other.heads["dinov3"].spatial)


@pytest.fixture
def with_student(recipe_file):
    """Write the tiny recipe with another student."""

    def write(**fields):
        recipe = yaml.safe_load(recipe_file.read_text())
        recipe["student"] = CONVNEXT | fields
        recipe["stages"] = {"stage1": recipe["stages"]["stage1"]}
        recipe_file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return recipe_file

    return write


def test_convnext__resumes_to_the_same_numbers(with_student):
    recipe, steps = with_student(), ("--stage.steps", "3", "--log.save_every", "1")
    assert run(stage1, recipe, *steps) == 0
    folder = recipe.parent / "runs" / "tiny" / "stage1"
    whole = {part: tensors(folder, 3, part) for part in ("student", "ema", "optimizer")}
    for step in (2, 3):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    assert run(stage1, recipe, *steps, "--resume") == 0
    for part, values in whole.items():
        assert_equal(values, tensors(folder, 3, part), part)


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


def test_size_that_another_body_does_not_take_is_refused_before_statistics(with_student, capfd):
    recipe = with_student()
    sizes = ("--stages.stage1.partitions.0.size", "80")
    assert run(stage1, recipe, *sizes) != 0
    assert "stages.stage1.partitions." in one_line(capfd)
    assert not (recipe.parent / "runs" / "tiny" / "statistics").exists()
