"""Position tables that are no square: their grid is known, or asked for, never guessed."""

import json
from argparse import Namespace
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from radio_distill.config import Recipe, build, check
from radio_distill.errors import ConfigError, WeightsError
from radio_distill.models import student as students
from radio_distill.weights.pretrained import initialise
from radio_distill.weights.radio import read_radio

Student = partial(students.Student, initialise=initialise)


def vit(rows, columns, **options):
    torch.manual_seed(0)
    size = (16 * rows, 16 * columns)
    model = timm.create_model("test_vit", num_classes=0, img_size=size, **options)
    torch.nn.init.normal_(model.pos_embed)
    return model


@pytest.fixture
def small(student_config):
    return partial(student_config, architecture="test_vit")


def write(model, folder, **settings):
    save_file(model.state_dict(), folder / "model.safetensors")
    if settings:
        (folder / "config.json").write_text(json.dumps(settings))
        return folder
    return folder / "model.safetensors"


def expected(model, grid, side):
    """timm's own resampling, and the bias of the patches, which has its place in the table."""
    rows = model.get_parameter("pos_embed")[:, 1:]
    table = resample_abs_pos_embed(rows, [side, side], list(grid), num_prefix_tokens=0)
    bias = model.get_submodule("patch_embed").get_parameter("proj.bias")
    return (table + bias).view(side, side, -1).detach()


SETTINGS = {
    "model_args": lambda h, w: {"model_args": {"img_size": [16 * h, 16 * w]}},
    "input_size": lambda h, w: {"pretrained_cfg": {"input_size": [3, 16 * h, 16 * w]}},
    "one table": lambda h, w: {"input_size": [3, 16 * h, 16 * w]},
}


@pytest.mark.parametrize(
    ("grid", "kind"),
    # 4 x 9 and 8 x 2 are squares by their number alone.
    [((4, 9), "model_args"), ((8, 2), "input_size"), ((3, 5), "one table"), ((6, 6), "model_args")],
)
def test_folder__its_configuration_says_the_grid(grid, kind, tmp_path, small):
    model = vit(*grid)
    folder = write(model, tmp_path, architecture="test_vit", **SETTINGS[kind](*grid))
    student = Student(small(pretrained=str(folder), max_size=128), 1)
    torch.testing.assert_close(student.positions.table.data, expected(model, grid, 8))


def test_folder__a_configuration_of_another_size_is_not_believed(tmp_path, small):
    """A square table stays a square where config.json was not changed with it."""
    model = vit(6, 6)
    folder = write(model, tmp_path, pretrained_cfg={"input_size": [3, 224, 224]})
    student = Student(small(pretrained=str(folder), max_size=96), 1)
    torch.testing.assert_close(student.positions.table.data, expected(model, (6, 6), 6))


def test_file__a_table_that_is_no_square_must_be_said(tmp_path, small):
    model = vit(3, 5)
    file = write(model, tmp_path)
    with pytest.raises(WeightsError, match=r"15 .*\.pretrained_grid") as error:
        Student(small(pretrained=str(file)), 1)
    assert "\n" not in str(error.value)
    config = small(pretrained=str(file), pretrained_grid=(3, 5), max_size=64)
    torch.testing.assert_close(Student(config, 1).positions.table.data, expected(model, (3, 5), 4))
    with pytest.raises(WeightsError, match=r"pretrained_grid: 5x5 .*25.* 15"):
        Student(small(pretrained=str(file), pretrained_grid=(5, 5)), 1)


def test_file__what_is_said_goes_before_a_square(tmp_path, small):
    model = vit(4, 9)
    config = small(pretrained=str(write(model, tmp_path)), max_size=96)
    square = Student(config, 1).positions.table.data
    torch.testing.assert_close(square, expected(model, (6, 6), 6))
    config = small(pretrained=config.pretrained, max_size=96, pretrained_grid=(4, 9))
    torch.testing.assert_close(Student(config, 1).positions.table.data, expected(model, (4, 9), 6))


@pytest.mark.parametrize("grid", [(3, 5), (4, 9)])
def test_naflex__its_table_has_a_shape(grid, tmp_path, student_config):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, use_naflex=True,
                              pos_embed_grid_size=grid)  # fmt: skip
    ramp = torch.linspace(0, 1, grid[0])[:, None] * torch.ones(grid)  # of rows alone
    model.embeds.pos_embed.data = ramp[None, :, :, None].repeat(1, 1, 1, 192)
    torch.nn.init.zeros_(model.embeds.proj.bias)
    config = student_config(pretrained=str(write(model, tmp_path)), max_size=128)
    table = Student(config, 1).positions.table.data
    assert table.shape == (8, 8, 192)
    assert (table.std(1) < 1e-5).all()
    assert (table[1:, 0, 0] >= table[:-1, 0, 0]).all()
    assert table[-1, 0, 0] > 0.9


def radio(rows, columns):
    torch.manual_seed(0)
    blocks = timm.create_model("vit_tiny_patch16_224", num_classes=0, final_norm=False).blocks
    return {
        **{f"base_model.blocks.{key}": value for key, value in blocks.state_dict().items()},
        "base_model.patch_generator.embedder.weight": torch.randn(192, 768),
        "base_model.patch_generator.pos_embed": torch.randn(1, rows * columns, 192),
        "base_model.patch_generator.cls_token.token": torch.randn(5, 192),
    }


def test_radio__a_table_that_is_no_square(tmp_path, student_config):
    state, path = radio(4, 9), tmp_path / "radio.pth"
    said = Namespace(cpe_max_size=(64, 144))
    torch.save({"state_dict": state, "args": said}, path)
    by_file = Student(student_config(pretrained=str(path), max_size=144), 1).positions.table.data
    with pytest.raises(WeightsError, match=r"4x9.* square"):
        read_radio(path)
    torch.save({"state_dict": state, "args": Namespace()}, path)
    config = student_config(pretrained=str(path), max_size=144, pretrained_grid=(4, 9))
    assert torch.equal(Student(config, 1).positions.table.data, by_file)
    state = radio(3, 5)
    torch.save({"state_dict": state, "args": Namespace()}, path)
    for grid, message in ((), r"15 .*pretrained_grid"), ((2, 7), "14 positions, .* 15"):
        with pytest.raises(WeightsError, match=message):
            Student(student_config(pretrained=str(path), pretrained_grid=grid), 1)
    with pytest.raises(WeightsError, match="15 positions"):
        read_radio(path)


def test_radio__a_square_is_as_before(tmp_path, student_config):
    state, path = radio(6, 6), tmp_path / "radio.pth"
    torch.save({"state_dict": state, "args": Namespace(cpe_max_size=96)}, path)
    table = Student(student_config(pretrained=str(path), max_size=96), 1).positions.table.data
    source = state["base_model.patch_generator.pos_embed"].view(6, 6, 192)
    torch.testing.assert_close(table, source)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"pretrained": "w.pth", "pretrained_grid": [3]}, r"pretrained_grid: \[3\]"),
        ({"pretrained": "w.pth", "pretrained_grid": [3, 0]}, r"pretrained_grid: \[3, 0\]"),
        ({"pretrained_grid": [3, 5]}, r"student\.pretrained"),
    ],
)
def test_recipe__a_grid_that_cannot_be(student, message):
    partition = {"name": "a", "size": 64, "teachers": ["t"], "batch_size": 2}
    recipe = {
        "name": "r", "data": {"shards": ["x"]}, "student": student,
        "teachers": {"t": {"preset": "tiny_vit"}},
        "stages": {"stage1": {"steps": 1, "partitions": [partition]}},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        check(build(Recipe, recipe))
