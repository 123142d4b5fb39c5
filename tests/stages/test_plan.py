"""``radio-distill plan``, as a user calls it."""

import argparse
import re
import shlex
from pathlib import Path

import pytest
import torch

from radio_distill.config import Recipe, build, dtypes_of
from radio_distill.errors import ConfigError
from radio_distill.plan.time import DEVICES
from radio_distill.system.files import sha256_of
from stages import planning
from stages.cli import main
from stages.commands import plan
from stages.commands.missing import check_stages, find_missing
from stages.fits import with_files
from stages.recipes import Asked, describe_stage, load_recipe
from upsamplers import fitted_files
from upsamplers.fitted_files import FittedHeader

RECIPE = """
name: tiny
data: {shards: [nowhere/*.tar]}
student: {architecture: test_vit, max_size: 128}
teachers:
  clip: {preset: tiny_open_clip, dtype: bfloat16, micro_batch: 4}
  sam: {preset: tiny_samvit, weights: nowhere/sam.pth, summary_weight: 0}
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
evaluation: {images: nowhere/images}
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


def test_plan__prices_a_suite(recipe, capsys):
    status, out, _ = output_of(capsys, recipe, "--devices", "1", "--suite", "quick")
    assert status == 0
    rows = [line.split() for line in out.splitlines()]
    (knn,) = [row for row in rows if row[:1] == ["imagenet_knn"]]
    assert knn[1:6] == ["published", "set", "120", "120", "224x224"]
    assert "not in it: knn: needs evaluation.labels" in out
    assert "not in it: agreement:" in out  # its folder is not there


def test_plan__prices_those_benchmarks_of_a_suite_that_are_named(recipe, capsys):
    named = ["--evaluation.benchmarks", "[imagenet_knn, knn]"]
    status, out, _ = output_of(capsys, recipe, "--devices", "1", "--suite", "quick", *named)
    assert status == 0
    asked = out.partition("Suite quick")[2].partition("Images:")[0].splitlines()[2:]
    assert [line.split()[0] for line in asked if line.strip()] == ["imagenet_knn", "all"]
    assert re.findall(r"not in it: (\w+)", out) == ["knn"]


def test_plan__prints_everything_and_writes_nothing(recipe, capsys, tmp_path):
    status, out, _ = output_of(capsys, recipe, "--devices", "1", "2", "--price", "2.5")
    assert status == 0
    for word in ("Student", "Teachers", "Partitions", "Memory", "Time", "fits", "price", "35%"):
        assert word in out
    tiled = next(line.split() for line in out.splitlines() if "18x18" in line)
    assert tiled[0] == "clip"
    assert tiled[tiled.index("18x18") + 1] == "10"  # nine tiles and the whole image
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_plan__auto_is_the_number_type_of_the_device(recipe, own_dtype):
    written = {"engine.precision": "auto", "teachers.clip.dtype": "bfloat16"}
    loaded = load_recipe(recipe)
    assert dtypes_of(loaded) == {**written, "teachers.sam.dtype": "auto"}
    for native in ("float32", "bfloat16"):
        planned = dtypes_of(planning.build_models(loaded, native).recipe)
        assert planned["engine.precision"] == planned["teachers.sam.dtype"] == native
        assert planned["teachers.clip.dtype"] == "bfloat16"
    assert {plan._device(kind).native_dtype for kind in DEVICES if kind != "cpu"} == {"bfloat16"}
    assert plan._device("cpu").native_dtype == own_dtype("cpu"), "as this processor has it"


def test_plan__lists_what_is_missing(recipe, capsys):
    _, out, _ = output_of(capsys, recipe)
    missing = out[out.index("Missing") :].splitlines()[1:]
    assert [line.split(":")[0] for line in missing] == [
        "- data.shards",
        "- teachers.sam",
        "- stages.stage2.start_from",
        "- evaluation.images",
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
    command = (
        f"radio-distill fit-upsampler tiny.yaml --teacher clip --upsampler {name} "
        "--factor 3 --fit.size 48"
    )
    lacking = f"stages.stage2: no {name} 3x is fitted to teacher 'clip' at 48 px; run {command}"
    assert f"{lacking}, or set stages.stage2.upsampler.weights.clip" in out


def test_plan__costs_an_upsampler_with_the_options_that_the_recipe_fits_it_with(recipe, capsys):
    fields = ("--stages.stage2.upsampler.name=resfu", "--fit.upsampler=resfu")
    status, out, _ = output_of(capsys, recipe, *fields, "--fit.options={tiles: true}")
    assert status == 0
    assert images_of(out, "clip", "18x18") == "10"


def test_find_missing__the_fits_of_the_featsharp_recipe():
    found = find_missing(load_recipe("featsharp_radio_l"), Asked("featsharp_radio_l"))
    needs = [(need.stage.name, need.teacher, need.sides) for need in found.unfitted.values()]
    assert needs == [("stage3", "dfn_clip", [378]), ("stage3", "siglip", [378])]


def write_fitted(path: Path, **changes: object) -> None:
    """Write a file with a header alone, of `clip` unless told otherwise."""
    values = {"upsampler": "featup", "teacher": "clip", "weights_hash": "", "channels": 32}
    header = FittedHeader(**{**values, "factor": 3, "size": (48, 48), **changes})
    fitted_files.write(path, {"bias": torch.zeros(1)}, header)


FEATUP = ("stages.stage2.upsampler.name=featup", "stages.stage2.start_from=")
OWN = Path("runs/tiny/fit/clip-featup-3x/upsampler.safetensors")


def lines_of_stage2(recipe: str, *fields: str) -> list[str]:
    fields = (*FEATUP, *fields)
    found = find_missing(load_recipe(recipe, fields), Asked(recipe, fields))
    return [line for line in (*found.missing, *found.unfitted) if line.startswith("stages.stage2")]


def test_find_missing__a_fit_that_is_there_and_fits_is_not_missing(recipe):
    assert len(lines_of_stage2(recipe)) == 1
    write_fitted(OWN)
    assert lines_of_stage2(recipe) == []
    elsewhere = "stages.stage2.upsampler.weights.clip=mine.safetensors"
    assert lines_of_stage2(recipe, elsewhere) == [
        "stages.stage2.upsampler.weights.clip: nothing at mine.safetensors"
    ]
    write_fitted(Path("mine.safetensors"))
    assert lines_of_stage2(recipe, elsewhere) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (64, 64)}, "was fitted at 64x64 px, the partition shows it 48x48: set teacher_s"),
        ({"factor": 2}, "fitted for factor 2, the recipe asks for 3"),
        ({"upsampler": "featsharp"}, "is a fitted 'featsharp', the recipe asks for 'featup'"),
        ({"weights_hash": "ab" * 32}, "upsampler for another teacher"),
        ({"channels": 31}, "upsampler for another teacher"),
    ],
)
def test_find_missing__a_fit_of_something_else_says_so(recipe, changes, message):
    write_fitted(OWN, **changes)
    (line,) = lines_of_stage2(recipe)
    assert message in line
    assert str(OWN) in line
    assert "radio-distill fit-upsampler tiny.yaml --teacher clip" in line


def test_find_missing__a_file_with_another_sum_or_none_at_all(recipe):
    write_fitted(OWN)
    (line,) = lines_of_stage2(recipe, f"stages.stage2.upsampler.sha256.clip={'0' * 64}")
    assert "stages.stage2.upsampler.sha256.clip" in line
    OWN.write_bytes(b"damaged")
    assert "cannot read upsampler" in lines_of_stage2(recipe)[0]


def test_find_missing__any_size_takes_any(recipe):
    write_fitted(OWN, size=(64, 64))
    assert lines_of_stage2(recipe, "stages.stage2.upsampler.options.any_size=true") == []


def test_find_missing__one_fit_cannot_have_two_sizes(recipe):
    (line,) = lines_of_stage2(
        recipe,
        "stages.stage2.partitions.high.size=0",
        "stages.stage2.partitions.high.sizes=[96, 128]",
        "teachers.clip.input_size=match",
    )
    assert "is shown at 48x48, 64x64 px" in line
    (line,) = lines_of_stage2(
        recipe,
        "stages.stage1.upsampler={name: featup, factor: 3}",
        "stages.stage1.partitions.low.upsample=[clip]",
        "stages.stage1.partitions.low.teacher_sizes.clip=32",
    )
    assert "stage1 shows this teacher at 32 px" in line


def test_find_missing__the_command_is_of_the_recipe_as_it_was_asked_for(recipe):
    (line,) = lines_of_stage2(recipe, "name=other", "fit.steps=7", "fit.size=12")
    words = shlex.split(line.partition("; run ")[2].partition(", or set")[0])
    arguments, fields = words[:9], words[9:]
    assert arguments == [
        *("radio-distill", "fit-upsampler", "tiny.yaml", "--teacher", "clip"),
        *("--upsampler", "featup", "--factor", "3"),
    ]
    assert fields == ["--fit.size", "48", "--name", "other", "--fit.steps", "7"]


def test_find_missing__the_projects_own_of_another_size_is_said_to_be_that():
    fields = ["stages.stage3.upsampler.name=featsharp", "stages.stage3.start_from="]
    assert not find_missing(load_recipe("demo", fields)).unfitted
    smaller = "stages.stage3.partitions.high.teacher_sizes.dino=56"
    (line,) = find_missing(load_recipe("demo", [*fields, smaller])).unfitted
    assert "teacher 'dino' at 56 px" in line
    assert "112x112 px" in line


def test_with_files__the_projects_own_are_written_down_by_a_name_that_travels():
    recipe = load_recipe("demo", ["stages.stage3.upsampler.name=featsharp"])
    stage, problems = with_files(describe_stage(recipe, "stage3"))
    config = stage.upsampler
    assert problems == []
    assert config.weights["dino"] == "shipped:vits14_packaged-featsharp-2x.safetensors"
    own = fitted_files.SHIPPED / "vits14_packaged-featsharp-2x.safetensors"
    assert config.sha256["dino"] == sha256_of(own)
    assert config.sizes == {"dino": 112, "efficientnet": 128}
    again = describe_stage(stage.recipe, "stage3")
    assert with_files(again) == (again, []), "what was written down is a recipe like any other"
    other = describe_stage(load_recipe("demo"), "stage3")
    assert with_files(other) == (other, [])


def test_plan__price_is_of_all_device_hours(recipe, capsys):
    arguments = (recipe, "--devices", "4", "--device", "cpu", "--stages.stage1.steps=100000000")
    _, out, _ = output_of(capsys, *arguments, "--price", "1")
    total = next(line.split() for line in out.splitlines() if line.startswith("all"))
    units = {"min": 1 / 60, "h": 1}
    hours, device_hours = (
        float(amount.replace(",", "")) * units[unit] for amount, unit in (total[1:3], total[3:5])
    )
    assert device_hours == pytest.approx(4 * hours, rel=0.02)
    assert float(total[5].replace(",", "")) == pytest.approx(device_hours, rel=0.02)


@pytest.mark.parametrize(
    ("given", "said", "unsaid"),
    [
        ((), ["8 devices (--devices N)", "their kind, h100 (--device TYPE)"], []),
        (("--devices", "2"), ["their kind, h100"], ["devices (--devices"]),
        (("--device", "cpu"), ["8 devices (--devices N)"], ["their kind"]),
        (("--devices", "2", "--device", "cpu"), [], ["Assumed, since", "this machine has"]),
    ],
)
def test_plan__says_what_it_assumes(recipe, capsys, given, said, unsaid):
    _, out, _ = output_of(capsys, recipe, *given)
    assert all(words in out for words in said)
    assert not any(words in out for words in unsaid)
    assert "Times hold the statistics of the teachers" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "h10"], "unknown 'h10' (did you mean 'h100'?)"),
        (["--devices", "1", "2", "3"], "give one positive number, or 2: stage1, stage2"),
        (["--devices", "0"], "give one positive number"),
        (["--utilisation", "35"], "35.0 is not between 0 and 1"),
        (["--price", "nan"], "--price: nan is no price"),
        (["--engine.zero_stag=1"], "unknown field 'engine.zero_stag' (did you mean 'zero_stage'?)"),
        (["--teachers.clip.preset=tiny_opne_clip"], "did you mean 'tiny_open_clip'?"),
    ],
)
def test_plan__answers_bad_arguments_in_one_line(recipe, capsys, arguments, message):
    status, out, err = output_of(capsys, recipe, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_counts__of_one_stage_are_one_number():
    data = {"name": "x", "data": {"shards": ["none"]}, "teachers": {"vit": {"preset": "tiny_vit"}}}
    partition = {"name": "a", "size": 32, "teachers": ["vit"], "batch_size": 2}
    recipe = build(Recipe, {**data, "stages": {"stage1": {"partitions": [partition]}}})
    with pytest.raises(ConfigError, match=r"give one positive number$"):
        plan._counts([0], recipe)


def test_plan__help_names_every_device():
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    assert all(name in parser.format_help() for name in DEVICES)


def test_find_missing__looks_into_the_cache_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    recipe = load_recipe("am_radio", ["data.shards=[]"])
    found = find_missing(recipe)
    fields = [line.split(":")[0] for line in found.notes]
    assert fields == [f"teachers.{name}" for name in recipe.teachers]
    assert found.missing == []

    snapshot = tmp_path / "models--timm--samvit_huge_patch16.sa1b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    assert [line.split(":")[0] for line in find_missing(recipe).notes] == fields[:-1]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert [line.split(":")[0] for line in find_missing(recipe).missing] == fields[:-1]


def test_find_missing__data_of_benchmarks_where_scores_are_wanted(recipe):
    fields = ["evaluation.images=", "evaluation.benchmarks=[fidelity, knn]"]
    made = load_recipe(recipe, fields)
    assert not any("evaluation" in line for line in find_missing(made).missing)
    lines = [line for line in find_missing(made, scores=True).missing if "evaluation" in line]
    fields = [line.split()[0].rstrip(":") for line in lines]
    assert fields == ["evaluation.images", "evaluation.labels"]


def test_check_stages__a_later_stage_is_looked_at_before_the_first(recipe):
    fields = [FEATUP[0], "stages.stage2.start_from=stage1"]
    made, asked = load_recipe(recipe, fields), Asked(recipe, tuple(fields))
    with pytest.raises(ConfigError, match=r"featup 3x .*'clip' at 48 px"):
        check_stages(made, ["stage1", "stage2"], asked)
    check_stages(made, ["stage1"], asked)
    write_fitted(OWN)
    check_stages(made, ["stage1", "stage2"], asked)
    with pytest.raises(ConfigError) as caught:
        check_stages(made, ["stage2"], asked)
    assert "stages.stage2 starts from stage1" in str(caught.value)
    assert "radio-distill train tiny.yaml --stages stage1 --stages.stage2" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("stages.stage2.upsampler.name=bilinaer", "stages.stage2.upsampler: unknown upsampler"),
        ("stages.stage2.upsampler.options={beta: 1}", "takes no options, not 'beta'"),
        ("stages.stage2.upsampler.name=anyup", "upsampler 'anyup' is not part of this project"),
        ("stages.stage2.partitions.high.teacher_sizes.clip=50", "50 is not a multiple of its"),
        ("stages.stage2.start_from=nowhere", "stages.stage2.start_from: neither a stage"),
    ],
)
def test_train__what_stage_2_would_stop_at_ends_it_before_stage_1(recipe, capsys, field, message):
    assert main(["train", recipe, "--stages.stage2.start_from", "stage1", f"--{field}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("runs").exists()
