"""A proxy and its students as stages of one recipe: trained, resumed, moved, refused."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import radio_distill
from e2e import RECIPE, assert_equal, one_line, run, tensors
from radio_distill.config import load
from radio_distill.plan.time import DEVICES
from radio_distill.train.checkpoint import find
from radio_distill.weights.files import find_checkpoint
from stages import stage1, stage2
from stages.build import build_teachers
from stages.cli import main as cli
from stages.commands.missing import find_missing
from stages.planning import build_models
from stages.plans import plan_stages
from teachers import build_module, teacher_spec

CHAIN = yaml.safe_load("""
student:
  body: timm
  architecture: test_convnext
  options: {depths: [1, 1, 1, 1]}
  patch_size: 32
  head_hidden: 16
teachers:
  vit: {preset: tiny_vit, input_size: match, dtype: float32}
  sam: {preset: tiny_samvit, summary_weight: 0, dtype: float32}
  proxy: {preset: student, stage: stage1, dtype: float32}
normalizer: {images: 8}
stages:
  stage1:
    student: {architecture: test_vit, max_size: 128, registers: 2, head_hidden: 32}
    steps: 1
    partitions: [{name: low, size: 64, teachers: [vit, sam], batch_size: 4}]
  stage2:
    student: {architecture: test_vit2, max_size: 128, registers: 1, head_hidden: 16}
    steps: 2
    partitions: [{name: low, size: 64, teachers: [proxy], batch_size: 4}]
  finest:
    steps: 1
    partitions:
      - name: low
        sizes: [64, 96]
        teachers: [proxy]
        teacher_sizes: {proxy: [64, 96]}
        batch_size: 4
""")


@pytest.fixture
def chain(images: Path, tmp_path: Path) -> Path:
    """The file of a recipe with a proxy, and two students that it teaches."""
    recipe = {**RECIPE, **CHAIN, "name": "chain", "output": str(tmp_path / "runs")}
    recipe["data"] = {**RECIPE["data"], "shards": [str(images / "shards")]}
    recipe["evaluation"] = {**RECIPE["evaluation"], "images": str(images / "held_out")}
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def test_chain__its_students_learn_what_the_proxy_says(chain):
    recipe = load(chain)
    config = recipe.teachers["proxy"]
    planned = teacher_spec("proxy", config, recipe)
    module = build_module(config, recipe=recipe)
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    models = build_models(recipe, "float32", "stage2")
    (plan,) = plan_stages(models, {"stage1": 1, "stage2": 2}, DEVICES["cpu"], with_memory=False)
    assert (plan.stage.name, models.recipe.student.architecture) == ("stage2", "test_vit2")
    assert [cost.view.grid for cost in plan.partitions[0].teachers] == [(4, 4)]
    assert cli(["train", str(chain)]) == 0

    runs = chain.parent / "runs" / "chain"
    teacher = build_teachers(recipe, torch.device("cpu"))["proxy"]
    spec = teacher.spec
    assert find(runs / "stage2").teachers == find(runs / "finest").teachers == {"proxy": spec}
    known = {"weights_hash": "", "mean": planned.mean, "std": planned.std}
    assert planned == replace(spec, **known), "all but what the weights say"
    assert {name: value.shape for name, value in teacher.tower.state_dict().items()} == shapes

    assert find_checkpoint(runs).stage == "finest"
    students = [radio_distill.load(runs / name) for name in ("stage1", "stage2", "finest")]
    pixels = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        proxy, *others = (student(pixels) for student in students)
        taught = teacher.encode(pixels)
    torch.testing.assert_close(taught.spatial, proxy.features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(taught.summary, proxy.summary, rtol=1e-5, atol=1e-5)
    assert [output.features.shape[-2:] for output in others] == [(4, 6), (2, 3)]
    assert [student.head_names for student in students] == [("vit", "sam"), *[("proxy",)] * 2]


def test_chain__resumes_to_the_same_numbers_wherever_it_lies(chain, tmp_path, capfd):
    every = ("--log.save_every", "1")
    for stage in (stage1, stage2):
        assert run(stage, chain, *every) == 0
    whole = tensors(tmp_path / "runs" / "chain" / "stage2", 2)
    (tmp_path / "runs").rename(tmp_path / "moved")
    folder = tmp_path / "moved" / "chain" / "stage2"
    last = folder / "checkpoints" / "step-00000002"
    shutil.rmtree(last)
    resume = (*every, "--output", str(tmp_path / "moved"), "--resume")
    assert run(stage2, chain, *resume) == 0
    assert_equal(whole, tensors(folder, 2))

    assert run(stage1, chain, *resume[:-1], "--seed", "5") == 0  # another proxy
    shutil.rmtree(last)
    capfd.readouterr()
    assert run(stage2, chain, *resume) == 2
    assert "teachers.proxy: its weights" in one_line(capfd)
    assert run(stage2, chain, *resume, "--stages.stage1.student.registers", "3") == 2
    assert "stages.stage1.student.registers: 2 -> 3" in one_line(capfd)


def test_chain__what_must_be_trained_first_is_said_with_its_command(chain, capfd):
    assert run(stage2, chain) == 2
    line = one_line(capfd)
    words = shlex.split(line.partition("first: ")[2])
    assert words == ["radio-distill", "train", str(chain), "--stages", "stage1"]
    assert find_missing(load(chain)).missing == []
    (missing,) = find_missing(load(chain), stages=["stage2", "finest"]).missing
    assert missing.startswith("teachers.proxy is the student of stage1")
