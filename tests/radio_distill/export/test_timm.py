"""What timm reads is the student, to the last bits, at every size."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from einops import rearrange
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer

from radio_distill.errors import ConfigError, ExportError
from radio_distill.export.folded import FoldedStudent
from radio_distill.export.timm import Timm
from radio_distill.export.write import export as write
from radio_distill.models.heads import build_student

SIZES = [(224, 224), (224, 192), (160, 320), (512, 512), (768, 512)]


def export(student, folder, size=None):
    return write(student, folder, Timm(size))


def _load(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@torch.no_grad()
def _difference(student, model, pixels):
    """Largest absolute difference over summary tokens and features."""
    body = student.model.student
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    tokens = model.forward_features((pixels - mean) / std)
    summary, spatial = body(pixels)
    count = body.num_prefix_tokens
    pairs = (
        (summary, tokens[:, : summary.shape[1]]),
        (rearrange(spatial, "b d h w -> b (h w) d"), tokens[:, count:]),
    )
    return max((wanted - found).abs().max().item() for wanted, found in pairs)


@pytest.mark.parametrize("architecture", ["test_vit", "test_vit2"])  # the latter has LayerScale
def test_export__same_tokens_at_every_size(make_student, tmp_path, architecture):
    student = make_student(architecture=architecture)
    model = _load(export(student, tmp_path / "out"))
    assert type(model) is NaFlexVit
    for height, width in SIZES:
        difference = _difference(student, model, torch.rand(1, 3, height, width))
        assert difference <= 1e-5, (height, width)


@pytest.mark.parametrize(
    "fields",
    [
        {"architecture": "test_vit3"},  # no class token, attention pooling, own norm
        {"final_norm": True, "registers": 0, "patch_size": 8},
        {"spectral_reparametrization": True},
    ],
    ids=["pooled", "final_norm", "spectral"],
)
def test_export__same_tokens_of_other_students(make_student, tmp_path, fields):
    student = make_student(**fields)
    model = _load(export(student, tmp_path / "out"))
    assert _difference(student, model, torch.rand(2, 3, 160, 320)) <= 1e-5


@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        ("test_vit2", (224, 224)),
        ("test_vit2", (160, 320)),
        ("deit_tiny_patch16_224", (96, 64)),
    ],
)
def test_export_plain__same_tokens_at_its_size(make_student, tmp_path, architecture, size):
    student = make_student(architecture=architecture)
    model = _load(export(student, tmp_path / "out", size))
    assert type(model) is VisionTransformer
    assert _difference(student, model, torch.rand(2, 3, *size)) <= 1e-5
    with pytest.raises(AssertionError, match="height"):
        model(torch.rand(1, 3, 256, 256))


def test_export__takes_the_name_of_timms_radio_model_that_fits(make_student, tmp_path):
    """One whose positions timm would resize with other corners, were it not told."""
    small = make_student()
    config = replace(small.config, architecture="vit_base_patch14_dinov2", max_size=256)
    recipe = replace(small.checkpoint.recipe, student=config)
    model = build_student(config, small.checkpoint.teachers).eval()
    student = FoldedStudent(model, replace(small.checkpoint, recipe=recipe))
    folder = export(student, tmp_path / "out")  # raises where features differ
    written = json.loads((folder / "config.json").read_text())
    assert written["architecture"] == "naflexvit_base_patch16_radio_v3"
    plain = export(make_student(), tmp_path / "plain", (64, 96))
    assert json.loads((plain / "config.json").read_text())["architecture"] == "test_vit"


def test_export__file_loads_by_its_path_too(make_student, tmp_path):
    student = make_student()
    folder = export(student, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    model = timm.create_model(
        config["architecture"],
        checkpoint_path=folder / "model.safetensors",
        num_classes=0,
        **config["model_args"],
    ).eval()
    model.pretrained_cfg.update(config["pretrained_cfg"])
    assert _difference(student, model, torch.rand(1, 3, 48, 80)) <= 1e-5


@torch.no_grad()
def test_export__the_cards_example_runs(make_student, tmp_path):
    student = make_student()
    folder = export(student, tmp_path / "out")
    example = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert example
    names: dict[str, Any] = {}
    exec(example[1].replace("FOLDER", str(folder)), names)
    summary, spatial = student.model.student(names["pixels"] * names["std"] + names["mean"])
    assert names["features"].shape == rearrange(spatial, "b d h w -> b h w d").shape
    assert torch.allclose(rearrange(names["features"], "b h w d -> b d h w"), spatial, atol=1e-5)
    assert torch.allclose(names["tokens"][:, 2], summary[:, 2], atol=1e-5)
    assert "tokens[:, 2]  # summary for dino" in example[1]
    assert "for sam" not in example[1]


def test_check__refuses_windows(make_student, tmp_path):
    student = make_student(window_size=2, global_blocks=2)
    message = r"timm cannot hold student\.window_size 2: .*; export it as onnx"
    with pytest.raises(ExportError, match=message):
        Timm().check(student)
    with pytest.raises(ExportError, match=message):
        export(student, tmp_path / "out", (64, 64))
    assert not (tmp_path / "out").exists()


def test_check__refuses_what_naflexvit_cannot_be(make_student):
    student = make_student(architecture="deit_tiny_patch16_224")
    message = r"no NaFlexViT, .*'deit_tiny_patch16_224'; export it for one size, or as onnx"
    with pytest.raises(ExportError, match=message):
        Timm().check(student)


def test_export_plain__refuses_a_size_that_the_patch_does_not_divide(make_student, tmp_path):
    with pytest.raises(ConfigError, match=r"100x64.* 16"):
        export(make_student(), tmp_path / "out", (100, 64))


def test_export__writes_nothing_where_timm_reads_another_model(make_student, tmp_path):
    student = make_student()
    student.model.student.blocks[1].norm1.eps = 0.1  # which no file of weights can hold
    with pytest.raises(ExportError, match="differs"):
        export(student, tmp_path / "out")
    assert not (tmp_path / "out").exists()
