"""Models by name, without a run: what they are, what they are asked, what is not asked twice."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import layouts
from radio_distill.config import TeacherConfig
from radio_distill.errors import ConfigError, UnknownNameError
from radio_distill.evals.scores import read_scores
from stages import cli
from stages.commands.named_models import model_under_test, named_models
from teachers import build_teacher
from upsamplers.methods.tile import Tile

CPU = torch.device("cpu")


def evaluate(images, *arguments):
    fields = {
        "images": images,
        "benchmarks": "[agreement, correspondence]",
        "size": 48,
        "dense_size": 96,
        "options": "{correspondence: {target_stride: 24}, agreement: {scales: [1.0, 2.0]}}",
    }
    flags = [f"--evaluation.{name}={value}" for name, value in fields.items()]
    return cli.main(["eval", *map(str, arguments), *flags, "--engine.device=cpu"])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_eval__models_by_name_are_told_apart_in_one_file(tmp_path, images, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = ["tiny_vit", "up=tiny_vit+bilinear:2", "clip=tiny_open_clip"]
    assert evaluate(images, "--models", *texts) == 0
    assert "tiny_vit" in capsys.readouterr().out
    scores = read_scores([Path("scores.jsonl")])
    assert set(scores.results) == {"tiny_vit", "up", "clip"}
    assert len({row["weights"] for row in lines(Path("scores.jsonl"))}) == 3
    shown = [path.relative_to("evaluation") for path in Path("evaluation").rglob("*.webp")]
    matches = {
        f"{name}/correspondence/{n}.webp" for name in ("tiny_vit", "up", "clip") for n in "01"
    }
    assert {str(path) for path in shown} == matches, "agreement shows none"
    assert scores.teachers == {"tiny_vit", "up", "clip"}, "they may lack what runs are compared by"
    assert cli.main(["score", "scores.jsonl", "--baseline", "tiny_vit"]) == 0
    alone = read_scores([Path("scores.jsonl")]).results["clip"]
    assert evaluate(images, "--models", "other=tiny_open_clip", "--output", "other.jsonl") == 0
    assert read_scores([Path("other.jsonl")]).results["other"] == alone


def test_eval__goes_on_where_it_was_stopped(tmp_path, images, capsys):
    """The second benchmark fails; the first one's scores are there, and are not made again."""
    path, labels = tmp_path / "scores.jsonl", tmp_path / "labels"
    for split, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
        (labels / split / name).mkdir(parents=True)
        Image.new("RGB", (60, 60), "red").save(labels / split / name / "0.png")
    broken = labels / "val" / "b" / "0.png"
    good = broken.read_bytes()
    broken.write_bytes(good[:40])
    asked = ["--models", "tiny_vit", "--output", path, "--evaluation.labels", labels]
    both = ["--evaluation.benchmarks=[agreement, knn]", "--evaluation.options={knn: {k: 1}}"]
    command = ["eval", *map(str, asked), *both, f"--evaluation.images={images}"]
    command += ["--evaluation.size=48", "--engine.device=cpu"]
    assert cli.main(command) != 0
    assert "0.png" in capsys.readouterr().err
    rows = lines(path)
    assert {row["benchmark"] for row in rows} == {"agreement"}
    for row in rows:
        row["value"] = 12.5  # would be another if it were scored again
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    broken.write_bytes(good)
    assert cli.main(command) == 0
    found = {(row["benchmark"], row["metric"]): row["value"] for row in lines(path)}
    assert found["agreement", "cosine"] == 12.5
    assert found["knn", "top1"] == 50.0
    assert cli.main([*command, "--evaluation.limit=1"]) == 2  # one class of knn is left
    assert {r["value"] for r in lines(path) if r["benchmark"] == "agreement"} != {12.5}
    assert cli.main([*command, "--again"]) == 0
    assert len(lines(path)) == len(found)


def test_model_under_test__behind_an_upsampler_has_its_grid_and_the_models_summary(tmp_path):
    _, bare = model_under_test(named_models(["a=tiny_open_clip"])[0], CPU, tmp_path)
    subject, fine = model_under_test(named_models(["b=tiny_open_clip+tile:3"])[0], CPU, tmp_path)
    teacher = build_teacher("a", TeacherConfig(preset="tiny_open_clip"))
    assert fine.nearest_size((140, 90)) == (144, 96)
    pixels = torch.rand(2, 3, 144, 96)
    expected = Tile(3)(teacher, pixels, (18, 12))
    torch.testing.assert_close(fine(pixels).spatial, expected.spatial)
    assert fine(pixels).spatial.shape[-2:] == (18, 12)
    torch.testing.assert_close(fine(pixels).summary, expected.summary)
    texts = ["a cat", "two dogs"]
    assert torch.equal(fine.text.embed(texts), bare.text.embed(texts))
    assert subject.reference == "model tiny_open_clip+tile:3"
    with pytest.raises(ConfigError, match="no inner layers"):
        fine.layers(pixels, 4)
    _, canvas = model_under_test(named_models(["tiny_sam+bilinear:2"])[0], CPU, tmp_path)
    assert canvas.nearest_size((90, 50)) == (128, 128)


def test_named_models__names_texts_and_teachers_of_a_recipe(tmp_path):
    path = tmp_path / "weights+1.pth"
    path.touch()
    teachers = {"mine": TeacherConfig(preset="tiny_vit", micro_batch=3)}
    texts = [
        "mine",
        "up=mine+featup:4:fits/a+b:1.safetensors",
        f"dinov2_l_reg:{path}",
        "timm:hf-hub:timm/resnet50.a1_in1k",
        "s=student:runs/mine+s2:2",
    ]
    own, up, preset, library, student = named_models(texts, teachers)
    assert own.teacher is up.teacher is teachers["mine"]
    assert (up.upsampler.name, up.upsampler.factor) == ("featup", 4)
    assert up.upsampler.weights == {"up": "fits/a+b:1.safetensors"}
    assert preset.teacher == TeacherConfig(preset="dinov2_l_reg", weights=str(path))
    assert preset.upsampler is None
    assert library.teacher.options == {"model": "hf-hub:timm/resnet50.a1_in1k"}
    assert (student.name, student.teacher.weights) == ("s", "runs/mine")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["tiny_vot"], "did you mean 'tiny_vit'"),
        (["tmm:resnet10t"], "no source 'tmm'"),
        (["tiny_vit+bilinaer:2"], "bilinear"),
        (["a=tiny_vit", "a=tiny_cnn"], "two are called 'a'"),
    ],
)
def test_named_models__what_cannot_be_meant_is_named(texts, message):
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        named_models(texts)


def test_eval__what_a_model_cannot_answer_is_passed_over(tmp_path, images, capsys, caplog):
    caplog.set_level("INFO")
    data = f"{{nyu_depth: {layouts.nyu_depth(tmp_path / 'nyu')}}}"
    asked = ["--evaluation.data", data, "--engine.device=cpu", "--output", tmp_path / "s.jsonl"]
    asked += ["--evaluation.options", "{nyu_depth: {quick: true, steps: 2, images_per_step: 2}}"]
    command = ["eval", "--models", "tiny_cnn", *asked, "--evaluation.benchmarks"]
    own = ["[nyu_depth, fidelity]", f"--evaluation.images={images}"]
    assert cli.main([*map(str, command), *own]) == 2
    assert "nothing was scored" in capsys.readouterr().err
    assert "nyu_depth is passed over: teacher 'tiny_cnn' has no inner layers" in caplog.text
    assert "not asked nyu_depth, fidelity" in caplog.text
    command = ["eval", "--models", "tiny_cnn", "tiny_vit", *asked, "--evaluation.benchmarks"]
    assert cli.main([*map(str, command), "[nyu_depth]"]) == 0
    assert {row["subject"] for row in lines(tmp_path / "s.jsonl")} == {"tiny_vit"}
    assert {row["pixels"] for row in lines(tmp_path / "s.jsonl")} != {""}, "layers note sizes too"


def test_eval__fits_of_another_model_and_nothing_to_score_are_one_line(tmp_path, images, capsys):
    output = ["--output", tmp_path / "scores.jsonl"]
    assert evaluate(images, "--models", "tiny_vit+featup:2", *output) == 2
    assert "+featup:2:FILE" in capsys.readouterr().err
    misspelt = ["tiny_vit", "timm:resnet10tt"]
    assert evaluate(images, "--models", *misspelt, *output) == 2
    assert "--models timm:resnet10tt: timm has no model" in capsys.readouterr().err
    assert not output[1].exists(), "it is seen before the first is scored"
    assert evaluate(images) == 2
    assert "nothing to score: name a run, or --models" in capsys.readouterr().err
    assert evaluate(images, "--models", "tiny_vit", "--head", "clip", *output) == 2
    assert "--head is of runs" in capsys.readouterr().err
    assert evaluate(images, "--models", "tiny_vit", "--student.registers=3", *output) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
