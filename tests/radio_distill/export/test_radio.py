"""The torch.hub layout, read back by the project's own reader of it and by hand."""

from argparse import Namespace
from typing import Any

import pytest
import torch
from timm.models import create_model

from radio_distill.config import StudentConfig, TeacherConfig
from radio_distill.errors import ExportError
from radio_distill.export import radio as format_
from radio_distill.export.radio import Radio
from radio_distill.export.write import export as write
from radio_distill.models.heads import Head
from teachers import build_teacher


def export(student, folder):
    return write(student, folder, Radio())


def read(path):
    with torch.serialization.safe_globals([Namespace]):
        content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


@pytest.fixture
def make_tiny(make_student):
    """Make a student of the smallest body that the hub's code knows."""

    def make(**fields):
        return make_student(architecture="vit_tiny_patch16_224", **fields)

    return make


@torch.no_grad()
def test_export__the_reader_of_published_checkpoints_sees_the_student(make_tiny, tmp_path):
    student = make_tiny(registers=3, spectral_reparametrization=True)
    path = export(student, tmp_path / "out")
    body = student.model.student
    config = TeacherConfig(preset="radio", weights=str(path))
    pixels = torch.rand(1, 3, 160, 320)
    tokens, spatial = body(pixels)
    found = build_teacher("radio", config).encode(pixels)
    torch.testing.assert_close(found.spatial, spatial, atol=1e-5, rtol=0)
    summary = torch.cat([tokens[:, 0], tokens[:, 2]], dim=1)
    torch.testing.assert_close(found.summary, summary, atol=1e-5, rtol=0)


@torch.no_grad()
def test_export__heads_by_teacher(make_tiny, tmp_path):
    student = make_tiny(teachers=("dino", "sam", "clip"))
    content = read(export(student, tmp_path / "out"))
    state = content["state_dict"]
    tokens = torch.randn(4, 192)
    for name, head in student.model.heads.items():
        heads = {"spatial": f"_feature_projections.{name}.", "summary": f"_heads.{name}."}
        for kind, prefix in heads.items():
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            mlp = getattr(head, kind)
            assert bool(own) == (mlp is not None)
            if mlp is not None:
                rebuilt = getattr(Head(192, student.checkpoint.teachers[name], HEADS), kind)
                rebuilt.load_state_dict(own)
                assert torch.equal(rebuilt(tokens), mlp(tokens))


HEADS = StudentConfig(head_hidden=16, head_layers=1)


def test_export__arguments_bind_tokens_to_teachers(make_tiny, tmp_path):
    content = read(export(make_tiny(registers=5), tmp_path / "out"))
    assert content.keys() == {"state_dict", "args", "arch", "epoch"}
    arguments = content["args"]
    assert (content["arch"], arguments.model) == ("vit_tiny_patch16_224",) * 2
    rows = [(row["name"], row["token_slot"], row["use_summary"]) for row in arguments.teachers]
    assert rows == [("clip", 0, True), ("sam", 1, False), ("dino", 2, True)]
    assert (arguments.cpe_max_size, arguments.cpe_num_registers) == (512, 5)
    assert (arguments.model_norm, arguments.mlp_version, arguments.dtype) == (
        False,
        "v2",
        torch.float32,
    )
    assert content["state_dict"]["input_conditioner.norm_mean"].flatten().tolist() == [0.5] * 3


@pytest.mark.parametrize("final_norm", [False, True])
def test_export__timm_body_of_the_named_architecture_takes_the_blocks(
    make_tiny, tmp_path, final_norm
):
    """The hub's code builds this body by its name; all but position and tokens fills it."""
    student = make_tiny(final_norm=final_norm, patch_size=32)
    content = read(export(student, tmp_path / "out"))
    arguments = content["args"]
    body = create_model(arguments.model, num_classes=0, **arguments.model_kwargs)
    assert body.patch_embed.patch_size == (32, 32)
    own = {
        key.removeprefix("base_model."): value
        for key, value in content["state_dict"].items()
        if key.startswith(("base_model.blocks.", "base_model.norm."))
    }
    missing, unexpected = body.load_state_dict(own, strict=False)
    assert not unexpected
    norms = set() if final_norm else {"norm.weight", "norm.bias"}
    tokens = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert set(missing) == tokens | norms
    assert arguments.model_norm is final_norm


def test_export__layer_scale_goes_by_its_published_name(make_student, tmp_path, monkeypatch):
    """Only the v2 bodies of the hub's code have it; here a small one joins them."""
    student = make_student(architecture="test_vit2")
    with pytest.raises(ExportError, match="sizes"):
        Radio().check(student)
    monkeypatch.setitem(format_._ARCHITECTURES, (64, 8, 2, 192, True), "small_v2")
    content = read(export(student, tmp_path / "out"))
    state = content["state_dict"]
    assert content["arch"] == "small_v2"
    scale = student.model.student.blocks[7].ls2.gamma
    assert torch.equal(state["base_model.blocks.7.ls2.grandma"], scale)
    assert not any("gamma" in key for key in state)
    assert state["base_model.reg_token"].shape == (1, 4, 64)


def test_check__no_bias_on_queries(make_student):
    student = make_student()
    student.model.student.blocks[0].attn.qkv.bias = None
    with pytest.raises(ExportError, match=r"bias.*transformers"):
        Radio().check(student)


def test_export__names_that_begin_alike_are_told_apart_by_place(make_tiny, monkeypatch):
    student = make_tiny()
    assert format_._labels(student) == ["clip", "sam", "dino"]
    specs = student.checkpoint.teachers
    specs["dinov3"] = specs.pop("clip")
    assert format_._labels(student) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"window_size": 2, "global_blocks": 2}, "student.window_size 2"),
        ({"heads": {"dino": {"features": {"name": "linear"}}}}, "dino"),
        ({"feature_head": {"name": "mlp", "options": {"bias": False}}}, "clip"),
        ({"architecture": "test_vit"}, "sizes"),
        ({"architecture": "vit_xsmall_patch16_clip_224"}, "a norm before its blocks"),
    ],
)
def test_check__what_the_layout_cannot_hold(make_student, tmp_path, fields, reason):
    with pytest.raises(ExportError) as caught:
        export(make_student(**fields), tmp_path / "out")
    message = str(caught.value)
    assert message.startswith("radio cannot hold student.")
    assert reason in message
    assert message.endswith("onnx")
    assert "\n" not in message
    assert not (tmp_path / "out").exists()
