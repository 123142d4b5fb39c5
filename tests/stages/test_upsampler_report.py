"""The report of upsamplers: every fit is found or named, and the page holds what was asked for."""

import html
import json
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from radio_distill.config import FitConfig, Recipe
from radio_distill.data.shards import write_shards
from radio_distill.errors import ConfigError
from radio_distill.normalize.phi_s import PhiS
from radio_distill.protocols import Teacher
from radio_distill.stage import FIT, resolve_stage
from stages import cli, fit_upsampler
from stages.arguments import Parser
from stages.commands.upsampler_rows import BLOCKS, INPUTS, Request, rows_of
from stages.commands.upsampler_tables import unequal_settings
from stages.fit_upsampler import fit_recipe
from stages.fits import FITTED, fit_command, fit_folder, fit_name, fit_of, upsampler_of
from stages.recipes import Asked, describe_stage, load_recipe
from teachers import build_teacher
from upsamplers import fitted_files
from upsamplers.fit.consistency import Consistency
from upsamplers.fitted import UpsamplerModel, save_model
from upsamplers.networks import build_network

RECIPE = {
    "name": "tiny",
    "data": {"workers": 0},
    "teachers": {"vit": {"preset": "tiny_vit"}, "sam": {"preset": "tiny_samvit"}},
    "normalizer": {"images": 16},
    "stages": {},
    "fit": {"size": 32, "steps": 3, "batch_size": 2, "pool": 4, "views": 2, "warmup_steps": 1},
    "engine": {"device": "cpu", "precision": "float32"},
    "log": {"every": 3, "save_every": 3, "trackers": []},
}
DASH = "\N{EN DASH}"
FITTED_HERE = ("vit-bilinear-2x", "vit-featsharp-2x", "vit-featsharp-2x-inputs_tiles_featup")
SECTIONS = ["scores", "run", "fits", "features", "recipe"]


def write_images(folder: Path, count: int, seed: int) -> None:
    """Write smooth colour gradients with a bright square, each different."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for index in range(count):
        coarse = generator.integers(0, 255, (4, 5, 3), dtype=np.uint8)
        image = np.array(Image.fromarray(coarse).resize((90, 80), Image.Resampling.BICUBIC))
        image[10:30, 20:40] = generator.integers(0, 255, 3)
        Image.fromarray(image).save(folder / f"{index:03}.png")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with shards, held-out images and a segmentation set of two classes."""
    root = tmp_path_factory.mktemp("report")
    write_images(root / "train", 8, seed=0)
    write_images(root / "held_out", 2, seed=1)
    write_shards(root / "train", root / "shards", images_per_shard=8)
    mask = np.repeat(np.array([[1, 2]], dtype=np.uint8), 80, axis=0).repeat(45, axis=1)
    for seed, split in enumerate(("train", "val"), 2):
        write_images(root / "seg" / "images" / split, 2, seed)
        (root / "seg" / "masks" / split).mkdir(parents=True)
        for index in range(2):
            Image.fromarray(mask).save(root / "seg" / "masks" / split / f"{index:03}.png")
    recipe = RECIPE | {
        "output": str(root / "runs"),
        "data": {"workers": 0, "shards": [str(root / "shards")]},
        "evaluation": {"images": str(root / "held_out"), "segmentation": str(root / "seg")},
    }
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def load(path: Path, *fields: str) -> Recipe:
    return fit_recipe(load_recipe(str(path), ["fit.teacher=vit", *fields]))


def command(path: Path, *arguments: str) -> int:
    return cli.main(["upsampler-report", str(path), "--teacher", "vit", *arguments])


def place(recipe: Recipe, config: FitConfig, teacher: Teacher) -> None:
    """Write the file of a fit that took no step."""
    channels = teacher.spec.channels
    size = resolve_stage(recipe, FIT, {teacher.spec.name: teacher.spec}).partitions[0].sizes[0]
    torch.manual_seed(0)
    network = build_network(config.upsampler, channels, config.factor, config.options)
    state = {
        "mean": torch.zeros(channels),
        "scale": torch.ones(()),
        "rotation": torch.eye(channels),
    }
    grid = teacher.spec.grid(size) if config.de_bias else None
    model = UpsamplerModel(network, PhiS().load_state(state), channels, grid)
    if model.bias is not None:
        torch.nn.init.normal_(model.bias, std=0.1)
    header = fitted_files.FittedHeader(
        config.upsampler, "vit", teacher.spec.weights_hash, channels, config.factor, size,
        config.options, fit=asdict(config),
    )  # fmt: skip
    downsampler = Consistency(model, config, channels).downsampler.state_dict()
    save_model(fit_folder(recipe, config) / FITTED, model, header, downsampler)


@pytest.fixture(scope="module")
def folder(recipe_file: Path) -> Path:
    """The report of everything at 2x; three of its nineteen fits are the command's own work."""
    recipe = load(recipe_file)
    teacher = build_teacher("vit", recipe.teachers["vit"], torch.device("cpu"))
    for name, config in Request(factors=(2,), windows=(1, 5)).fits(recipe).items():
        if name not in FITTED_HERE:
            place(recipe, config, teacher)
    words = ("--windows", "5", "1", "--num-images", "2", "--fit")
    assert command(recipe_file, "--factors", "2", *words) == 0
    return recipe_file.parent / "runs" / "tiny" / "upsampler_report" / "vit"


def table(scores_or_markdown: str, title: str) -> list[list[str]]:
    """Return the cells of a Markdown table, heading first, without marks."""
    block = scores_or_markdown.split(f"**{title}", 1)[1].split("\n\n")[1]
    lines = [line for line in block.splitlines() if line.startswith("|")]
    cells = [[cell.strip(" *\\") for cell in line.strip("|").split("|")] for line in lines]
    return [cells[0], *cells[2:]]


def test_report__the_page_has_every_section_and_loads_nothing(folder: Path) -> None:
    page = (folder / "index.html").read_text()
    assert re.findall(r'<section id="(\w+)">', page) == SECTIONS
    assert page.count("data:image/png") == 2  # features, differences
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert sorted(item.name for item in folder.iterdir()) == [
        "index.html", "scores.json", "tables.md",
    ]  # fmt: skip


def test_report__tables_have_the_papers_rows_and_no_gaps(folder: Path) -> None:
    text = (folder / "tables.md").read_text()
    scores = json.loads((folder / "scores.json").read_text())["upsamplers"]
    rows = table(text, "De-bias")
    assert [row[0] for row in rows[1:]] == ["bilinear", "featup", "featsharp"]
    with_bias, without = (scores[f"vit-featup-2x{end}"]["fidelity"] for end in ("", "-no_debias"))
    assert [float(cell) for cell in rows[2][1:]] == pytest.approx(
        [without, with_bias, with_bias - without], abs=6e-4
    )
    rows = table(text, "Inputs of FeatSharp, 2x")
    assert [row[0] for row in rows[1:]] == list(INPUTS)
    assert rows[5][1:] == table(text, "Upsamplers, 2x")[3][1:4]  # featup + tiles is featsharp
    rows = table(text, "Upsamplers, 2x")
    assert [row[0] for row in rows[1:]] == [
        "bilinear", "featup", "featsharp", "featsharp, bilinear residual",
        "tile", "s2", "strided", "native",
    ]  # fmt: skip
    assert len(rows[0]) == 6
    rows = table(text, "Modules of FeatSharp")
    assert [row[0] for row in rows[1:]] == list(BLOCKS.values())
    assert rows[4][1] == table(text, "Upsamplers, 2x")[4][1]  # both modules, bilinear + tiles
    rows = table(text, "Window of FeatSharp's attention")
    assert [row[0] for row in rows[1:]] == ["bilinear", "featup", "window 1", "window 5"]
    assert rows[4][1] == table(text, "Upsamplers, 2x")[3][1]  # 5 is the window of the paper
    assert float(rows[3][1]) == pytest.approx(
        scores["vit-featsharp-2x-window_1"]["fidelity"], abs=6e-4
    )
    assert DASH not in text
    assert text.count("normalised by PHI-S") == 5


def test_report__its_measures_are_those_of_the_fit(folder: Path) -> None:
    """Bilinear has nothing that saving rounds, so its file gives the very numbers of the fit."""
    scores = json.loads((folder / "scores.json").read_text())["upsamplers"]["vit-bilinear-2x"]
    measured = fitted_files.read_header(scores["file"]).measures
    assert {name: scores[name] for name in measured if name != "images"} == {
        name: pytest.approx(value, rel=1e-6) for name, value in measured.items() if name != "images"
    }


def test_fit_missing__a_shared_pool_changes_no_bit(folder: Path, recipe_file: Path) -> None:
    name = "vit-featsharp-2x-inputs_tiles_featup"  # the second of its pool
    alone = load(recipe_file, "name=alone", "fit.options={inputs: [tiles, featup]}")
    path = fit_upsampler.fit_upsampler(alone)
    assert path.parent.name == name
    own, shared = (
        fitted_files.read_tensors(item)
        for item in (path, folder.parents[1] / "fit" / name / FITTED)
    )
    assert own["network"].keys() == shared["network"].keys()
    for part, tensors in own.items():
        for key, value in tensors.items():
            assert torch.equal(value, shared[part][key]), f"{part}.{key}"


def test_report__lists_what_is_missing_with_its_command(
    folder: Path, recipe_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    moved = folder.parents[1] / "fit" / "vit-featup-2x"
    moved.rename(moved.with_name("elsewhere"))
    try:
        arguments = ("--factors", "2", "--tables", "7", "9", "--num-images", "1")
        assert command(recipe_file, *arguments, "--upsamplers", "bilinear", "featup", "tile") == 0
    finally:
        moved.with_name("elsewhere").rename(moved)
    lines = [text for text in caplog.messages if text.startswith("missing: ")]
    assert lines == [
        f"missing: radio-distill fit-upsampler {recipe_file} --teacher vit "
        "--upsampler featup --factor 2 --fit.size 32"
    ]
    assert "1 missing; 2 held-out images" in caplog.text
    page = (folder / "index.html").read_text()
    assert html.escape(lines[0].removeprefix("missing: ")) in page
    rows = table((folder / "tables.md").read_text(), "Upsamplers, 2x")
    assert rows[2] == ["featup", *[DASH] * 5]
    assert DASH not in (rows[1][1], rows[3][1])
    rows = table((folder / "tables.md").read_text(), "De-bias")
    assert [cell == DASH for cell in rows[2][1:]] == [False, True, True]


def test_report__nothing_fitted_ends_with_one_line(
    recipe_file: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert command(recipe_file, "--name", "empty", "--factors", "3", "--tables", "10") == 2
    assert len([text for text in caplog.messages if text.startswith("missing: ")]) == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("radio-distill: nothing is fitted to teacher 'vit'")
    assert not (recipe_file.parent / "runs" / "empty").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--factors", "1"], "--factors 1: an upsampler's factor is at least 2"),
        (["--windows", "4"], "--windows 4"),
        (["--tables"], "--windows"),
        (["--upsamplers", "featupp"], "did you mean 'featup'?"),
        (["--num-images", "0"], "--num-images 0"),
        (["--evaluation.images", ""], "evaluation.images"),
        (["--fit.size", "33"], "cannot see 33 px (nearest 32)"),
    ],
)
def test_report__bad_input_is_one_line(
    recipe_file: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(recipe_file, *arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_report__a_file_of_another_size_is_refused(
    folder: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(recipe_file, "--factors", "2", "--tables", "10", "--fit.size", "48") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "at 32x32 px, not at 48x48" in error


def test_report__the_header_decides_not_the_folders_name(
    folder: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load(recipe_file, "name=renamed")
    target = fit_folder(recipe, fit_of(recipe, "vit", "featsharp", 2))
    target.mkdir(parents=True)
    (target / FITTED).symlink_to(folder.parents[1] / "fit" / "vit-featsharp-2x-no_debias" / FITTED)
    assert command(recipe_file, "--name", "renamed", "--factors", "2") == 2
    assert "without de-bias" in capsys.readouterr().err.splitlines()[-1]


def test_find__the_projects_own_serves_at_its_size(
    folder: Path,
    recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments = ("--name", "other", "--factors", "2", "--tables", "9", "--upsamplers", "bilinear")
    monkeypatch.setattr(fitted_files, "SHIPPED", folder.parents[1] / "fit" / "vit-bilinear-2x")
    assert command(recipe_file, *arguments, "--num-images", "1") == 0
    caplog.clear()
    assert command(recipe_file, *arguments, "--fit.size", "48") == 2
    assert "at 32x32 px, not at 48x48" in caplog.text


def test_report__goes_on_without_a_file_that_has_no_downsampler(
    folder: Path, recipe_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As those are that were converted from another program's checkpoint."""
    recipe = load(recipe_file, "name=converted")
    for name in ("bilinear", "featup"):
        source = folder.parents[1] / "fit" / f"vit-{name}-2x" / FITTED
        tensors, header = load_file(source), fitted_files.read_header(source)
        kept = {key: value for key, value in tensors.items() if name == "bilinear" or key[0] != "d"}
        target = fit_folder(recipe, fit_of(recipe, "vit", name, 2)) / FITTED
        fitted_files.write(target, kept, header)
    arguments = ("--factors", "2", "--tables", "9", "--upsamplers", "bilinear", "featup")
    words = (*arguments, "--num-images", "1")
    assert command(recipe_file, "--name", "converted", *words) == 0
    assert "vit-featup-2x" in caplog.text
    text = (recipe.folder / "upsampler_report" / "vit" / "tables.md").read_text()
    assert [row[1] == DASH for row in table(text, "Upsamplers, 2x")[1:]] == [False, True]


def test_report__a_teacher_of_one_size_goes_without_native(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--factors", "2", "--tables", "9", "--upsamplers", "bilinear", "tile", "native"]
    words = ["upsampler-report", str(recipe_file), "--teacher", "sam", "--name", "sam", *arguments]
    assert cli.main([*words, "--fit.size", "64", "--fit", "--evaluation.segmentation", ""]) == 0
    folder = recipe_file.parent / "runs" / "sam" / "upsampler_report" / "sam"
    scores = json.loads((folder / "scores.json").read_text())
    assert set(scores["upsamplers"]) == {"sam-bilinear-2x", "sam-tile-2x"}
    assert any("would show teacher 'sam' 128x128 pixels" in note for note in scores["notes"])
    assert "takes 64x64 only" in (folder / "index.html").read_text()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "t-featsharp-2x"),
        ({"options": {"inputs": ["featup", "tiles"], "block": "both"}}, "t-featsharp-2x"),
        ({"options": {"inputs": ["tiles"]}}, "t-featsharp-2x-inputs_tiles"),
        (
            {"options": {"window": 3, "inputs": ("tiles", "featup")}, "de_bias": False},
            "t-featsharp-2x-inputs_tiles_featup-window_3-no_debias",
        ),
        ({"upsampler": "bilinear", "factor": 3, "de_bias": False}, "t-bilinear-3x-no_debias"),
        ({"options": {"inputs": ["../x"]}}, "t-featsharp-2x-inputs_.._x"),
    ],
)
def test_fit_name__says_what_changes_the_model(changes: dict, name: str) -> None:
    assert fit_name(replace(FitConfig(teacher="t"), **changes)) == name


def test_rows_of__the_tables_share_fits(recipe_file: Path) -> None:
    """18 fits a factor make all tables: 6 for de-bias, 9 more inputs, 3 more modules."""
    recipe = load(recipe_file)
    request = Request(upsamplers=("bilinear", "featup", "featsharp", "tile"), factors=(2,))
    assert len(request.fits(recipe)) == 18
    assert len(rows_of(9, recipe, 2, request.upsamplers)) == 5


@pytest.mark.parametrize("fields", [[], ["fit.de_bias=false"], ["fit.options={window: 3}"]])
def test_fit_command__makes_exactly_that_fit(recipe_file: Path, fields: list[str]) -> None:
    recipe = load(recipe_file, *fields)
    for config in Request(factors=(2, 4)).fits(recipe).values():
        words = shlex.split(
            fit_command(Asked(str(recipe_file), ("name=x", *fields)), recipe, config)
        )
        parser = Parser()
        fit_upsampler.add_arguments(parser)
        arguments, arguments.fields = parser.parse(words[2:], takes_fields=True)
        made = fit_recipe(load_recipe(arguments.recipe, fit_upsampler._overrides(arguments)))
        assert made.name == "x"
        assert fit_name(made.fit) == fit_name(config)


def test_upsampler_of__a_fitted_bilinear_leaves_the_stage_alone(recipe_file: Path) -> None:
    """What the report fits for its baseline is no file for the upsampler without parameters."""
    stage = {
        "upsampler": {"factor": 2},
        "partitions": [
            {"name": "p", "size": 64, "teachers": ["vit"], "upsample": ["vit"], "batch_size": 1}
        ],
    }
    data = yaml.safe_load(recipe_file.read_text()) | {"name": "stage", "stages": {"stage3": stage}}
    path = recipe_file.with_name("stage.yaml")
    path.write_text(yaml.safe_dump(data))
    recipe = load_recipe(str(path))
    for name in ("bilinear", "featup"):
        target = fit_folder(recipe, fit_of(recipe, "vit", name, 2)) / FITTED
        target.parent.mkdir(parents=True)
        target.touch()
    assert upsampler_of(describe_stage(recipe, "stage3")).weights == {}
    stage["upsampler"]["name"] = "featup"
    path.write_text(yaml.safe_dump(data))
    assert list(upsampler_of(describe_stage(load_recipe(str(path)), "stage3")).weights) == ["vit"]


def test_unequal_settings__are_said_under_the_table(tmp_path: Path) -> None:
    def bench(**steps: int) -> SimpleNamespace:
        files = {}
        for name, count in steps.items():
            config = FitConfig(teacher="vit", upsampler=name, steps=count, size=32)
            files[fit_name(config)] = path = tmp_path / f"{name}.safetensors"
            fit = {**asdict(config), "seed": 0}
            header = fitted_files.FittedHeader(name, "vit", "", 8, 2, (32, 32), fit=fit)
            fitted_files.write(path, {"bias": torch.zeros(1)}, header)
        return SimpleNamespace(files=files)

    names = ("bilinear", "featup", "featsharp")
    configs = [FitConfig(teacher="vit", upsampler=name) for name in names]
    assert unequal_settings(bench(bilinear=30, featup=30, featsharp=30), configs) == []
    assert unequal_settings(bench(bilinear=30, featup=600), configs) == [
        "These fits are not of one setting: steps 30 in vit-bilinear-2x; 600 in vit-featup-2x."
    ]
    assert unequal_settings(bench(bilinear=30, featup=600), configs[:1]) == []


def test_fit_recipe__needs_to_know_the_teacher(recipe_file: Path) -> None:
    with pytest.raises(ConfigError, match="teachers"):
        fit_recipe(load_recipe(str(recipe_file)))
