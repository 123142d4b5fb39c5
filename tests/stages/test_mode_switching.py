"""Curves over the size are those of the measure, one a student, and the files hold them."""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import radio_distill
from radio_distill.config import Recipe, build
from radio_distill.data.folder import list_images
from radio_distill.evals.agreement import across_sizes
from radio_distill.models.heads import build_student
from radio_distill.report.feature_images import LABEL_HEIGHT, MARGIN
from radio_distill.train import checkpoint as checkpoints
from radio_distill.train.checkpoint import Checkpoint
from radio_distill.train.checkpointer import save
from stages import cli
from stages.commands.mode_switching import SIDE
from stages.commands.scoring import encoder_of
from teachers import build_teacher

CPU = torch.device("cpu")
SIZES = [16, 32, 48, 64, 80, 96]
"""What the defaults become with an ``evaluation.size`` of 32 and patches of 16."""
RECIPE = {
    "data": {"shards": ["none"]},
    "student": {"architecture": "test_vit", "max_size": 128, "registers": 1, "head_hidden": 16},
    "teachers": {"vit": {"preset": "tiny_vit"}, "sam": {"preset": "tiny_samvit"}},
    "stages": {
        "stage1": {"partitions": [{"name": "a", "size": 32, "teachers": ["vit"], "batch_size": 2}]}
    },
    "engine": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and the runs ``one`` and ``two`` of students that differ in their weights."""
    root = tmp_path_factory.mktemp("switching")
    (root / "images").mkdir()
    generator = np.random.default_rng(0)
    for index in range(3):
        coarse = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((90, 70), Image.Resampling.BICUBIC).save(root / "images" / f"{index}.png")
    for seed, name in enumerate(("one", "two")):
        write_student(root, name, seed, {"size": 32, "images": str(root / "images")})
    write_student(root, "blind", 0, {"size": 32})
    return root


def write_student(root: Path, name: str, seed: int, evaluation: dict) -> None:
    values = {**RECIPE, "name": name, "output": str(root), "evaluation": evaluation}
    recipe = build(Recipe, values)
    specs = {key: build_teacher(key, item, CPU).spec for key, item in recipe.teachers.items()}
    torch.manual_seed(seed)
    student = build_student(recipe.student, specs)
    folder = root / name / "stage1" / "checkpoints" / "step-00000001"
    save(Checkpoint(folder, 1, "stage1", recipe, specs), {"student": student.state_dict()}, 1)


def command(root: Path, output: Path, *arguments: str, runs: tuple[str, ...] = ("one",)) -> int:
    folders = [str(root / name / "stage1") for name in runs]
    return cli.main(["mode-switching", *folders, "--output", str(output), *arguments])


def curves_of(folder: Path) -> dict[str, dict]:
    return {
        item["name"]: item for item in json.loads((folder / "curves.json").read_text())["encoders"]
    }


def size_of(sheet: Path) -> tuple[int, int]:
    with Image.open(sheet) as image:
        assert len(image.getcolors(1 << 20) or ()) > 10
        return image.size


def test_command__writes_a_line_a_student_and_a_point_a_size(root, tmp_path, capsys):
    assert command(root, tmp_path, runs=("one", "two")) == 0
    curves = curves_of(tmp_path)
    assert list(curves) == ["one/stage1", "two/stage1"]
    for curve in curves.values():
        assert [point["size"] for point in curve["sizes"]] == [[side, side] for side in SIZES]
        assert curve["reference"] == [32, 32]
        assert curve["sizes"][1] == {"size": [32, 32], "agreement": 100, "mode_switch": 0}
    assert curves["one/stage1"]["agreement"] != curves["two/stage1"]["agreement"]
    printed = capsys.readouterr().out
    assert "Agreement with 32 px" in printed
    assert "one/stage1" in printed

    assert min(size_of(tmp_path / "curves.png")) > 400
    assert ElementTree.parse(tmp_path / "curves.svg").getroot().tag.endswith("svg")
    columns, rows = 1 + len(SIZES), 2
    assert size_of(tmp_path / "photograph.png") == (
        MARGIN + columns * (SIDE + MARGIN),
        LABEL_HEIGHT + rows * (SIDE + LABEL_HEIGHT + MARGIN) + MARGIN,
    )


def test_command__numbers_are_those_of_the_measure(root, tmp_path):
    assert (
        command(root, tmp_path, "--reference", "64", "--sizes", "96", "32", "--num-images", "2")
        == 0
    )
    curve = curves_of(tmp_path)["one/stage1"]
    found = checkpoints.find(root / "one" / "stage1")
    encoder = encoder_of(found)
    images = list_images(str(root / "images"))[:2]
    expected = across_sizes(encoder, images, [64, 32, 96])
    assert curve["sizes"] == [
        {"size": list(row.size), "agreement": 100 * row.cosine, "mode_switch": 100 * row.shift}
        for row in (expected[1], expected[0], expected[2])
    ]
    assert curve["agreement"] == pytest.approx(50 * (expected[1].cosine + expected[2].cosine))
    assert curve["mode_switch"] == pytest.approx(100 * max(row.shift for row in expected))


def test_command__labels_images_and_the_place_of_the_results(root, tmp_path, capsys):
    folder = root / "blind" / "stage1"
    arguments = ["--images", str(root / "images"), "--sizes", "48x48", "--labels", "low only"]
    assert cli.main(["mode-switching", str(folder), *arguments]) == 0
    facts = json.loads((root / "blind" / "mode_switching" / "curves.json").read_text())
    assert list(facts["runs"]) == ["low only"]
    assert facts["runs"]["low only"].endswith("blind/stage1/checkpoints/step-00000001")
    assert facts["num_images"] == 3
    kept = tmp_path / "kept" / "step-00000001"
    shutil.copytree(folder / "checkpoints" / kept.name, kept)
    assert cli.main(["mode-switching", str(kept), *arguments[:4]]) == 0
    facts = json.loads((tmp_path / "kept" / "mode_switching" / "curves.json").read_text())
    assert list(facts["runs"]) == ["kept/stage1"], "a checkpoint may be copied out of its run"


def test_command__teachers_are_dashed_and_one_of_a_single_size_is_left_out(root, tmp_path, caplog):
    assert command(root, tmp_path, "--teachers", "--sizes", "64", "96") == 0
    curves = curves_of(tmp_path)
    assert {name: curve["is_teacher"] for name, curve in curves.items()} == {
        "one/stage1": False,
        "teacher vit": True,
    }
    assert "teacher sam" in caplog.text
    # a line in both panels and one in the legend
    assert (tmp_path / "curves.svg").read_text().count("stroke-dasharray: 5") == 3


def test_command__a_student_is_measured_above_its_max_size_as_it_is_loaded(root, tmp_path):
    """128 px is as far as its table of positions goes; beyond, they are stretched."""
    assert command(root, tmp_path, "--reference", "64", "--sizes", "128", "160", "192") == 0
    points = curves_of(tmp_path)["one/stage1"]["sizes"]
    assert [point["size"] for point in points] == [[side, side] for side in (64, 128, 160, 192)]
    assert len({point["agreement"] for point in points}) == 4

    found = checkpoints.find(root / "one" / "stage1")
    encoder = encoder_of(found)
    pixels = torch.rand(1, 3, 192, 160, generator=torch.Generator().manual_seed(0))
    loaded = radio_distill.load(root / "one", heads=())
    with torch.inference_mode():
        expected = loaded(pixels)
    torch.testing.assert_close(encoder(pixels).spatial, expected.features)
    torch.testing.assert_close(encoder(pixels).summary, expected.summary)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "40"], "one/stage1 cannot take 40 px: sizes are multiples of 16"),
        (["--sizes", "150"], "multiples of 16 (nearest 144)"),
        (["--sizes", "0"], "'0' is no size"),
        (["--sizes", "48x64"], "only squares here; give one side"),
        (["--reference", "-32"], "'-32' is no size"),
        (["--sizes", "32"], "nothing to compare with the reference 32 px"),
        (["--labels", "a", "b"], "--labels: 2 for 1 runs"),
        (["--images", "nowhere"], "nowhere"),
    ],
)
def test_command__bad_argument(root, tmp_path, capsys, arguments, message):
    assert command(root, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (("absent",), "no whole checkpoint in"),
        (("one", "one"), "two runs are called alike (one/stage1, one/stage1)"),
        (("blind",), "evaluation.images is empty"),
    ],
)
def test_command__bad_runs(root, tmp_path, capsys, runs, message):
    assert command(root, tmp_path, runs=runs) == 2
    assert message in capsys.readouterr().err


def test_command__output_that_cannot_be_written(root, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command(root, tmp_path / "file", "--sizes", "48") == 2
    assert "cannot write" in capsys.readouterr().err
