"""``radio-distill plan``, as a user calls it."""

import argparse
from pathlib import Path

import pytest

from radio_distill.train.plan import DEVICES
from stages import plan
from stages.cli import main
from stages.common import load_recipe
from stages.missing import find_missing

RECIPE = """
name: tiny
data: {shards: [nowhere/*.tar]}
student: {architecture: test_vit, max_size: 128}
teachers:
  clip: {preset: tiny_open_clip, dtype: bfloat16, micro_batch: 4}
  sam: {preset: tiny_samvit, weights: nowhere/sam.pth}
stages:
  stage1:
    steps: 1000
    partitions:
      - {name: low, size: 64, teachers: [clip, sam], batch_size: 8}
  stage2:
    steps: 500
    start_from: nowhere/checkpoint
    upsampler: {name: tile, factor: 3}
    partitions:
      - {name: high, size: 128, teachers: [clip, sam], upsample: [clip], batch_size: 4}
evaluation: {pictures: nowhere/pictures}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    return "tiny.yaml"


def output_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["plan", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_plan__prints_everything_and_writes_nothing(recipe, capsys, tmp_path):
    status, out, _ = output_of(capsys, recipe, "--devices", "1", "2", "--price", "2.5")
    assert status == 0
    for word in ("Student", "Teachers", "Partitions", "Memory", "Time", "fits", "price", "35%"):
        assert word in out
    tiled = next(line.split() for line in out.splitlines() if "18x18" in line)
    assert tiled[0] == "clip"
    assert tiled[tiled.index("18x18") + 1] == "10"  # nine tiles and the whole picture
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_plan__lists_what_is_missing(recipe, capsys):
    _, out, _ = output_of(capsys, recipe)
    missing = out[out.index("Missing") :].splitlines()[1:]
    assert [line.split(":")[0] for line in missing] == [
        "- data.shards",
        "- teachers.sam",
        "- stages.stage2.start_from",
        "- evaluation.pictures",
    ]
    assert all("nowhere" in line for line in missing)


def test_plan__stands_tile_in_for_an_upsampler_that_cannot_be_built(recipe, capsys):
    status, out, _ = output_of(capsys, recipe, "--stages.stage2.upsampler.name=nearest_neighbour")
    assert status == 0
    assert "stages.stage2.upsampler: unknown upsampler 'nearest_neighbour'" in out
    assert "18x18" in out


def images_of(out: str, teacher: str, grid: str) -> str:
    row = next(line.split() for line in out.splitlines() if grid in line and teacher in line)
    return row[row.index(grid) + 1]


@pytest.mark.parametrize(("name", "images"), [("featsharp", "10"), ("featup", "1")])
def test_plan__costs_a_fitted_upsampler_itself_and_names_the_missing_fit(
    recipe, capsys, name, images
):
    status, out, _ = output_of(capsys, recipe, f"--stages.stage2.upsampler.name={name}")
    assert status == 0
    assert images_of(out, "clip", "18x18") == images
    assert "`tile` stands for it" not in out
    command = f"stages/fit_upsampler.py --recipe tiny --teacher clip --upsampler {name} --factor 3"
    assert f"stages.stage2: no {name} 3x is fitted to clip; run {command}" in out


def test_find_missing__the_fits_of_the_featsharp_recipe():
    lines = [line for line in find_missing(load_recipe("featsharp_radio_l")) if "fitted" in line]
    commands = [line.partition("; run ")[2] for line in lines]
    assert commands == [
        f"stages/fit_upsampler.py --recipe featsharp_radio_l --teacher {teacher} "
        "--upsampler featsharp --factor 3"
        for teacher in ("dfn_clip", "siglip")
    ]


def test_find_missing__a_fit_that_is_there_or_named_is_not_missing(recipe, tmp_path):
    def lines(*overrides: str) -> list[str]:
        fields = ["stages.stage2.upsampler.name=featup", *overrides]
        return [line for line in find_missing(load_recipe(recipe, fields)) if "stage2" in line]

    weights = "stages.stage2.upsampler.weights.clip"
    start = "stages.stage2.start_from"
    assert [line.split(":")[0] for line in lines()] == ["stages.stage2", start]
    assert f"{weights}: nothing at mine.safetensors" in lines(f"{weights}=mine.safetensors")
    fitted = tmp_path / "runs" / "tiny" / "fit" / "clip-featup-3x" / "upsampler.safetensors"
    fitted.parent.mkdir(parents=True)
    fitted.touch()
    assert [line.split(":")[0] for line in lines()] == [start]


def test_plan__price_is_of_all_device_hours(recipe, capsys):
    arguments = (recipe, "--devices", "4", "--device", "cpu", "--stages.stage1.steps=1000000")
    _, out, _ = output_of(capsys, *arguments, "--price", "1")
    total = next(line.split() for line in out.splitlines() if line.startswith("all"))
    hours, device_hours, price = (float(cell.replace(",", "")) for cell in total[1:])
    assert device_hours == pytest.approx(4 * hours, rel=0.02)
    assert price == pytest.approx(device_hours, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "h10"], "unknown 'h10' (did you mean 'h100'?)"),
        (["--devices", "1", "2", "3"], "give one positive number, or 2: stage1, stage2"),
        (["--devices", "0"], "give one positive number"),
        (["--utilisation", "35"], "35.0 is not between 0 and 1"),
        (["--engine.zero_stag=1"], "unknown field 'engine.zero_stag' (did you mean 'zero_stage'?)"),
        (["--teachers.clip.preset=tiny_opne_clip"], "did you mean 'tiny_open_clip'?"),
    ],
)
def test_plan__answers_bad_arguments_in_one_line(recipe, capsys, arguments, message):
    status, out, err = output_of(capsys, recipe, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_plan__help_names_every_device():
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    assert all(name in parser.format_help() for name in DEVICES)


def test_find_missing__looks_into_the_cache_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    recipe = load_recipe("am_radio", ["data.shards=[]"])
    fields = [line.split(":")[0] for line in find_missing(recipe)]
    assert fields == [f"teachers.{name}" for name in recipe.teachers]

    snapshot = tmp_path / "models--timm--samvit_huge_patch16.sa1b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    assert [line.split(":")[0] for line in find_missing(recipe)] == fields[:-1]
