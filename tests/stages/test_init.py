"""A recipe to begin with is one that loads, and is found by its name."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import timm
from PIL import Image

from radio_distill.config import Recipe, describe_fields
from radio_distill.config.recipes import RECIPES, find_recipe
from radio_distill.data.sources import open_sources
from radio_distill.errors import ConfigError
from stages import cli
from stages.recipes import load_recipe


def test_init__writes_a_recipe_that_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "birds"]) == 0
    assert "birds.yaml" in capsys.readouterr().out
    recipe = load_recipe("birds")
    assert (recipe.name, recipe.data.shards) == ("birds", ("data/birds",))
    assert recipe == load_recipe("birds.yaml") == load_recipe("./birds.yaml")
    partition = recipe.stages["stage1"].partitions[0]
    assert set(partition.teachers) == set(recipe.teachers)

    before = (tmp_path / "birds.yaml").read_bytes()
    assert cli.main(["init", "birds"]) == 2
    assert "birds.yaml" in capsys.readouterr().err
    assert (tmp_path / "birds.yaml").read_bytes() == before


def test_init__the_users_teachers_and_images_and_the_recipe_passes_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "my images"
    images.mkdir()
    for number in range(10):
        Image.effect_noise((80, 64), 60).convert("RGB").save(images / f"{number}.png")
    teachers = ["timm:test_vit", "sam=tiny_samvit", "open_clip:ViT-B-16/openai"]
    words = [word for teacher in teachers for word in ("--teacher", teacher)]
    assert cli.main(["init", "birds", *words, "--images", "my images", "--hold-out", "0.2"]) == 0
    first, shards, plan, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("birds.yaml:")
    recipe = load_recipe("birds")
    assert {name: teacher.input_size for name, teacher in recipe.teachers.items()} == {
        "test_vit": "match",
        "sam": "native",
        "clip": "match",
    }
    assert recipe.teachers["sam"].summary_weight == 0
    text = (tmp_path / "birds.yaml").read_text()
    assert len(text.splitlines()) < 45
    assert all(len(line) <= 100 for line in text.splitlines())

    for command in (shards, plan):
        _, *arguments = shlex.split(command)
        assert cli.main(arguments) == 0
    assert "Missing" not in capsys.readouterr().out
    assert open_sources(recipe.data).num_images == 8
    assert open_sources(replace(recipe.data, shards=(recipe.evaluation.images,))).num_images == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "sam_g"], "no teacher 'sam_g' (did you mean 'sam_h'?)"),
        (["--teacher", "tim:test_vit"], "no source 'tim' of teachers (did you mean 'timm'?)"),
        (["--teacher", "timm:test_vti"], "timm has no model 'test_vti'"),
        (["--teacher", "timm:"], "'timm:' names no model; say timm:MODEL"),
        (["--teacher", "timm:test_vit", "--teacher", "timm:test_vit"], "two are called 'test_vit'"),
        (["--teacher", "a b=timm:test_vit"], "'a b' is no name"),
        (["--teacher", "a=.."], "'..' is a file or folder: say SOURCE:PATH, such as student:.."),
        (["--images", "nowhere"], "--images: no folder nowhere"),
        (["--hold-out", "1"], "--hold-out: 1 is no share between 0 and 1"),
    ],
)
def test_init__bad_input_is_one_line_and_no_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "birds", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [("demo", "comes with the project"), ("../x", "no name for a recipe"), ("", "no name")],
)
def test_init__a_name_that_cannot_be(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", name]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_find_recipe__the_project_s_own_before_a_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text("name: other\n")
    assert find_recipe("demo") == RECIPES / "demo.yaml"
    assert "yours is ./demo.yaml" in caplog.text
    (tmp_path / "flowers.yaml").write_text("name: flowers\n")
    with pytest.raises(ConfigError, match=r"'flowes'.*'flowers'"):
        find_recipe("flowes")


def test_fields__a_field_is_one_line_where_it_is_piped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["fields", "studnet."]) == 2
    assert "did you mean 'student." in capsys.readouterr().err
    assert cli.main(["fields", "student."]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(
        [row for row in describe_fields(Recipe) if row[0].startswith("student.")]
    )
    max_size = next(line for line in lines if "--student.max_size" in line)
    assert "longest image side that the position table (CPE) spans" in max_size


def test_init__a_path_stands_in_the_recipe_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "größe 1"
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=0), weights)
    assert cli.main(["init", "birds", "--teacher", f"vit=timm:{weights}"]) == 0
    assert str(weights) in (tmp_path / "birds.yaml").read_text(encoding="utf-8")
    assert load_recipe("birds").teachers["vit"].weights == str(weights)
