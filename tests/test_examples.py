"""Each file of examples/ runs; those of examples/my_package have a test of their own."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def photographs(tmp_path):
    paths = [tmp_path / "photo.jpg", tmp_path / "other.jpg"]
    for number, path in enumerate(paths):
        Image.effect_noise((96 + 16 * number, 80), 60).convert("RGB").save(path)
    return list(map(str, paths))


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a file with arguments, in a folder of its own; returns what it printed."""

    def run_file(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_file


def test_use_student(run, write_run, photographs, tmp_path):
    output = tmp_path / "features.safetensors"
    words = ("--head", "dino", "--output", output)
    printed = run("use_student.py", write_run(), *photographs, *words)
    assert "photo.jpg: 1.000" in printed
    shapes = {name: list(tensor.shape) for name, tensor in load_file(output).items()}
    assert shapes == {"photo.jpg": [4, 5, 6], "other.jpg": [4, 5, 7]}


def test_use_student__photographs_are_upright_and_of_any_depth(run, write_run, tmp_path):
    turned = Image.Exif()
    turned[0x112] = 6
    image = Image.effect_noise((96, 80), 60)
    image.save(tmp_path / "turned.jpg", exif=turned)
    Image.fromarray(np.asarray(image).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    printed = run("use_student.py", write_run(), tmp_path / "turned.jpg", tmp_path / "deep.png")
    assert "turned.jpg: summary [1, 128], features [1, 64, 6, 5]" in printed
    assert "deep.png: summary [1, 128], features [1, 64, 5, 6]" in printed


def test_pca_features(run, write_run, photographs, tmp_path):
    printed = run("pca_features.py", write_run(), photographs[0])
    assert "[64, 14, 17]" in printed
    assert Image.open(tmp_path / "pca_features.png").width > 400
