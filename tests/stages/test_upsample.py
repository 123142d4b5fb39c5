"""`radio-distill upsample` writes what teacher and upsampler give, and a picture of it."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from radio_distill.config import TeacherConfig, UpsamplerConfig
from radio_distill.evals.encoder import to_pixels
from radio_distill.system.files import sha256_of
from stages import cli
from stages.commands.upsample import SIDE, paint
from teachers import build_teacher
from upsamplers import build_upsampler
from upsamplers.deep_image_prior import DeepImagePrior
from upsamplers.fitted import FittedUpsampler, save_model
from upsamplers.fitted_files import FittedHeader
from upsamplers.implicit import fit_implicit


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """A photograph, twice as wide as high, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((160, 80), 60).convert("RGB").save("cat.png")
    return Path("cat.png")


def upsample(*words):
    return cli.main(["upsample", *map(str, words)])


def about(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["radio_distill"])


def test_upsample__writes_the_upsamplers_features_and_says_of_what(photo, capsys):
    assert upsample(photo, "--teacher", "tiny_vit", "--upsampler", "tile", "--factor", "3") == 0
    written = load_file("cat-tile-3x.safetensors")
    teacher = build_teacher("tiny_vit", TeacherConfig(preset="tiny_vit"))
    pixels = to_pixels(photo, (24 * 3, 48 * 3))[None]
    upsampler = build_upsampler(UpsamplerConfig(name="tile", factor=3), {"tiny_vit": teacher})
    expected = upsampler(teacher, pixels, (9, 18))
    assert torch.equal(written["features"], expected.spatial[0])
    assert torch.equal(written["summary"], expected.summary[0])
    assert written["low"].shape == (32, 3, 6)
    facts = about("cat-tile-3x.safetensors")
    assert (facts["teacher"], facts["upsampler"], facts["factor"]) == ("tiny_vit", "tile", 3)
    assert (facts["image_size"], facts["teacher_size"]) == ([80, 160], [24, 48])
    with Image.open("cat-tile-3x.png") as sheet:
        assert sheet.width > 4 * SIDE
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "9x18" in out


def test_upsample__a_fit_s_file_says_which_upsampler_at_which_size(photo):
    teacher = build_teacher("tiny_vit", TeacherConfig(preset="tiny_vit"))
    torch.manual_seed(0)
    fitted = FittedUpsampler.untrained("featup", 2, {"tiny_vit": teacher.spec})._models["tiny_vit"]
    header = FittedHeader("featup", "tiny_vit", "", 32, 2, (32, 32))
    save_model("mine.safetensors", fitted, header)
    assert upsample(photo, "--teacher", "tiny_vit", "--upsampler", "mine.safetensors") == 0
    facts = about("cat-featup-2x.safetensors")
    assert facts["teacher_size"] == [16, 32], "the size of the fit, in the photograph's shape"
    assert facts["fit_sha256"] == sha256_of(Path("mine.safetensors"))
    other = ("--upsampler", "mine.safetensors", "--size", "64", "--overwrite")
    assert upsample(photo, "--teacher", "tiny_vit", *other) == 0
    assert about("cat-featup-2x.safetensors")["teacher_size"] == [32, 64]


def test_upsample__implicit_is_the_fit_to_this_photograph(photo):
    asked = (
        "--upsampler",
        "implicit",
        "--factor",
        "2",
        "--options",
        "steps=2",
        "views=4",
        "seed=3",
    )
    assert upsample(photo, "--teacher", "tiny_vit", *asked) == 0
    teacher = build_teacher("tiny_vit", TeacherConfig(preset="tiny_vit"))
    pixels = to_pixels(photo, (48, 96))
    fit = fit_implicit(teacher, pixels, (24, 48), 2, 2, 4, 3, progress=False)
    written = load_file("cat-implicit-2x.safetensors")["features"]
    torch.testing.assert_close(written, fit.render((6, 12)))


def test_upsample__deep_image_prior_is_fitted_to_the_teachers_map(photo):
    asked = ("--upsampler", "deep_image_prior", "--factor", "2", "--options", "steps=2", "seed=3")
    assert upsample(photo, "--teacher", "tiny_vit", *asked) == 0
    teacher = build_teacher("tiny_vit", TeacherConfig(preset="tiny_vit"))
    upsampler, pixels = DeepImagePrior(2, steps=2, seed=3), to_pixels(photo, (48, 96))[None]
    written = load_file("cat-deep_image_prior-2x.safetensors")["features"]
    torch.testing.assert_close(written, upsampler(teacher, pixels, (6, 12)).spatial[0])


def test_paint__the_upsampled_map_has_colours_of_its_own_and_bilinear_is_shown_once():
    torch.manual_seed(0)
    low, fine = torch.rand(8, 2, 3), torch.rand(8, 4, 6)
    pixels = torch.rand(3, 32, 48)
    sheet = paint(pixels, low, fine, "tile")
    assert paint(pixels, low, fine, "bilinear").width == sheet.width - SIDE - 8
    last = sheet.crop((sheet.width - SIDE, 60, sheet.width, sheet.height - 20))
    assert len(last.getcolors(1 << 16)) > 20, "24 cells, each of another colour"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["none.png"], "none.png"),
        (["text.png"], "not an image"),
        (["."], "is a folder"),
        (["cat.png", "sub/cat.png"], "2 photographs are called cat"),
        (["cat.png", "--teacher", "tiny_vut"], "did you mean 'tiny_vit'"),
        (["cat.png", "--upsampler", "tiles"], "did you mean 'tile'"),
        (["cat.png", "--upsampler", "carafe", "--factor", "2"], "fit-upsampler"),
        (["cat.png", "--upsampler", "none.safetensors"], "none.safetensors"),
        (["cat.png", "--upsampler", "implicit", "--options", "step=1"], "did you mean 'steps'"),
        (["cat.png", "--upsampler", "implicit", "--options", "steps=many"], "steps"),
        (["cat.png", "--upsampler", "implicit", "--options", "buffer=2"], "true or false"),
        (["cat.png", "--upsampler", "implicit", "--options", "total_variation=-1"], "below 0"),
        (["cat.png", "--upsampler", "implicit", "--options", "downsampler=mean"], "simple"),
        (["cat.png", "--upsampler", "s2", "--options", "beta"], "KEY=VALUE"),
        (["cat.png", "--upsampler", "bilinear", "--factor", "0"], "at least 1"),
        (["cat.png", "--factor", "0"], "--factor 0: it must be at least 1"),
        (["cat.png", "--upsampler", "bilinear", "--output", "text.png"], "text.png"),
        (["taken.png", "--upsampler", "bilinear"], "--overwrite"),
    ],
)
def test_upsample__what_cannot_be_is_one_line(photo, words, problem, capsys):
    Path("text.png").write_text("no image")
    Path("sub").mkdir()
    Image.open(photo).save("sub/cat.png")
    Image.open(photo).save("taken.png")
    Path("taken-bilinear-4x.png").touch()
    teacher = [] if "--teacher" in words else ["--teacher", "tiny_vit"]
    assert upsample(*words, *teacher) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
    assert not list(Path().glob("*.safetensors"))


def test_upsample__more_than_the_machine_has_is_refused_before_it_is_waited_for(photo, capsys):
    words = (photo, "--teacher", "tiny_vit", "--upsampler", "bilinear", "--size", "9999999")
    assert upsample(*words) != 0
    error = capsys.readouterr().err
    assert "out of memory in bilinear at 2500000x5000000 cells of cat.png" in error
    assert "lower --size or --factor" in error
    assert error.count("\n") == 1
