"""A backbone takes every size, and its cells show what they say."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_distill import from_config
from radio_distill.config import StudentConfig
from radio_distill.errors import ConfigError, UnknownNameError
from radio_distill.models.backbone import StudentEncoder
from radio_distill.models.heads import build_student
from radio_distill.types import TeacherSpec

HALF = (0.5, 0.5, 0.5)
TEACHERS = {
    "clip": TeacherSpec("clip", 6, 5, 14, (224, 224), None, HALF, HALF),
    "sam": TeacherSpec("sam", 4, None, 16, (224, 224), None, HALF, HALF),
    "dino": TeacherSpec("dino", 3, 7, 14, (224, 224), None, HALF, HALF),
}


def make(**fields):
    torch.manual_seed(0)
    config = StudentConfig(
        **{"architecture": "test_vit", "max_size": 256, "head_hidden": 8} | fields
    )
    model = build_student(config, TEACHERS)
    return StudentEncoder(model.student, config, TEACHERS, model.heads, (0, 2), 96).eval()


@pytest.fixture(scope="module")
def model():
    return make()


@cache
def with_windows(window):
    return make(window_size=window, global_blocks=1)


def test_backbone__says_what_it_is(model):
    assert (model.patch_size, model.embed_dim, model.summary_dim) == (16, 64, 128)
    assert (model.max_size, model.native_size) == (256, 96)
    assert model.head_names == ("clip", "sam", "dino")
    assert model.teachers["clip"].licence == "unknown"


@torch.no_grad()
def test_forward__is_the_student_and_its_heads(model):
    pixels = torch.rand(2, 3, 64, 48)
    tokens, spatial = model.student(pixels)
    output = model(pixels, heads=("dino", "sam"))
    assert torch.equal(output.features, spatial)
    assert torch.equal(output.summary, torch.cat((tokens[:, 0], tokens[:, 2]), dim=1))
    assert list(output.heads) == ["dino", "sam"]
    summary, features = model.heads["dino"](tokens[:, 2], spatial)
    assert torch.equal(output.heads["dino"].summary, summary)
    assert torch.equal(output.heads["dino"].spatial, features)
    assert output.heads["sam"].summary is None


@torch.no_grad()
def test_forward__nlc_is_the_same_row_by_row(model):
    pixels = torch.rand(1, 3, 32, 64)
    maps, rows = (model(pixels, ("clip",), format=name) for name in ("NCHW", "NLC"))
    assert rows.features.shape == (1, 8, 64)
    assert torch.equal(rows.features[0, 5], maps.features[0, :, 1, 1])
    assert torch.equal(rows.heads["clip"].spatial[0, 5], maps.heads["clip"].spatial[0, :, 1, 1])


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 70), width=st.integers(1, 70), window=st.sampled_from([0, 2]))
def test_forward__any_size_gives_the_cells_that_show_image(height, width, window):
    model = with_windows(window)
    pixels = torch.rand(1, 3, height, width)
    with torch.no_grad():
        padded, resized = model(pixels, ("clip",)), model(pixels, ("clip",), fit="resize")
    cells = -(-height // 16), -(-width // 16)
    assert padded.features.shape[-2:] == padded.heads["clip"].spatial.shape[-2:] == cells
    nearest = model.nearest_size(height, width)
    assert resized.features.shape[-2:] == (nearest[0] // 16, nearest[1] // 16)
    step = 16 * (window or 1)
    assert all(side % step == 0 and side > 0 for side in nearest)
    for side, near in zip((height, width), nearest, strict=True):
        assert abs(side - near) <= step / 2 or near == step


@torch.no_grad()
def test_forward__padding_is_the_mean_colour_below_and_to_the_right(model):
    pixels = torch.rand(1, 3, 40, 50)
    canvas = model.student.mean.expand(1, 3, 48, 64).clone()
    canvas[:, :, :40, :50] = pixels
    torch.testing.assert_close(model(pixels).features, model(canvas).features)
    torch.testing.assert_close(model(pixels).summary, model(canvas).summary)


@torch.no_grad()
def test_forward__cells_of_a_window_s_padding_are_cut_off():
    pixels = torch.rand(1, 3, 48, 32)  # 3 rows of cells, windows of 2
    assert with_windows(2)(pixels).features.shape == (1, 64, 3, 2)


@torch.no_grad()
def test_forward__a_size_that_fits_is_left_alone(model):
    pixels = torch.rand(1, 3, 32, 48)
    padded, resized = model(pixels), model(pixels, fit="resize")
    assert torch.equal(padded.features, resized.features)


@torch.no_grad()
def test_summarize__is_the_head_s_summary(model):
    pixels = torch.rand(2, 3, 32, 40)
    expected = model(pixels, ("dino",)).heads["dino"].summary
    assert torch.equal(model.summarize(pixels, "dino"), expected)
    assert expected.shape == (2, 7)


@torch.no_grad()
def test_forward__compiles_into_one_graph():
    model = make()
    del model.student.blocks[2:]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    pixels = torch.rand(1, 3, 40, 64)
    expected, found = model(pixels, ("clip", "sam")), compiled(pixels, ("clip", "sam"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_forward__torch_export_takes_one_program_for_all_sizes_of_a_shape():
    model, free = make(), torch.export.Dim.DYNAMIC
    del model.student.blocks[1:]
    sizes = {"pixels": {0: free, 2: free, 3: free}}
    program = torch.export.export(model, (torch.rand(2, 3, 32, 48),), dynamic_shapes=sizes).module()
    pixels = torch.rand(1, 3, 64, 160)
    torch.testing.assert_close(program(pixels), model(pixels), rtol=1e-5, atol=1e-5)
    for height, width in ((48, 32), (32, 40)):  # another shape, and no multiple of the patch
        with pytest.raises(AssertionError, match="Guard failed"):
            program(torch.rand(1, 3, height, width))


def test_forward__gradients_reach_everything_that_is_asked():
    model = make().train()
    output = model(torch.rand(2, 3, 40, 32), ("clip",))
    loss = output.summary.square().mean() + output.features.square().mean()
    loss = loss + sum(item.square().mean() for item in output.heads["clip"])
    loss.backward()
    asked = {name for name, item in model.named_parameters() if item.grad is not None}
    assert asked == {
        name
        for name, _ in model.named_parameters()
        if not name.startswith(("adaptors.sam", "adaptors.dino"))
    }
    assert all(item.grad.abs().sum() > 0 for item in model.student.parameters())


@torch.no_grad()
def test_forward__runs_in_the_type_of_its_weights(model):
    pixels = torch.rand(1, 3, 32, 32)
    exact, found = model(pixels).features, make().to(torch.bfloat16)(pixels).features
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixels": torch.rand(1, 1, 32, 32)}, r"\[1, 1, 32, 32\].*\[B, 3, H, W\]"),
        ({"pixels": torch.rand(3, 32, 32)}, r"\[B, 3, H, W\]"),
        ({"pixels": torch.rand(1, 3, 0, 32)}, r"\[B, 3, H, W\]"),
        ({"pixels": torch.rand(1, 3, 32, 32) * 255}, r"25\d.*\[0, 1\]"),
        ({"pixels": torch.randn(1, 3, 32, 32) * 2}, r"\[0, 1\]"),
        ({"pixels": torch.zeros(1, 3, 32, 32) - 2}, "-2, .*normalised"),
        ({"pixels": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, "uint8"),
        ({"pixels": np.zeros((1, 3, 32, 32), np.float32)}, r"a ndarray.*torch\.Tensor"),
        ({"format": "NHWC"}, "format 'NHWC'"),
        ({"fit": "crop"}, "fit 'crop'"),
    ],
)
def test_forward__names_what_cannot_be(model, arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        model(**{"pixels": torch.rand(1, 3, 32, 32), **arguments})
    assert "\n" not in str(caught.value)


def test_forward__an_unknown_head_gets_the_nearest(model):
    with pytest.raises(UnknownNameError, match=r"'clib'.*'clip'"):
        model(torch.rand(1, 3, 32, 32), ("clib",))
    bare = from_config(StudentConfig(architecture="test_vit", max_size=64))
    with pytest.raises(UnknownNameError, match="'clip'"):
        bare(torch.rand(1, 3, 32, 32), "clip")


def test_summarize__a_teacher_without_summary_is_refused(model):
    with pytest.raises(ConfigError, match=r"'sam'.*summary"):
        model.summarize(torch.rand(1, 3, 32, 32), "sam")


@pytest.mark.parametrize("fit", ["pad", "resize"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_forward__in_half_precision_every_size_fits(model, fit, dtype):
    """Also where the antialiased filter has no such type, as on a CPU."""
    pixels = torch.rand(1, 3, 50, 75)
    exact = model(pixels, fit=fit).features
    half = make().to(dtype)
    for image in (pixels, pixels.to(dtype)):
        found = half(image, fit=fit).features
        assert found.dtype == dtype
        assert (found.float() - exact).norm() < 0.05 * exact.norm()


@torch.no_grad()
def test_forward__what_a_filter_overshoots_is_let_through(model):
    pixels = torch.rand(1, 3, 40, 40).round()
    larger = torch.nn.functional.interpolate(pixels, 64, mode="bicubic")
    assert larger.max() > 1
    assert model(larger).features.shape == (1, 64, 4, 4)


@pytest.mark.parametrize("window", [0, 2])
def test_layers__the_last_is_the_output_and_an_inner_one_that_of_a_student_cut_there(window):
    model = make(window_size=window, global_blocks=1, final_norm=True)
    pixels = torch.rand(2, 3, 40, 70)
    depth = len(model.student.blocks)
    layers = model.layers(pixels, depth)
    summary, features, _ = model(pixels)
    assert torch.equal(layers[-1].spatial, features)
    assert torch.equal(layers[-1].summary, summary)
    del model.student.blocks[1:]
    summary, features, _ = model(pixels)
    torch.testing.assert_close(layers[0].spatial, features)
    torch.testing.assert_close(layers[0].summary, summary)
