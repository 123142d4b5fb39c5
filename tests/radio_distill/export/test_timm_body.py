"""A student that is a timm model is what timm, onnxruntime and our reader find in its export."""

import re
from dataclasses import replace

import pytest
import timm
import torch

import radio_distill
from radio_distill.errors import ConfigError, ExportError, WeightsError
from radio_distill.export import format_named
from radio_distill.export.timm import Timm
from radio_distill.export.write import export
from radio_distill.models.heads import build_body
from radio_distill.weights.pretrained import initialise
from tools.bodies_page import FAMILIES, exported, folded_student

BY_NAME = {family.name: family for family in FAMILIES}
ROPE = {"architecture": "vit_tiny_patch16_dinov3_qkvb", "options": {"depth": 2}, "patch_size": 16}
BEFORE = {"architecture": "test_convnext", "map": "second_last", "patch_size": 16}
STUDENTS = {
    "convnext": {"architecture": "test_convnext", "final_norm": True},
    "second_last": BEFORE,
    "resized": {**BEFORE, "map": "resized", "final_norm": True},
    "rope": {**ROPE, "final_norm": True},
    "pool": {"architecture": "test_efficientnet", "summary": "pool"},
}


@pytest.fixture
def make_body(make_student):
    def make(name="convnext"):
        fields = {"body": "timm", "patch_size": 32, **STUDENTS[name]}
        return make_student(size=(64, 96), head_layers=0, **fields)

    return make


@torch.no_grad()
@pytest.mark.parametrize("name", STUDENTS)
def test_timm__is_read_by_timm_and_by_load_with_its_heads(make_body, tmp_path, name):
    student = make_body(name)
    folder = export(student, tmp_path / "out", Timm())  # which compares with timm's model
    pixels = torch.rand(2, 3, 64, 96)
    tokens, spatial = student.model.student(pixels)
    loaded = radio_distill.load(folder)
    output = loaded(pixels, heads=("clip", "dino"))
    assert torch.equal(output.summary, tokens[:, 0])
    assert torch.equal(output.features, spatial)
    expected = student.model(pixels, ("clip",)).features["clip"]
    torch.testing.assert_close(output.heads["clip"].summary, expected.summary)
    torch.testing.assert_close(output.heads["clip"].spatial, expected.spatial)
    assert (loaded.patch_size, loaded.native_size) == (student.config.patch_size, 96)
    assert loaded(torch.rand(1, 3, 50, 70)).features.shape[2:] == (
        -(-50 // loaded.patch_size),
        -(-70 // loaded.patch_size),
    )
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    found = {}
    exec(code.replace("FOLDER", str(folder)), found)
    assert found["summary"].shape == (1, loaded.summary_dim)


def test_timm__what_it_cannot_hold_is_refused(make_body, make_student, tmp_path):
    with pytest.raises(ExportError, match="size"):
        export(make_body(), tmp_path / "out", Timm((64, 64)))
    normed = make_student(
        body="timm", architecture="test_efficientnet", patch_size=32, final_norm=True
    )
    with pytest.raises(ExportError, match="final_norm"):
        export(normed, tmp_path / "out", Timm())
    for name in ("radio", "transformers"):
        with pytest.raises(ExportError, match="timm or onnx"):
            export(make_body(), tmp_path / "out", format_named(name))
    one_size = folded_student(BY_NAME["Hiera, at one size"], tmp_path)
    with pytest.raises(ExportError, match="224x224 px alone; take timm"):
        export(one_size, tmp_path / "out", format_named("onnx"))


@pytest.mark.parametrize(
    ("name", "few"),
    [("ConvNeXt", {"depths": (1, 1, 1, 1)}), ("ViT with RoPE: DINOv3, EUPE", {"depth": 1})],
)
def test_onnx__computes_the_same_at_every_size(tmp_path, name, few):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    assert exported(replace(BY_NAME[name], options=few), "onnx", tmp_path) == "yes"


@pytest.mark.parametrize("name", ["convnext", "rope"])
def test_pretrained__takes_a_file_an_export_and_a_run(make_body, tmp_path, name):
    student = make_body(name)
    body, config = student.model.student, replace(student.config, pretrained_sha256="")
    export(student, tmp_path / "out", Timm())
    torch.save({"model": {f"module.{k}": v for k, v in body.to_timm().items()}}, tmp_path / "w.pth")
    for source in ("out", "out/model.safetensors", "w.pth", "tiny"):
        path = str(tmp_path / source)
        again = build_body(replace(config, pretrained=path), 3, initialise=initialise)
        for key, value in body.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), (source, key)
    other = replace(config, architecture="test_convnext2", patch_size=32, options={})
    with pytest.raises(WeightsError, match="does not hold weights of test_convnext2"):
        build_body(replace(other, pretrained=path), 3, initialise=initialise)
    path = str(tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="does not hold weights of test_convnext2"):
        build_body(replace(other, pretrained=path), 3, initialise=initialise)


def test_pretrained__reads_the_names_of_dinov3s_authors(tmp_path):
    """Registers are ``storage_tokens`` there, LayerScale ``ls1.gamma``; convnexts have no stem."""
    from timm.models.eva import checkpoint_filter_fn

    family = BY_NAME["ViT with RoPE: DINOv3, EUPE"]
    body = build_body(family.config(), 1)
    state = timm.create_model(family.architecture, num_classes=0, depth=2).state_dict()
    renames = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    theirs = {}
    for key, value in state.items():
        for ours, name in renames.items():
            key = key.replace(ours, name)
        theirs[key] = value
    assert set(checkpoint_filter_fn(dict(theirs), body.body)) >= set(body.body.state_dict())
    torch.save(theirs, tmp_path / "dinov3.pth")
    config = replace(family.config(), pretrained=str(tmp_path / "dinov3.pth"))
    started = build_body(config, 1, initialise=initialise)
    for key, value in started.body.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_options__of_a_folder_cannot_make_timm_unpickle(make_body, tmp_path):
    folder = export(make_body(), tmp_path / "out", Timm())
    file = folder / "radio_distill.json"
    file.write_text(
        file.read_text().replace('"options": {}', '"options": {"checkpoint_path": "x"}', 1)
    )
    with pytest.raises(ConfigError, match="checkpoint_path"):
        radio_distill.load(folder)
