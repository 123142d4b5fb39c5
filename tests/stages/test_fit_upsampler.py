"""Fitting an upsampler from the command line: what it writes, how it goes on, what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from e2e import one_line
from radio_distill.config import Facts, FitConfig, UpsamplerConfig
from radio_distill.data.shards import write_shards
from radio_distill.errors import WeightsError
from radio_distill.stage import FIT, resolve_stage
from radio_distill.system.distributed import World
from stages import fit_upsampler
from stages.cli import main as cli
from stages.fits import FITTED, fit_folder, fit_name, fit_of, upsampler_of
from stages.recipes import describe_stage, load_recipe
from teachers import build_teacher, teacher_specs
from upsamplers import build_upsampler
from upsamplers.comparison import load_fitted
from upsamplers.fitted_files import hash_of, read_header, read_tensors

RECIPE = {
    "name": "tiny",
    "seed": 3,
    "data": {"workers": 0},
    "student": {"architecture": "test_vit", "max_size": 128},
    "teachers": {
        "vit": {"preset": "tiny_vit"},
        "sam": {"preset": "tiny_samvit", "summary_weight": 0},
    },
    "normalizer": {"images": 16},
    "fit": {
        "upsampler": "featup",
        "steps": 4,
        "batch_size": 2,
        "views": 2,
        "warmup_steps": 1,
        "downsampler_kernel": 4,
        "images_every": 0,
    },
    "stages": {
        "stage3": {
            "upsampler": {"name": "featup", "factor": 2},
            "partitions": [
                {
                    "name": "high",
                    "size": 96,
                    "teachers": ["vit"],
                    "upsample": ["vit"],
                    "batch_size": 2,
                }
            ],
        }
    },
    "engine": {"precision": "float32", "device": "cpu"},
    "log": {"every": 1, "save_every": 2, "keep_last": 9, "trackers": []},
}


def write_images(folder: Path, count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 255, (5, 6, 3), dtype=np.uint8))
        image = np.array(coarse.resize((110, 100), Image.Resampling.BICUBIC))
        top, left = generator.integers(0, 60, 2)
        image[top : top + 30 : 2, left : left + 30] = generator.integers(0, 255, 3)
        Image.fromarray(image).save(folder / f"{index}.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 10, seed=0)
    write_images(root / "held_out", 3, seed=1)
    write_shards(root / "train", root / "shards", images_per_shard=5)
    return root


@pytest.fixture
def recipe_file(tmp_path: Path, images: Path) -> str:
    recipe = {
        **RECIPE,
        "output": str(tmp_path / "runs"),
        "data": {**RECIPE["data"], "shards": [str(images / "shards")]},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return str(path)


def run(recipe_file: str, *arguments: str, teacher: str = "vit") -> int:
    return fit_upsampler.main([recipe_file, "--teacher", teacher, *arguments])


def folder_of(recipe_file: str, name: str = "vit-featup-2x") -> Path:
    return Path(recipe_file).parent / "runs" / "tiny" / "fit" / name


@pytest.fixture
def asked(monkeypatch, recipe_file):
    """Return the section `fit` that a command line asks for; nothing is fitted."""

    def ask(*arguments: str):
        recipes = []
        monkeypatch.setattr(
            fit_upsampler, "fit_upsampler", lambda recipe, *_: recipes.append(recipe)
        )
        assert run(recipe_file, *arguments) == 0
        return recipes[0].fit

    return ask


def test_arguments__fields_go_before_flags_and_flags_before_presets(asked):
    fit = asked("--preset", "featup")
    assert (fit.steps, fit.batch_size, fit.crf, fit.de_bias) == (2000, 4, 0.001, False)
    assert (fit.view_range, fit.learning_rate) == ("featup", 1e-3)
    assert fit.upsampler == "featup", "the recipe's own"

    fit = asked("--preset", "featup", "--upsampler", "carafe", "--factor", "3", "--fit.steps", "7")
    assert (fit.upsampler, fit.factor, fit.steps, fit.crf) == ("carafe", 3, 7, 0.001)
    fit = asked(
        "--fit.upsampler", "sapa", "--upsampler", "carafe", "--fit.factor=5", "--factor", "3"
    )
    assert (fit.upsampler, fit.factor) == ("sapa", 5)
    assert asked("--preset", "long").steps == 3 * asked("--preset", "regular").steps == 9000


def test_arguments__the_only_teacher_needs_no_name(recipe_file, monkeypatch):
    recipes = []
    monkeypatch.setattr(fit_upsampler, "fit_upsampler", lambda recipe, *_: recipes.append(recipe))
    recipe = yaml.safe_load(Path(recipe_file).read_text())
    del recipe["teachers"]["sam"]
    Path(recipe_file).write_text(yaml.safe_dump(recipe))
    assert fit_upsampler.main([recipe_file]) == 0
    assert recipes[0].fit.teacher == "vit"


@pytest.mark.parametrize("upsampler", ["featup", "featsharp"])
def test_fit__writes_what_stage_3_of_the_recipe_takes(recipe_file, images, capfd, upsampler):
    held_out = str(images / "held_out")
    arguments = ["--upsampler", upsampler, "--evaluation.images", held_out]
    assert run(recipe_file, *arguments, "--fit.images_every", "4") == 0
    folder = folder_of(recipe_file, f"vit-{upsampler}-2x")
    path = folder / FITTED
    assert capfd.readouterr().out.strip() == str(path)
    assert (folder / "images" / "step-00000004.png").is_file()

    header = read_header(path)
    assert (header.upsampler, header.teacher, header.factor) == (upsampler, "vit", 2)
    assert (header.channels, header.size, header.normalizer) == (32, (48, 48), "phi_s")
    assert header.fit["steps"] == 4
    assert header.fit["seed"] == 3
    assert header.fit["shards"] == [str(images / "shards")]
    assert header.measures.keys() == {"fidelity", "total_variation", "crf", "mmd", "images"}
    assert header.measures["images"] == 3
    assert header.measures["fidelity"] > 0
    parts = read_tensors(path)
    assert parts.keys() == {"network", "bias", "normalizer", "downsampler"}
    assert hash_of(parts["normalizer"]) == header.statistics_hash

    recipe = load_recipe(recipe_file, [f"stages.stage3.upsampler.name={upsampler}"])
    config = upsampler_of(describe_stage(recipe, "stage3"))
    assert config.weights == {"vit": str(path)}
    teacher = build_teacher("vit", recipe.teachers["vit"])
    made = build_upsampler(config, {"vit": teacher})
    assert made(teacher, torch.rand(2, 3, 96, 96), (12, 12)).spatial.shape == (2, 32, 12, 12)


def test_upsampler_of__the_recipe_s_own_file_goes_first_and_other_fits_are_not_taken(recipe_file):
    recipe = load_recipe(recipe_file)
    path = fit_folder(recipe, fit_of(recipe, "vit", "featup", 2)) / FITTED
    assert upsampler_of(describe_stage(recipe, "stage3")).weights == {}
    path.parent.mkdir(parents=True)
    path.touch()
    assert upsampler_of(describe_stage(recipe, "stage3")).weights == {"vit": str(path)}
    own = load_recipe(recipe_file, ["stages.stage3.upsampler.weights.vit=mine.safetensors"])
    assert upsampler_of(describe_stage(own, "stage3")).weights == {"vit": "mine.safetensors"}
    for change in ("factor=3", "name=featsharp", "name=bilinear", "name=tile"):
        other = load_recipe(recipe_file, [f"stages.stage3.upsampler.{change}"])
        assert upsampler_of(describe_stage(other, "stage3")).weights == {}


def test_fit_name__says_what_differs_from_the_defaults_of_the_network():
    config = FitConfig(teacher="vit", upsampler="featsharp", factor=2)
    assert fit_name(config) == "vit-featsharp-2x"
    same = replace(config, options={"inputs": ("featup", "tiles"), "block": "both"})
    assert fit_name(same) == "vit-featsharp-2x"
    other = replace(config, options={"window": 3, "inputs": ["bilinear", "tiles"]}, de_bias=False)
    assert fit_name(other) == "vit-featsharp-2x-inputs_bilinear_tiles-window_3-no_debias"
    assert "/" not in fit_name(replace(config, options={"preset": "../released"}))


def test_fit_of__options_are_those_of_the_recipe_s_own_upsampler(recipe_file):
    recipe = load_recipe(recipe_file, ["fit.options={radius: 2}", "fit.de_bias=false"])
    own = fit_of(recipe, "vit", "featup", 3)
    assert (own.options, own.factor, own.de_bias) == ({"radius": 2}, 3, False)
    assert fit_of(recipe, "vit", "featsharp", 3).options == {}


def test_upsampler_of__a_fit_of_bilinear_is_no_file_of_stage_3(recipe_file):
    """`bilinear` is fitted as a yardstick; the upsampler of that name takes no file."""
    assert run(recipe_file, "--upsampler", "bilinear", "--fit.steps", "1") == 0
    assert (folder_of(recipe_file, "vit-bilinear-2x") / FITTED).is_file()
    recipe = load_recipe(recipe_file, ["stages.stage3.upsampler.name=bilinear"])
    assert upsampler_of(describe_stage(recipe, "stage3")) == UpsamplerConfig(
        name="bilinear", factor=2
    )
    build_upsampler(upsampler_of(describe_stage(recipe, "stage3")), {})


def test_resume__a_complete_fit_is_not_run_again_and_half_of_one_ends_the_same(recipe_file):
    assert run(recipe_file) == 0
    folder = folder_of(recipe_file)
    expected, log = load_file(folder / FITTED), (folder / "metrics.jsonl").read_text()
    newest = folder / "checkpoints" / "step-00000004"
    written = (newest / "meta.json").stat().st_mtime_ns
    assert run(recipe_file, "--resume") == 0
    assert (newest / "meta.json").stat().st_mtime_ns == written
    assert (folder / "metrics.jsonl").read_text() == log

    shutil.rmtree(newest)
    (folder / FITTED).unlink()
    assert run(recipe_file, "--resume") == 0
    resumed = load_file(folder / FITTED)
    assert expected.keys() == resumed.keys()
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name
    steps = [
        json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3, 4]


def test_fit__by_halvings_is_resumed_to_the_same_and_has_no_measure_of_views(
    recipe_file, images, capfd
):
    words = ["--teacher", "vit", "--preset", "uplift", "--fit.size", "64", "--fit.batch_size", "2"]
    words += ["--fit.steps", "4", "--fit.options", "{cell_pixels: 2}"]
    words += ["--evaluation.images", str(images / "held_out")]
    assert fit_upsampler.main([str(recipe_file), *words]) == 0
    folder = Path(capfd.readouterr().out.split()[-1]).parent
    whole = load_file(folder / FITTED)
    assert not any(name.startswith("downsampler") for name in whole)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    (folder / FITTED).unlink()
    assert fit_upsampler.main([str(recipe_file), *words, "--resume"]) == 0
    for name, value in load_file(folder / FITTED).items():
        assert torch.equal(value, whole[name]), name
    with pytest.raises(WeightsError, match="downsampler"):
        load_fitted(folder / FITTED)
    capfd.readouterr()
    assert fit_upsampler.main([str(recipe_file), *words, "--fit.size", "48"]) != 0
    assert "fit.halvings: teacher 'vit' cannot see 48 px" in capfd.readouterr().err
    assert fit_upsampler.main([str(recipe_file), *words, "--teacher", "sam"]) != 0
    assert "(it takes one)" in capfd.readouterr().err


def test_resume__a_changed_recipe_is_refused_and_one_that_looks_elsewhere_is_not(
    recipe_file, images, capfd
):
    assert run(recipe_file, "--fit.steps", "2") == 0
    assert run(recipe_file, "--fit.steps", "2", "--resume", "--fit.learning_rate", "0.1") == 2
    assert "fit.learning_rate: 0.0001 -> 0.1" in one_line(capfd)
    measured = ["--evaluation.images", str(images / "held_out"), "--log.every", "9"]
    assert run(recipe_file, "--fit.steps", "2", "--resume", *measured) == 0
    assert read_header(folder_of(recipe_file) / FITTED).measures["images"] == 3


def test_fit__again_moves_the_earlier_one_aside(recipe_file):
    assert run(recipe_file, "--fit.steps", "1") == 0
    assert run(recipe_file, "--fit.steps", "1") == 0
    assert (folder_of(recipe_file, "vit-featup-2x.1") / FITTED).is_file()


def test_fit__of_one_size_for_a_teacher_without_summary(recipe_file):
    assert run(recipe_file, "--fit.steps", "1", teacher="sam") == 0
    assert read_header(folder_of(recipe_file, "sam-featup-2x") / FITTED).size == (64, 64)


def test_fit__without_normalizer(recipe_file):
    assert run(recipe_file, "--fit.steps", "1", "--normalizer.name", "none") == 0
    assert "normalizer" not in read_tensors(folder_of(recipe_file) / FITTED)


def test_build_fit__starts_the_same_whether_statistics_are_estimated_or_kept(recipe_file, tmp_path):
    def downsampler(images: int) -> torch.Tensor:
        overrides = ["fit.teacher=vit", f"normalizer.images={images}"]
        recipe = fit_upsampler.fit_recipe(load_recipe(recipe_file, overrides))
        stage = resolve_stage(recipe, FIT, teacher_specs(recipe), Facts(), folder=tmp_path)
        made = fit_upsampler.build_fit(stage, World(), torch.device("cpu"), None)
        return made.consistency.downsampler.attention_net[1].weight

    assert torch.equal(downsampler(16), downsampler(80))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--teacher", "vti"], "fit.teacher: no teacher 'vti' (did you mean 'vit'?)"),
        (["--fit.teacher", ""], "name one of the recipe's teachers with --teacher: vit, sam"),
        (["--upsampler", "featsahrp"], "did you mean 'featsharp'?"),
        (["--upsampler", "tile"], "unknown network 'tile'"),
        (["--preset", "lnog"], "invalid choice: 'lnog'"),
        (["--presett", "long"], "did you mean '--preset'?"),
        (["--factor", "0"], "fit.factor: 0 is below 1"),
        (["--factor", "1", "--upsampler", "featsharp"], "featsharp's factor is 1"),
        (["--factor", "two"], "invalid int value: 'two'"),
        (["--fit.size", "50"], "fit.size: teacher 'vit' cannot see 50 px (nearest 48)"),
        (["--teacher", "sam", "--fit.size", "32"], "cannot see 32 px (nearest 64)"),
        (["--fit.options", "{raduis: 3}"], "no option 'raduis' (did you mean 'radius'?)"),
        (["--fit.options", "{radius: 0}"], "featup.radius: 0 is below 1"),
        (["--fit.pool", "3"], "fit.pool: 3 is not a multiple of fit.batch_size 2"),
        (["--fit.downsampler_kernel", "99"], "larger than the map"),
        (["--fit.stpes", "3"], "unknown field 'fit.stpes' (did you mean 'steps'?)"),
        (["--normalizer.name", "layer_norm"], "layer_norm has no way back to the teacher's space"),
        (["--normalizer.name", "phi-s"], "unknown normalizer 'phi-s' (did you mean 'phi_s'?)"),
        (["--evaluation.images", "nowhere"], "no folder nowhere, of images or of shards"),
        (["--upsampler", "typo", "--evaluation.images", "nowhere"], "unknown network 'typo'"),
        (["--data.shards", "[nowhere]"], "no shards found for 'nowhere'"),
        (["--engine.device", "cuda"], "torch sees no GPU"),
        (["--teachers.vit.weights", "absent.safetensors"], "absent.safetensors"),
    ],
)
def test_fit__bad_input_is_one_line_and_nothing_is_fitted(recipe_file, capfd, arguments, expected):
    assert run(recipe_file, *arguments) == 2
    assert expected in one_line(capfd)
    fits = Path(recipe_file).parent / "runs" / "tiny" / "fit"
    assert not list(fits.glob("*/checkpoints"))


def test_fit__where_nothing_can_be_written(recipe_file, capfd, tmp_path):
    (tmp_path / "occupied").write_text("")
    assert run(recipe_file, "--output", str(tmp_path / "occupied")) == 2
    assert "cannot write to" in one_line(capfd)


def test_fit__more_processes_than_images(recipe_file, capfd, monkeypatch):
    monkeypatch.setattr("stages.launch.join", lambda *_, **__: None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert run(recipe_file) == 2
    assert "3 processes" in one_line(capfd)


def test_cli__has_it_as_a_command_too(recipe_file):
    arguments = [recipe_file, "--teacher", "vit", "--fit.steps", "1"]
    assert cli(["fit-upsampler", *arguments]) == 0
    assert (folder_of(recipe_file) / FITTED).is_file()
